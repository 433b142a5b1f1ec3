"""`reconstruct`: originals beside reconstructions for images of any size, or pictures of the latents in a file or folder."""

from dataclasses import dataclass
from pathlib import Path

from autoencoder.data.remote import check_local
from autoencoder.latents.check import check_latents
from autoencoder.model_path import check_model
from autoencoder.runtime import cli
from autoencoder.runtime.errors import ConfigError, UsageError, require
from autoencoder.runtime.lock import make_folder


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Put images through an autoencoder and write each beside its reconstruction, or decode latents to pictures."""

    model: str | None = None
    """A run, a diffusers folder or a hub id; null, for latents only: the `vae` beside them."""
    input: str | None = None
    """An image, or a folder that is searched for images."""
    latents: str | None = None
    """Instead of `input`: a folder of latents, or a safetensors file with `mean` or `latents` (N, c, h, w), unscaled."""
    out: str
    """Folder for the pictures: NAME.png, original left and reconstruction right, and NAME.tif, the reconstruction in source values, where a
    picture does not hold all of it (16 bits, other channels than 1 and 3, a stated range); of latents ID.png and ID.tif alike, and
    grid.png, a grid each where there are several shapes."""
    rows: int | None = 64
    """Rows of latents to decode, spread evenly, of each shape one at least; null decodes all."""
    allow_vae_mismatch: bool = False
    """Decode latents of another encoder than the model's, and say so, instead of refusing them."""
    subfolder: str | None = None
    """Subfolder of `model` (such as `vae`)."""
    revision: str | None = None
    """Hub revision of `model`."""
    variant: str | None = None
    """Weight variant of `model` (such as `fp16`)."""
    tile: int | None = 1024
    """Images with a longer side go through in blended tiles of this side; null never tiles."""

    def __post_init__(self) -> None:
        check_local(self.out, "out")
        require(self.tile is None or self.tile >= 64, "tile", self.tile, "give at least 64 pixels or null")
        require(self.rows is None or self.rows >= 1, "rows", self.rows, "give at least 1 or null")
        require(self.input is None or Path(self.input).exists(), "input", self.input, "give an image or a folder that exists")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(lambda: _reconstruct(argv))


def _reconstruct(argv: list[str] | None) -> int:
    config = cli.parse(ReconstructConfig, argv, prog="firststage reconstruct", description="Write images beside their reconstructions.")
    if config.model is not None:
        check_model(config.model, "model", config.subfolder, config.variant)
    if config.input is not None and config.latents is not None:
        raise UsageError(f"input: got {config.input!r} beside latents={config.latents!r}; give one of them")
    if config.latents is not None:
        return _decode(config, config.latents)
    if config.input is None:
        raise UsageError("input: not given; give --input FILE_OR_FOLDER for images, or --latents FILE_OR_FOLDER for latents")
    if config.model is None:
        raise UsageError("model: not given; give --model MODEL (a run, a diffusers folder or a hub id)")
    return _images(config, config.input, config.model)


def _decode(config: ReconstructConfig, given: str) -> int:
    path = Path(given)
    if path.is_file():
        require(path.suffix == ".safetensors", "latents", given, "a file of latents ends in .safetensors")
    else:
        check_latents(given, "latents")
    model = config.model or str((path.parent if path.is_file() else path) / "vae")
    if config.model is None and not Path(model).is_dir():
        raise ConfigError("model", None, f"there is no {model} beside these latents; give the autoencoder that made them")
    check_model(model, "model", config.subfolder, config.variant)
    from autoencoder.latents.decoding import decode_latents

    decode_latents(config, path, model)
    return 0


def _images(config: ReconstructConfig, input: str, model: str) -> int:
    from tqdm import tqdm

    from autoencoder import artifact
    from autoencoder.data.decode import Misfit, decode_image
    from autoencoder.data.paths import IMAGE_EXTENSIONS, walk_images

    given = Path(input)
    paths = [given / name for name in walk_images(input)] if given.is_dir() else [given]
    if not paths:
        raise UsageError(f"input: got {input!r}, which holds no image; give a folder with {', '.join(IMAGE_EXTENSIONS)}")

    import torch

    from autoencoder.experimental.saved import open_family
    from autoencoder.model import narrow
    from autoencoder.obeying import refusal
    from autoencoder.posterior import DiagonalGaussian
    from autoencoder.pretrained import open_pretrained
    from autoencoder.preview import Preview
    from autoencoder.reconstruction import Whole, fits_png, quality, reconstruct, save_picture, save_values

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = open_pretrained(model, subfolder=config.subfolder, revision=config.revision, variant=config.variant)
    vae, preprocessing = narrow(opened.vae).to(device).eval(), opened.preprocessing
    family = open_family(vae, model, device, subfolder=config.subfolder)
    mode = DiagonalGaussian.mode if family is None else family.mode
    recipe, preview = artifact.pixels_of(vae, preprocessing), Preview.from_json(preprocessing)
    root = given if given.is_dir() else given.parent
    before = make_folder(Path(config.out), "the pictures")
    try:
        require(Path(config.out).resolve() != root.resolve(), "out", config.out, "the images themselves are there; give another folder")
        written, misfits, skipped = 0, 0, list[str]()
        for path in tqdm(paths, unit="img", disable=None if len(paths) > 1 else True):
            try:
                decoded = decode_image(path, recipe)
            except Exception as error:  # a broken file raises whatever its decoder raises
                misfits += isinstance(error, Misfit)
                if not written and misfits == min(3, len(paths)):
                    raise refusal(
                        recipe, model, key="input", given=input, finding=f"{path.name} does not fit: {str(error).partition(';')[0]}"
                    ) from error
                # Said once there is a picture: of a folder of misfits one message is enough.
                skipped.append(f"skipped {path}: {error}")
                continue
            whole = Whole.of(decoded.pixels, decoded.valid, recipe, device)
            reconstruction = reconstruct(vae, whole.images, tile=config.tile, mode=mode)
            picture = Path(config.out) / path.relative_to(root).with_suffix(".png")
            save_picture(whole, reconstruction, picture, preview=preview)
            if not fits_png(whole.recipe):
                valid = None if whole.valid is None else whole.valid[0, 0]
                tiff = picture.with_suffix(".tif")
                save_values(reconstruction[0], whole.recipe, tiff, decoded.dtype, valid=valid, nodata=decoded.nodata)
            height, width = decoded.pixels.shape[:2]
            _write(skipped)
            tqdm.write(f"{path.relative_to(root)}  {width} x {height}  {quality(whole, reconstruction):.2f} dB")
            written += 1
        _write(skipped)
        if not written:
            raise UsageError(f"input: none of the {len(paths)} images in {input} could be read; the reasons are above")
        return 0
    finally:
        # Where there is no picture in it.
        before.restore(())


def _write(lines: list[str]) -> None:
    """Print the lines beside the progress bar, once."""
    from tqdm import tqdm

    while lines:
        tqdm.write(lines.pop(0))
