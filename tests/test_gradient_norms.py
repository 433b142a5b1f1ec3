"""Gradient norms of single terms: against written-out gradients, over any split, and without a trace in the run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from autoencoder.runtime.gradient_norms import term_gradient_norms
from tests.children import SMALL, run


def batch(rows: torch.Tensor, weight: torch.Tensor | None = None) -> Any:
    return SimpleNamespace(rows=rows, weight=torch.ones(len(rows)) if weight is None else weight)


def test_norms_are_those_of_each_terms_mean_over_any_split() -> None:
    torch.manual_seed(0)
    model, rows = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)

    def parts(given: Any) -> dict[str, torch.Tensor]:
        made = model(given.rows)
        return {"square": made.square().sum(1), "size": 0.5 * made.abs().sum(1), "constant": given.rows.sum(1)}

    parameters = list(model.parameters())
    whole = term_gradient_norms([batch(rows)], parts, parameters, images=5)
    made = model(rows)
    for name, loss in (("square", made.square().sum() / 5), ("size", 0.5 * made.abs().sum() / 5)):
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]).norm()
        torch.testing.assert_close(whole[name], expected)
    assert whole["constant"] == 0
    padded = batch(torch.cat([rows[2:], torch.full((1, 3), 9.0, dtype=torch.float64)]), torch.tensor([1.0, 1, 1, 0]))
    split = term_gradient_norms([batch(rows[:2]), padded], parts, parameters, images=5, scale=torch.tensor(1024.0))
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value)
    assert all(parameter.grad is None for parameter in parameters)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    argv = [
        *SMALL,
        "--train.images=45",
        "--train.microbatch=3",
        "--log.every_images=16",
        "--objective.perceptual.name=ssim",
        "--objective.perceptual.window=3",
        "--objective.equivariance.share=0.5",
        "--optimizer.clip_norm=null",
    ]
    assert run([*argv, "--out", str(folder / "plain")]) == 0
    assert run([*argv, "--log.gradient_norms=true", "--out", str(folder / "measured")]) == 0
    return folder / "plain", folder / "measured"


def test_measuring_them_leaves_the_runs_bits_alone(runs: tuple[Path, Path]) -> None:
    for name in ("model", "ema", "optimizer", "controllers"):
        one, other = (load_file(folder / "checkpoints" / "step-00000006" / f"{name}.safetensors") for folder in runs)
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_every_training_line_has_every_term_and_no_other_line_has_any(runs: tuple[Path, Path]) -> None:
    terms = {f"gradient_norm_{name}" for name in ("nll", "kl", "perceptual", "equivariance")}
    for line in lines(runs[1]):
        found = {key for key in line if key.startswith("gradient_norm_")}
        assert found == (terms if line["phase"] == "train" else set())
        assert all(line[key] > 0 for key in found)
    assert not any(key.startswith("gradient_norm_") for line in lines(runs[0]) for key in line)


def test_norms_obey_the_triangle_inequality_with_the_whole_gradients(tmp_path: Path) -> None:
    argv = [*SMALL, "--train.images=24", "--log.every_images=8", "--optimizer.clip_norm=null", "--log.gradient_norms=true"]
    assert run([*argv, "--out", str(tmp_path / "run")]) == 0
    for line in lines(tmp_path / "run"):
        if line["phase"] == "train":
            nll, kl = line["gradient_norm_nll"], line["gradient_norm_kl"]
            assert abs(nll - kl) * (1 - 1e-5) <= line["gradient_norm"] <= (nll + kl) * (1 + 1e-5)
