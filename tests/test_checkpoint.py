"""Checkpoints: complete or refused, pruned, and free of pickle."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from autoencoder.runtime import checkpoint
from autoencoder.runtime.errors import UsageError
from autoencoder.runtime.meters import LossScale, Meters


def held(seed: int = 0) -> dict[str, checkpoint.HasTensors]:
    torch.manual_seed(seed)
    return {"model": checkpoint.ModuleTensors(nn.Linear(3, 2))}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    saved, loaded = held(0), held(1)
    checkpoint.save(tmp_path / "step-00000001", saved, {"step": 1})
    assert checkpoint.load(tmp_path / "step-00000001", loaded) == {"step": 1}
    assert all(torch.equal(v, loaded["model"].tensors()[k]) for k, v in saved["model"].tensors().items())
    names = {p.name for p in (tmp_path / "step-00000001").iterdir()}
    assert names == {"model.safetensors", "state.json", "complete"}


def test_without_its_marker_a_checkpoint_is_refused_and_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    checkpoint.save(folder, held(), {"step": 1})
    (folder / "complete").unlink()
    with pytest.raises(UsageError, match="complete"):
        checkpoint.load(folder, held())
    checkpoint.save(folder, held(), {"step": 1})
    assert checkpoint.load(folder, held()) == {"step": 1}


def test_a_crash_before_the_rename_leaves_the_previous_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "step-00000001", held(), {"step": 1})

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "step-00000002", held(), {"step": 2})
    assert not (tmp_path / "step-00000002").exists()
    assert checkpoint.load(tmp_path / "step-00000001", held()) == {"step": 1}


def test_other_shapes_and_missing_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    checkpoint.save(folder, held(), {"step": 1})
    with pytest.raises(UsageError, match=r"model\.safetensors.*size mismatch|model\.safetensors"):
        checkpoint.load(folder, {"model": checkpoint.ModuleTensors(nn.Linear(4, 2))})
    with pytest.raises(UsageError, match=r"ema\.safetensors"):
        checkpoint.load(folder, {**held(), "ema": checkpoint.ModuleTensors(nn.Linear(3, 2))})


def test_pruning_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path / checkpoint.step_folder(step), held(), {"step": step})
    (tmp_path / "step-00000004" / "complete").unlink()
    (tmp_path / ".step-00000005.partial").mkdir()
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003", "step-00000004"]
    assert json.loads((tmp_path / "step-00000003" / "state.json").read_text()) == {"step": 3}


def test_meters_mean_over_images_and_name_what_was_not_finite() -> None:
    meters = Meters(torch.device("cpu"))
    assert meters.add({"nll": torch.tensor(2.0), "kl": torch.tensor(1.0)}, 4) == 0
    assert meters.add({"nll": torch.tensor(5.0), "kl": torch.tensor(4.0)}, 2) == 0
    assert meters.add({"nll": torch.tensor(torch.inf), "kl": torch.tensor(9.0)}, 4) == 1
    means, nonfinite = meters.read()
    assert means == {"nll": 3.0, "kl": 2.0, "skipped_steps": 1.0}
    assert nonfinite == ["nll"]
    meters.add({"nll": torch.tensor(7.0), "kl": torch.tensor(1.0)}, 1)
    assert meters.read() == ({"nll": 7.0, "kl": 1.0}, [])


def test_the_loss_scale_halves_at_an_overflow_and_doubles_after_good_steps() -> None:
    scale = LossScale(torch.device("cpu"), enabled=True, initial=8.0, patience=3)
    for found in (1, 0, 0, 0, 0):
        scale.update(torch.tensor(float(found)))
    assert scale.value == 8.0
    still = LossScale(torch.device("cpu"), enabled=False)
    still.update(torch.ones(()))
    assert still.value == 1.0
