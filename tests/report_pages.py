"""Folders of runs for the report's tests, and its page taken apart."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
import yaml

from autoencoder.report.page import render
from autoencoder.report.pictures import grid, plain_grid, side_by_side
from autoencoder.report.runs import read_runs

VOID = {"meta", "link", "img", "input", "br"}
TRAIN: list[dict[str, Any]] = [
    {"step": s, "images": 64 * s, "phase": "train", "nll_nats": -100.0 * s, "kl_nats": 10.0 * s, "elbo_nats": 90.0 * s, "loss": -95.0 * s,
     "perceptual": 0.5 / s, "lr": 1e-3 / s, "gradient_norm": 3.0 / s, "images_per_second": 32.0, "kl_weight": 0.125 * s}
    for s in range(1, 9)
]  # fmt: skip
VALIDATION: list[dict[str, Any]] = [
    {"step": s, "images": 64 * s, "phase": "validation", "nll_nats": -97.25 * s, "kl_nats": 9.5 * s, "elbo_nats": 87.75 * s,
     "psnr_db": 20 + s / 3, "ssim": 0.1 * s, "active_channels": 2}
    for s in (4, 8)
]  # fmt: skip
BRIEF = [{"step": 8, "images": 512, "phase": "validation", "psnr_db": 22.5, "kl_nats": 76.0}]
LINES = [*TRAIN[:4], VALIDATION[0], *TRAIN[4:], VALIDATION[1]]
CONFIG: dict[str, Any] = {"out": "runs/x", "data": {"source": "demo", "resolution": 32}, "train": {"images": 512, "seed": 0}}
EVALUATION: dict[str, Any] = {
    "metrics": {
        "psnr_db": {"mean": 26.125, "low": 24.5, "high": 27.75, "unit": "dB"},
        "kl_nats": {"mean": 1401.5, "low": 1, "high": 2000, "unit": "nats"},
    },
    "channels": [{"kl_nats": 1400.25, "active": True}, {"kl_nats": 1.25, "active": False}],
    "photos": [
        {"id": "coffee", "crops": 4, "psnr_db": 25.5, "kl_nats": 400.5},
        {"id": "rocket", "crops": 4, "psnr_db": 26.75, "kl_nats": 380.0},
    ],
    "provenance": {"seed": 7, "data": {"source": "demo", "fingerprint": "77ab"}, "lpips": None},
}
DIFFUSION_LINES: list[dict[str, Any]] = [
    line
    for s in range(1, 9)
    for line in (
        {"step": s, "images": 32 * s, "phase": "train", "loss": 1 / s, "gradient_norm": 0.5, "lr": 1e-3, "images_per_second": 16.0},
        *([{"step": s, "images": 32 * s, "phase": "validation", "loss": 1.5 / s}] if s in (4, 8) else []),
    )
]
DIFFUSION_CONFIG: dict[str, Any] = {
    "latents": "runs/latents", "out": "runs/y", "data": {"draw": "sample"}, "denoiser": {"preset": "tiny"},
    "process": {"t_mean": 0.0, "t_std": 1.0}, "sampling": {"sampler": "heun", "steps": 20, "guidance": 1.5}, "train": {"images": 256},
}  # fmt: skip
DIFFUSION_EVALUATION: dict[str, Any] = {
    "metrics": {
        key: {"mean": value, "low": None, "high": None, "unit": ""}
        for key, value in {"loss": 0.1875, "frechet": 3.125, "frechet_floor": 1.875, "frechet_untrained": 412.25}.items()
    },
    "frechet_on": "Distance of 64 samples.",
    "noise_levels": [{"t": t, "loss": loss} for t, loss in ((0.1, 0.9), (0.4, 0.5), (0.6, 0.45), (0.9, 0.7))],
    "classes": ["astronaut", "retina"],
    "provenance": {"encoder_hash": "e1", "notes": [], "latents": {"rows": 640}},
}
LATENTS: dict[str, Any] = {
    "encoder_hash": "e1", "decoder_hash": "d1", "rows_hash": "r1", "shape": [2, 4, 4], "mean": [0.125, -2.5], "std": [0.75, 1.25],
    "rows": 640, "labels": ["astronaut", "retina"],
}  # fmt: skip
HOSTILE = "<img src=x onerror=alert(1)> & \"q\" 'a' $\\frac{1}{0}$ {{ 7 * 7 }} {% raw %}"


class Page(HTMLParser):
    """A page taken apart: text, attributes, and whether every element that opens also closes in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.tiles: dict[str, str] = {}
        self.headings: list[tuple[int, str]] = []
        self._term = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        self.words.append(data)
        for level in range(1, 5):
            if f"h{level}" in self.open and data.strip():
                self.headings.append((level, data.strip()))
        if self.open and self.open[-1] == "dt":
            self._term = data
        elif self.open and self.elements[-1] == ("span", {"class": "value"}) and self.open[-1] == "span":
            self.tiles[self._term] = data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, name: str) -> list[str]:
        return [attrs[name] or "" for t, attrs in self.elements if t == tag and name in attrs]


def make_run(
    folder: Path,
    *,
    lines: list[dict[str, Any]] = LINES,
    config: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    pictures: bool = False,
) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | (config or {})))
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    if pictures:
        (folder / "images").mkdir()
        for step in (4, 8):
            grid(crops(6, seed=step), crops(6, seed=step + 1), columns=3).save(folder / "images" / f"step-{step:08d}.png")
        side_by_side(crops(1, side=40)[0], crops(1, side=40)[0]).save(folder / "images" / "photo-coffee.png")
    return folder


def make_diffusion_run(
    folder: Path,
    *,
    lines: list[dict[str, Any]] = DIFFUSION_LINES,
    config: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    latents: dict[str, Any] | None = LATENTS,
    pictures: bool = False,
) -> Path:
    make_run(folder, lines=lines, evaluation=evaluation)
    (folder / "config.yaml").write_text(yaml.safe_dump(DIFFUSION_CONFIG | (config or {})))
    if latents is not None:
        (folder / "latents.json").write_text(json.dumps(latents))
    if pictures:
        (folder / "images").mkdir()
        for step in (4, 8):
            plain_grid(crops(6, seed=step), columns=3).save(folder / "images" / f"step-{step:08d}.png")
        if evaluation is not None:
            grid(crops(4, seed=20), crops(4, seed=21), columns=4).save(folder / "images" / "neighbours.png")
    return folder


def crops(images: int, *, side: int = 8, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (images, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def page_of(*folders: Path) -> Page:
    return Page(render(read_runs(folders)))
