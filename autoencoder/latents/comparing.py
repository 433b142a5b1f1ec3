"""Rows of latents against the images that they are of: crops cut again, decoded and encoded."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoencoder.config import DataConfig
from autoencoder.data.order import spread
from autoencoder.data.pixels import to_images
from autoencoder.data.sources import Record, Source, open_images
from autoencoder.latents.check import PLAN
from autoencoder.latents.crops import CropBatches
from autoencoder.latents.peculiarities import TYPES, far_off, rounded
from autoencoder.latents.plan import Plan
from autoencoder.latents.reader import Latents, Rows
from autoencoder.latents.segments import PlannedImages, find
from autoencoder.metrics import psnr
from autoencoder.model import AutoencoderKL, decode, decoded_at_once, downsampling, encode
from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.runtime.errors import ConfigError, UsageError
from autoencoder.runtime.own_class import OwnClass
from autoencoder.verify_latents import VerifyDataConfig

FAR_BELOW_DB = 3.0
"""A row whose PSNR is robustly far below the others' is named from so much below the median on."""
ANOTHER_LATENT = 0.5
"""Root mean square distance, in standard deviations of the means over the data set, from which a row is not the latent of its image:
those of two images are 1.4 apart, other hardware and precisions of the encoder stay below a tenth."""


@dataclass(frozen=True)
class Compared:
    """Rows beside their images, (n,) each."""

    id: np.ndarray
    name: list[str]
    psnr: np.ndarray
    """dB of the decoded mean to the image, as evaluations have it."""
    distance: np.ndarray
    """Root mean square of (stored mean - mean of the image encoded again) / standard deviation of the means over the data set."""
    label: np.ndarray
    source_label: np.ndarray
    rounding: dict[str, np.ndarray]
    """By storage type narrower than what is stored: PSNR in dB of the decoded rounded mean to the decoded mean, infinite where equal."""
    unreadable: list[str]
    """Images that can be read no more."""

    @property
    def low(self) -> list[int]:
        """Places whose PSNR is far below the others'."""
        below = np.median(self.psnr) - self.psnr if len(self.psnr) else np.empty(0)
        return np.flatnonzero((far_off(self.psnr) < 0) & (below > FAR_BELOW_DB)).tolist()

    @property
    def others(self) -> list[int]:
        """Places of rows that are not the latents of their images."""
        return np.flatnonzero((self.distance > ANOTHER_LATENT) | (self.label != self.source_label)).tolist()


class Joined:
    """The images of a plan, of each segment from the source that has it."""

    in_memory = False

    def __init__(self, plan: Plan, segments: dict[int, PlannedImages]) -> None:
        self._firsts = np.array([segment.first_image for segment in plan.segments])
        self._segments, self._length = [segments[k] for k in range(len(plan.segments))], plan.images
        self.name, self.labels = ", ".join(dict.fromkeys(s.name for s in self._segments)), plan.labels
        self.fingerprint = plan.rows_hash

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Record:
        return self._segments[int(np.searchsorted(self._firsts, index, side="right")) - 1].read(index)


@dataclass(frozen=True)
class Originals:
    """What rows are compared with."""

    plan: Plan
    data: DataConfig
    images: Joined


