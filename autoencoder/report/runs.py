"""A run's folder, of either stage, as the report sees it. Whatever a run has not written yet is simply empty here."""

import fcntl
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from autoencoder.report.stages import AUTOENCODER, DIFFUSION, Stage
from autoencoder.runtime.config import count
from autoencoder.runtime.errors import UsageError

_OF_AN_ACCOUNT = {"nll_nats", "standard_normal", "learned", "saved_nats", "crops", "images", "labelled"}


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    folder: Path
    name: str
    stage: Stage
    status: str
    """`finished`, `running` (some process holds the run's lock) or `stopped`."""
    lines: list[dict[str, Any]]
    """The objects of `metrics.jsonl`, in order."""
    config_text: str
    config: dict[str, Any]
    """The configuration by dotted key."""
    evaluation: dict[str, Any]
    """`evaluation.json`."""
    bad_images: list[tuple[str, str]]
    """(id, reason) of each image that could not be read."""
    grids: list[tuple[int, Path]]
    """(step, picture) of each grid, in order of steps."""
    photos: list[Path]
    """Pictures of whole held-out photos beside their reconstructions."""
    neighbours: Path | None
    """Picture of samples above their nearest training latents."""
    latents: dict[str, Any]
    """`latents.json`: identity and normalisation of the latents that a diffusion run is trained on."""
    account: dict[str, Any]
    """The account in `account.json`, which `evaluate_autoencoder --pipeline RUN --out RUN/account.json` wrote."""

    @property
    def images(self) -> int:
        """Training images seen."""
        return max((line["images"] for line in self.lines), default=0)

    @property
    def seconds(self) -> float:
        """Time spent training, without validation: each line's images over its `images_per_second`."""
        total, before = 0.0, 0
        for line in self.lines:
            if line["phase"] == "train" and line.get("images_per_second"):
                total += (line["images"] - before) / line["images_per_second"]
                before = line["images"]
        return total

    @property
    def classes(self) -> list[str]:
        """Names of the classes that a diffusion run is told; empty for a run without."""
        return [str(name) for name in self.evaluation.get("classes") or self.latents.get("labels") or []]

    def series(self, phase: str, key: str) -> tuple[list[int], list[float]]:
        """Images seen and values of the lines of `phase` that have `key`; a value that was not finite is NaN."""
        lines = [line for line in self.lines if line["phase"] == phase and key in line]
        return [line["images"] for line in lines], [math.nan if line[key] is None else float(line[key]) for line in lines]

    def validated(self, step: int) -> dict[str, Any]:
        """The validation line of `step`, or an empty one."""
        return next((line for line in self.lines if line["phase"] == "validation" and line["step"] == step), {})


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read each folder once; names are as short as they can be while they tell the runs apart.

    Raises `UsageError` for a folder that is missing or holds no run, or for a file in it that cannot be read.
    """
    resolved = list(dict.fromkeys(folder.resolve() for folder in folders))
    parts = 1
    while len({folder.parts[-parts:] for folder in resolved}) < len(resolved):
        parts += 1
    return [_read(folder, "/".join(folder.parts[-parts:])) for folder in resolved]


def _read(folder: Path, name: str) -> Run:
    if not (folder / "metrics.jsonl").is_file():
        lacking = "holds no metrics.jsonl, so it is no run" if folder.is_dir() else "no such folder"
        raise UsageError(f"{folder}: {lacking}; give the folder of a run (the --out of a training command)")
    config_text = _text(folder / "config.yaml")
    try:
        settings = yaml.safe_load(config_text) or {}
        config = flatten(settings)
    except (yaml.YAMLError, AttributeError) as error:
        raise UsageError(f"{folder / 'config.yaml'}: not a YAML mapping ({error}); restore it or leave this run out") from None
    blank: dict[str, Any] = {"phase": "train", "images": 0, "step": 0}
    lines = [blank | line for line in _json_lines(folder / "metrics.jsonl")]
    grids = [(int(match[1]), path) for path in folder.glob("images/step-*.png") if (match := re.fullmatch(r"step-(\d+)", path.stem))]
    neighbours = folder / "images" / "neighbours.png"
    return Run(
        folder=folder,
        name=name,
        stage=DIFFUSION if "latents" in settings else AUTOENCODER,
        status=_status(folder, max((line["images"] for line in lines), default=0), count(config.get("train.images", 0), "train.images")),
        lines=lines,
        config_text=config_text,
        config=config,
        evaluation=_json_object(folder / "evaluation.json"),
        bad_images=[(str(bad.get("id")), str(bad.get("reason"))) for bad in _json_lines(folder / "bad_images.jsonl")],
        grids=sorted(grids),
        photos=sorted(folder.glob("images/photo-*.png")),
        neighbours=neighbours if neighbours.is_file() else None,
        latents=_json_object(folder / "latents.json"),
        account=_account(folder / "account.json"),
    )


def _account(path: Path) -> dict[str, Any]:
    told = _json_object(path)
    account = told.get("account", {})
    if told and not (isinstance(account, dict) and account.keys() >= _OF_AN_ACCOUNT):
        raise UsageError(f"{path}: holds no account; write it by `evaluate_autoencoder --pipeline {path.parent} --out {path}` or remove it")
    return dict(account)


def flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _status(folder: Path, images: int, wanted: int) -> str:
    # Not by `finished.json`: the run's own report is written before it.
    if images >= wanted and (folder / "evaluation.json").is_file():
        return "finished"
    return "running" if _locked(folder / ".lock") else "stopped"


def _locked(path: Path) -> bool:
    """Whether a process holds the lock; asked for with a shared lock, dropped at once."""
    if not path.is_file():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); restore it or leave this run out") from None


def _json_object(path: Path) -> dict[str, Any]:
    text = _text(path)
    return _parse(text, path) if text else {}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The file's objects; a last line that a crash or a writer at work left unended does not count."""
    *complete, _ = _text(path).split("\n")
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(complete, 1) if line.strip()]


def _parse(text: str, where: object) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not JSON ({error}); mend it or leave this run out") from None
    if not isinstance(value, dict):
        raise UsageError(f"{where}: got {type(value).__name__}, where an object belongs; mend it or leave this run out")
    return value
