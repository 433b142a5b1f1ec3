"""Latents back to pictures: the means of a folder that `encode_dataset` made, or of any safetensors file."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from autoencoder.data.order import spread
from autoencoder.identity import Identity, check_identity, identity
from autoencoder.latents.opened import open_latents
from autoencoder.latents.reader import LatentsError
from autoencoder.model import AutoencoderKL, decode, decoded_at_once, downsampling, narrow
from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.pretrained import open_pretrained
from autoencoder.preview import Preview
from autoencoder.reconstruct import ReconstructConfig
from autoencoder.reconstruction import dtype_of, fits_png, save_values
from autoencoder.report.pictures import plain_grid
from autoencoder.runtime.errors import ConfigError
from autoencoder.runtime.lock import make_folder

GRID = 64
"""Most pictures in `grid.png`."""


@dataclass(frozen=True)
class Chosen:
    """What is to be decoded."""

    rows: list[tuple[torch.Tensor, list[int]]]
    """Of each shape means (N, c, h, w) float32, and their ids."""
    encoder_hash: str | None
    """Of the autoencoder that made them, where it is known."""
    decoder_hash: str | None


@torch.inference_mode()
def decode_latents(config: ReconstructConfig, path: Path, model: str) -> None:
    """Decode rows of `path` with `model` and write ID.png each and `grid.png` into the folder `config.out`.

    Where rows have several shapes, each has a grid of its own, `grid-WxH.png`.
    Where a picture does not hold all of it, ID.tif is the reconstruction in source values, as for images.

    Raises UsageError for latents of another encoder (unless allowed), of another number of channels, or with values that
    are not finite.
    """
    chosen = _from_file(path, config.rows) if path.is_file() else _from_folder(path, config.rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = open_pretrained(model, subfolder=config.subfolder, revision=config.revision, variant=config.variant)
    vae = narrow(opened.vae)
    given, preview = identity(vae, opened.pixels), Preview.from_json(opened.preprocessing)
    made_by = Identity(chosen.encoder_hash or given.encoder_hash, chosen.decoder_hash or given.decoder_hash)
    for note in check_identity(made_by, given, key="model", what=str(path), allow=config.allow_vae_mismatch):
        print(note, file=sys.stderr)
    channels = int(vae.config["latent_channels"])
    held = chosen.rows[0][0].shape[1]
    if held != channels:
        raise ConfigError("latents", str(path), f"these have {held} channels, the model {channels}; give their own model")
    vae = vae.to(device).eval()
    out = Path(config.out)
    make_folder(out, "the pictures")
    recipe, grids = PixelRecipe.from_json(opened.pixels), []
    for mean, ids in chosen.rows:
        pictures = _pictures(vae, mean.to(device), ids, out, recipe, preview)
        height, width = pictures.shape[2:]
        grids.append("grid.png" if len(chosen.rows) == 1 else f"grid-{width}x{height}.png")
        plain_grid(pictures, columns=8).save(out / grids[-1])
    values = "" if fits_png(recipe) else ", as many TIFFs of source values"
    print(f"{sum(len(ids) for _, ids in chosen.rows)} pictures{values} and {', '.join(grids)} written to {out}")


def _pictures(vae: AutoencoderKL, mean: torch.Tensor, ids: list[int], out: Path, recipe: PixelRecipe, preview: Preview) -> torch.Tensor:
    """Write the pictures of rows of one shape; returns those of a grid, uint8 (n, C, H, W)."""
    pictured, pictures = set(spread(len(ids), GRID).tolist()), []
    batch = decoded_at_once(max(mean.shape[2:]) * downsampling(vae))
    for start in range(0, len(ids), batch):
        decoded = decode(vae, mean[start : start + batch])
        for row, picture in enumerate(preview.each(decoded), start):
            channels_last = picture.permute(1, 2, 0).numpy()
            Image.fromarray(channels_last[:, :, 0] if len(picture) == 1 else channels_last).save(out / f"{ids[row]:08d}.png")
            if not fits_png(recipe):
                save_values(decoded[row - start], recipe, out / f"{ids[row]:08d}.tif", dtype_of(recipe))
            if row in pictured:
                pictures.append(picture)
    return torch.stack(pictures)


def _from_folder(path: Path, rows: int | None) -> Chosen:
    latents = open_latents(str(path), "latents")
    found = []
    try:
        for shape in latents.shapes:
            one = latents.of_shape(shape)
            read = one.gather(spread(len(one), len(one) if rows is None else max(1, round(rows * len(one) / len(latents)))))
            found.append((torch.from_numpy(read.mean), read.id.tolist()))
    except LatentsError as error:
        raise ConfigError("latents", str(path), str(error)) from error
    return Chosen(found, latents.manifest["encoder_hash"], latents.manifest["decoder_hash"])


def _from_file(path: Path, rows: int | None) -> Chosen:
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            name = next((n for n in ("mean", "latents") if n in names), None)
            if name is None:
                held = ", ".join(sorted(names)) or "nothing"
                raise ConfigError("latents", str(path), f"holds {held}; give a file with a tensor `mean` or `latents` (N, c, h, w)")
            shape = tuple(file.get_slice(name).get_shape())
            if len(shape) != 4 or 0 in shape:
                raise ConfigError("latents", str(path), f"{name} has shape {shape}; give (N, c, h, w), with N at least 1")
            wanted = spread(shape[0], rows or shape[0]).tolist()
            mean = torch.cat([file.get_slice(name)[row : row + 1] for row in wanted]).float()
            ids = file.get_tensor("id")[wanted].tolist() if "id" in names else wanted
    except (OSError, SafetensorError) as error:
        raise ConfigError("latents", str(path), f"cannot be read as safetensors ({error}); give a whole file") from error
    finite = mean.isfinite().flatten(1).all(1)
    if not finite.all():
        row = wanted[int(torch.nonzero(~finite)[0])]
        raise ConfigError("latents", str(path), f"{name} of row {row} is not finite; encode it again")
    return Chosen([(mean, ids)], metadata.get("encoder_hash"), None)
