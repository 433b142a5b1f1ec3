"""What a run logs: lines that survive a crash and can be cut back, and trackers by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from autoencoder.runtime.errors import ConfigError
from autoencoder.runtime.tracking import MetricsFile, Trackers


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    values = {"step": 3, "phase": "train", "a": 0.1 + 0.2, "b": 1e-300, "c": math.pi, "d": 2.0**53}
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append(values)
    metrics.append(values)
    assert lines(metrics.path) == [values, values]


def test_non_finite_values_are_null_and_named(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"step": 1, "psnr_db": math.inf, "loss": math.nan, "kl_nats": 2.0})
    metrics.append({"step": 2, "loss": -math.inf, "nonfinite": ["gradient_norm"]})
    assert lines(metrics.path) == [
        {"step": 1, "psnr_db": None, "loss": None, "kl_nats": 2.0, "nonfinite": ["loss", "psnr_db"]},
        {"step": 2, "loss": None, "nonfinite": ["gradient_norm", "loss"]},
    ]


def test_lines_after_the_step_and_torn_ones_are_cut(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (5, 10, 10, 15):
        metrics.append({"step": step})
    with metrics.path.open("a") as file:
        file.write('{"step": 2')
    kept = metrics.path.read_text().splitlines(keepends=True)[:3]
    metrics.cut_back(10)
    assert metrics.path.read_text() == "".join(kept)
    metrics.append({"step": 11})
    assert [line["step"] for line in lines(metrics.path)] == [5, 10, 10, 11]
    metrics.cut_back(0)
    assert metrics.path.read_text() == ""
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_whole_line_without_its_newline_is_torn_too(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.path.write_text('{"step": 1}\n{"step": 2}')
    metrics.cut_back(2)
    assert lines(metrics.path) == [{"step": 1}]


def test_cutting_a_log_that_is_not_there_yet_makes_none(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").cut_back(3)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_shows_a_resumed_run_as_one_curve(tmp_path: Path) -> None:
    settings = {"train.images": "1k", "model.pretrained": None}
    for first, last, scale in ((1, 6, 1.0), (4, 8, 10.0)):
        trackers = Trackers(["tensorboard"], tmp_path, settings=settings, resume_step=first - 1)
        for step in range(first, last):
            trackers.log({"train/loss": scale * step}, step=step)
        trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60), (7, 70)]


def test_no_trackers_write_nothing(tmp_path: Path) -> None:
    trackers = Trackers([], tmp_path, settings={}, resume_step=0)
    trackers.log({"loss": 1.0}, step=1)
    trackers.close()
    assert list(tmp_path.iterdir()) == []


def test_unknown_and_missing_trackers_are_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"log\.trackers: got 'tensorbord'; which accelerate does not know; give names among tensorboard"):
        Trackers(["tensorbord"], tmp_path, settings={}, resume_step=0)
    with pytest.raises(ConfigError, match=r"log\.trackers: got 'comet_ml'; which is not installed \(pip install comet-ml\)"):
        Trackers(["tensorboard", "comet_ml"], tmp_path, settings={}, resume_step=0)
    assert list(tmp_path.iterdir()) == []