def open_originals(folder: Path, given: VerifyDataConfig) -> Originals:
    """The images that the latents in a folder are of; UsageError where they are not there or are others."""
    try:
        plan = Plan.from_json(json.loads((folder / PLAN).read_text(encoding="utf-8"))).with_buckets(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("latents", str(folder), f"its {PLAN} cannot be read ({error!r}), so its crops are not known") from error
    data = _data(plan, given)
    return Originals(plan, data, _open(folder, plan, data, given))


@torch.inference_mode()
def compare(latents: Latents, vae: AutoencoderKL, rows: int, originals: Originals) -> Compared:
    """Compare about `rows` rows, evenly spread over each shape."""
    plan, recipe = originals.plan, PixelRecipe.from_json(originals.plan.recipe["pixels"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = vae.to(device).eval()
    dtypes = [name for name in TYPES if TYPES[name][0] < TYPES[latents.manifest["dtype"]][0]]
    found: dict[str, list[Any]] = {key: [] for key in ("id", "name", "psnr", "distance", "label", "source_label", "unreadable", *dtypes)}
    for shape in latents.shapes:
        one = latents.of_shape(shape) if len(latents.shapes) > 1 else latents
        places = spread(len(one), max(1, round(rows * len(one) / len(latents))))
        crops = CropBatches(originals.images, plan, originals.data, [range(id, id + 1) for id in one.gather(places).id.tolist()])
        at_once = decoded_at_once(max(shape[1:]) * downsampling(vae))
        for first in range(0, len(places), at_once):
            batches = [crops[n] for n in range(first, min(first + at_once, len(places)))]
            whole = [n for n, batch in enumerate(batches) if batch.weight.item() > 0]
            found["unreadable"] += [name for batch in batches for name, _ in batch.bad]
            if not whole:
                continue
            read = one.gather(places[first : first + at_once][whole])
            kept = [batches[n].to(device) for n in whole]
            images = torch.cat([to_images(batch.pixels, recipe, batch.valid) for batch in kept])
            valid = torch.cat([batch.valid for batch in kept if batch.valid is not None]) if recipe.may_miss else None
            decoded = decode(vae, torch.from_numpy(read.mean).to(device))
            found["psnr"] += psnr(images, decoded, eight_bit=recipe.eight_bit, valid=valid).tolist()
            found["distance"] += _distance(vae, images, read, latents.manifest["statistics"]).tolist()
            for name in dtypes:
                again = decode(vae, torch.from_numpy(rounded(read.mean, name)).to(device))
                found[name] += psnr(decoded, again, eight_bit=False).tolist()
            found["id"] += read.id.tolist()
            found["name"] += [batch.ids[0] for batch in kept]
            found["label"] += read.label.tolist()
            found["source_label"] += [int(batch.labels) for batch in kept]
    arrays = {key: np.array(found[key]) for key in ("id", "psnr", "distance", "label", "source_label")}
    rounding = {name: np.array(found[name]) for name in dtypes}
    return Compared(name=found["name"], unreadable=found["unreadable"], rounding=rounding, **arrays)


def _distance(vae: AutoencoderKL, images: torch.Tensor, read: Rows, statistics: dict[str, Any]) -> np.ndarray:
    """Of each row, in standard deviations of its channels' means."""
    variance = np.square(statistics["std"]) - np.array(statistics.get("posterior_variance") or 0.0)
    std = np.sqrt(np.maximum(variance, np.finfo(np.float32).tiny)).astype(np.float32)[:, None, None]
    off = (read.mean - encode(vae, images).mean.float().cpu().numpy()) / std
    distance: np.ndarray = np.sqrt(np.square(off).mean((1, 2, 3)))
    return distance


def _data(plan: Plan, given: VerifyDataConfig) -> DataConfig:
    """The settings that the crops were cut with."""
    names = ("split", "resolution", "resize", "filter", "crop", "image_column", "label_column")
    settings = {name: plan.recipe["data"][name] for name in names}
    zoom = tuple(plan.recipe["data"]["zoom"])
    pixels = PixelRecipe.from_json(plan.recipe["pixels"]).data_settings()
    return DataConfig(source=given.source or "demo", own=given.own, zoom=zoom, flip=False, **settings, **pixels)


def _open(folder: Path, plan: Plan, data: DataConfig, given: VerifyDataConfig) -> Joined:
    """The images of every segment; ConfigError where they are others than those that were encoded."""
    asked = open_images(data, split=data.split) if given.own.given or given.source is not None else None
    segments: dict[int, PlannedImages] = {}
    for k, segment in enumerate(plan.segments):
        if k in segments:
            continue
        source, found = asked, {} if asked is None else find(asked, segment.source, plan, folder).segments
        # A segment has to be of what was asked for; others are where they were.
        if source is None or (found and k not in found):
            source = _reopen(segment.source, data)
            found = find(source, segment.source, plan, folder).segments
        if k not in found:
            remedy = "their names or sizes have changed since they were encoded; give the images that were, by --data.source"
            raise ConfigError("data.source", source.name, f"other images than those of the latents ({segment.source['name']}): {remedy}")
        planned = PlannedImages(source, plan, found)
        segments |= {n: planned for n in found if n not in segments}
    return Joined(plan, segments)


def _reopen(told: dict[str, Any], data: DataConfig) -> Source:
    """A segment's images where they were when they were encoded."""
    settings = {**vars(data), "own": OwnClass(**told.get("own", {}))}
    name = told["name"].removesuffix(f" ({data.split})")
    # A source with splits is called by the folder of the split.
    places = [os.path.dirname(name), name] if os.path.basename(name) == data.split else [name]
    error: UsageError | None = None
    for place in places:
        try:
            source = open_images(DataConfig(**{**settings, "source": place}), split=data.split)
        except UsageError as found:
            error = found
            continue
        if source.fingerprint == told["fingerprint"] or place is places[-1]:
            return source
    raise ConfigError("data.source", None, f"the images ({told['name']}) are not where they were ({error}); give --data.source")


def summary(compared: Compared) -> dict[str, Any]:
    """What is written down of it."""

    def listed(places: list[int]) -> list[dict[str, Any]]:
        return [
            {
                "id": int(compared.id[n]), "name": compared.name[n], "psnr_db": round(float(compared.psnr[n]), 3),
                "distance": round(float(compared.distance[n]), 6), "label": int(compared.label[n]),
                "source_label": int(compared.source_label[n]),
            }
            for n in places
        ]  # fmt: skip

    finite = {name: values[np.isfinite(values)] for name, values in compared.rounding.items()}
    return {
        "rows": len(compared.id),
        "psnr_db": {"mean": _plain(compared.psnr.mean()), "least": _plain(compared.psnr.min())} if len(compared.id) else None,
        "distance": {"mean": _plain(compared.distance.mean()), "most": _plain(compared.distance.max())} if len(compared.id) else None,
        "far_below": listed(compared.low),
        "others": listed(compared.others),
        "unreadable": compared.unreadable,
        "rounding_psnr_db": {name: _plain(values.mean()) if len(values) else None for name, values in finite.items()},
    }


def _plain(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
