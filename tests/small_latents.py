"""Small data sets of latents: encoded from photos of noise by untrained autoencoders, or written by hand."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from autoencoder import artifact, encode, model
from autoencoder.config import DataConfig, ModelConfig
from autoencoder.latents.reader import FORMAT, VERSION, manifest_digest

CLASSES = ("cat", "dog")


def write_photos(folder: Path, each: int = 30) -> Path:
    """Class folders of 16-pixel images, `each` of them in a class: coarse noise, dark or bright."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            coarse = rng.integers(100 * label, 100 * label + 128, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC).save(folder / name / f"{i:02d}.png")
    return folder


def write_vae(folder: Path, *, seed: int, decoder_seed: int | None = None) -> Path:
    """An untrained autoencoder for 16-pixel images; of two with one `seed` the encoders are the same."""
    config = ModelConfig(preset="tiny", block_out_channels=(8, 8), norm_groups=4)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    vae = model.build(config, channels=3, resolution=16)
    if decoder_seed is not None:
        torch.manual_seed(decoder_seed)
        vae.decoder.load_state_dict(model.build(config, channels=3, resolution=16).decoder.state_dict())
    artifact.save_autoencoder(vae, folder, preprocessing=artifact.preprocessing(DataConfig(resolution=16), 256), likelihood=None)
    return folder


def encode_photos(vae: Path, photos: Path, out: Path, *extra: str) -> Path:
    """The latents that `encode_dataset` makes, in two shards."""
    argv = ["--model", str(vae), "--data.source", str(photos), "--data.workers=0", "--precision=fp32", "--shard_rows=32"]
    assert encode.main([*argv, *extra, "--out", str(out)]) == 0
    return out


@dataclass(frozen=True)
class Data:
    """Photos, autoencoders and latents: `other` has another encoder than `vae`, `finer` another decoder alone."""

    photos: Path
    vae: Path
    other: Path
    finer: Path
    latents: Path
    other_latents: Path


def write_data(root: Path) -> Data:
    """All of `Data` under `root`."""
    photos, vae, other = write_photos(root / "photos"), write_vae(root / "vae", seed=0), write_vae(root / "other", seed=1)
    finer = write_vae(root / "finer", seed=0, decoder_seed=2)
    return Data(
        photos, vae, other, finer, encode_photos(vae, photos, root / "latents"), encode_photos(other, photos, root / "other_latents")
    )


def write_latents(
    folder: Path,
    vae: Path,
    mean: np.ndarray,
    *,
    label: np.ndarray | None = None,
    labels: list[str] | None = None,
    id: np.ndarray | None = None,
    rows_per_image: int = 1,
    logvar: np.ndarray | None = None,
) -> Path:
    """A finished data set of these rows (N, c, h, w), one shard, with the autoencoder `vae` beside them."""
    folder.mkdir(parents=True)
    shutil.copytree(vae, folder / "vae")
    rows = len(mean)
    tensors = {
        "mean": mean.astype(np.float32),
        "logvar": np.full(mean.shape, -2.0, np.float32) if logvar is None else logvar.astype(np.float32),
        "label": np.full(rows, -1) if label is None else label,
        "id": np.arange(rows) if id is None else id,
    }
    total = mean.var((0, 2, 3)) + np.exp(tensors["logvar"]).mean((0, 2, 3))
    hashes = json.loads((vae / artifact.PREPROCESSING).read_text())
    manifest: dict[str, Any] = {
        "format": FORMAT, "version": VERSION, "dtype": "fp32",
        "contents": ["mean", "logvar"], "rows_per_image": rows_per_image, "labels": labels,
        "statistics": {"mean": mean.mean((0, 2, 3)).tolist(), "std": np.sqrt(total).tolist()},
        "encoder_hash": hashes["encoder_hash"], "decoder_hash": hashes["decoder_hash"], "recipe_hash": "by hand", "rows_hash": "by hand",
        "segments": [{"source": {"name": "numbers", "fingerprint": "", "images": rows}, "first_image": 0, "images": rows}],
        "bad": [], "shards": [{"file": "data-00000.safetensors"}],
    }  # fmt: skip
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "data-00000.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    sign(folder)
    return folder


def rewrite(folder: Path, shard: int, **tensors: np.ndarray) -> None:
    """Replace tensors of a shard, with a manifest that fits."""
    file = folder / f"data-{shard:05d}.safetensors"
    save_file({**load_file(file), **{name: np.ascontiguousarray(value) for name, value in tensors.items()}}, file)
    sign(folder)


def add_shard(folder: Path, mean: np.ndarray, *, id: np.ndarray, label: int = -1) -> None:
    """Another shard with these rows (N, c, h, w), of whatever shape."""
    manifest = json.loads((folder / "manifest.json").read_text())
    file = f"data-{len(manifest['shards']):05d}.safetensors"
    logvar, labels = np.full(mean.shape, -2.0, np.float32), np.full(len(mean), label)
    save_file({"mean": mean.astype(np.float32), "logvar": logvar, "label": labels, "id": id}, folder / file)
    sign(folder, shards=[*manifest["shards"], {"file": file}])


def sign(folder: Path, **told: Any) -> None:
    """Give the manifest the shards' sizes, shapes and digests, the entries `told`, and its own digest."""
    manifest = {**json.loads((folder / "manifest.json").read_text()), **told}
    for entry in manifest["shards"]:
        content = (folder / entry["file"]).read_bytes()
        rows, *shape = load_file(folder / entry["file"])["mean"].shape
        entry.update(rows=rows, shape=shape, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    manifest["rows"] = sum(entry["rows"] for entry in manifest["shards"])
    manifest["shapes"] = [list(shape) for shape in dict.fromkeys(tuple(entry["shape"]) for entry in manifest["shards"])]
    manifest["sha256"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
