"""`reconstruct`: originals beside reconstructions, for a file or a folder of images of any size."""

from dataclasses import dataclass
from pathlib import Path

from autoencoder.model_path import check_model
from autoencoder.runtime import cli
from autoencoder.runtime.errors import UsageError, require


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Put images through an autoencoder and write each beside its reconstruction."""

    model: str
    """A run, a diffusers folder or a hub id."""
    input: str
    """An image, or a folder that is searched for images."""
    out: str
    """Folder for the pictures: NAME.png, original left and reconstruction right."""
    subfolder: str | None = None
    """Subfolder of `model` (such as `vae`)."""
    revision: str | None = None
    """Hub revision of `model`."""
    variant: str | None = None
    """Weight variant of `model` (such as `fp16`)."""
    tile: int | None = 1024
    """Images with a longer side go through in blended tiles of this side; null never tiles."""

    def __post_init__(self) -> None:
        require(self.tile is None or self.tile >= 64, "tile", self.tile, "give at least 64 pixels or null")
        require(Path(self.input).exists(), "input", self.input, "give an image or a folder that exists")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(lambda: _reconstruct(argv))


def _reconstruct(argv: list[str] | None) -> int:
    config = cli.parse(ReconstructConfig, argv, prog="firststage reconstruct", description="Write images beside their reconstructions.")
    check_model(config.model, "model", config.subfolder)
    from tqdm import tqdm

    from autoencoder.data.decode import decode_image
    from autoencoder.data.paths import IMAGE_EXTENSIONS, walk_images

    given = Path(config.input)
    paths = [given / name for name in walk_images(str(given))] if given.is_dir() else [given]
    if not paths:
        raise UsageError(f"input: got {config.input!r}, which holds no image; give a folder with {', '.join(IMAGE_EXTENSIONS)}")

    import torch

    from autoencoder.model import load
    from autoencoder.reconstruction import save_reconstruction

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = load(config.model, subfolder=config.subfolder, revision=config.revision, variant=config.variant).to(device).eval()
    channels = int(vae.config["in_channels"])
    root = given if given.is_dir() else given.parent
    written = 0
    for path in tqdm(paths, unit="img", disable=None if len(paths) > 1 else True):
        try:
            pixels = decode_image(path, channels)
        except Exception as error:  # a broken file raises whatever its decoder raises
            tqdm.write(f"skipped {path}: {error}")
            continue
        value = save_reconstruction(
            vae, pixels, Path(config.out) / path.relative_to(root).with_suffix(".png"), device=device, tile=config.tile
        )
        tqdm.write(f"{path.relative_to(root)}  {pixels.shape[1]} x {pixels.shape[0]}  {value:.2f} dB")
        written += 1
    if not written:
        raise UsageError(f"input: none of the {len(paths)} images in {config.input} could be read; the reasons are above")
    return 0
