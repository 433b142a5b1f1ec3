"""Training with equivariance regularisation: one step against written-out terms, the account untouched, two processes as one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from autoencoder.config import TrainAutoencoderConfig
from autoencoder.data.pixels import to_images
from autoencoder.data.sources import open_train_and_validation
from autoencoder.equivariance import Transformation, transform
from autoencoder.runtime import cli
from autoencoder.task import AutoencoderTask
from autoencoder.training import build_module
from tests.children import SMALL, run
from tests.gradients import launch
from tests.test_processes import ARGV

EQUIVARIANT = ["--objective.equivariance.share=0.5", "--objective.equivariance.weight=3"]


def task_of(folder: Path, *argv: str) -> AutoencoderTask:
    config = cli.parse(TrainAutoencoderConfig, [*SMALL, *argv, "--out", str(folder)], prog="x", description="x", stage="autoencoder")
    return AutoencoderTask(config, build_module(config), *open_train_and_validation(config.data), Accelerator(cpu=True), folder)


@pytest.mark.parametrize("convention", ["elbo", "diffusers"])
def test_the_loss_gains_the_transformed_distortion_and_the_account_stays(tmp_path: Path, convention: str) -> None:
    plain = task_of(tmp_path, f"--objective.convention={convention}")
    task = task_of(tmp_path, f"--objective.convention={convention}", *EQUIVARIANT)
    step, batches = next(iter(task.loader(3)))
    batch = batches[0]
    assert task.equivariance is not None and batch.transformed is not None and batch.transformed.shape[1] == 4
    terms = task.losses(task.module, batch, 24)
    without = plain.losses(plain.module, next(iter(plain.loader(3)))[1][0], 24)
    for name, value in without.named.items():
        assert torch.equal(value, terms.named[name]), name

    how = Transformation(batch.transformed[0], batch.transformed[1], task.equivariance.side(step))
    images = to_images(batch.pixels)
    output = task.module(images, batch.noise, how)
    error = (transform(images, how, factor=2) - output.transformed).flatten(1)
    charged = error.square().sum(1)
    if convention == "elbo":
        charged = -torch.distributions.Laplace(0.0, task.scale.value).log_prob(error).sum(1)
    expected = without.loss.clone()
    expected[how.rows] += 3 * charged
    torch.testing.assert_close(terms.loss, expected)
    rows = torch.zeros(8).index_add(0, how.rows, error.abs().mean(1))
    torch.testing.assert_close(terms.named["equivariance"].mean(), rows.sum() / 4)
    torch.testing.assert_close(sum(terms.parts.values()), terms.loss)


def test_off_is_the_run_without_it_and_on_changes_what_is_logged_only_by_its_own_name(tmp_path: Path) -> None:
    short = [*SMALL, "--train.images=24"]
    assert run([*short, "--out", str(tmp_path / "off")]) == 0
    (tmp_path / "on.yaml").write_text("objective: {equivariance: {share: 0.5, weight: 3}}")
    argv = [f"--config={tmp_path / 'on.yaml'}", *short, "--objective.equivariance.share=0"]
    assert run([*argv, "--out", str(tmp_path / "zero")]) == 0
    assert run([*short, *EQUIVARIANT, "--out", str(tmp_path / "on")]) == 0
    off, zero, on = (_lines(tmp_path / name) for name in ("off", "zero", "on"))
    assert off == zero
    assert on[0].keys() - off[0].keys() == {"equivariance"}
    # The first step's account is of the same weights on the same images.
    assert {k: on[0][k] for k in ("nll_nats", "kl_nats", "elbo_nats", "scale_moment")} == {
        k: off[0][k] for k in ("nll_nats", "kl_nats", "elbo_nats", "scale_moment")
    }


def _lines(folder: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in read]


def test_two_processes_and_microbatches_have_the_gradients_of_one(tmp_path: Path) -> None:
    argv = [*ARGV, *EQUIVARIANT]
    launch(tmp_path / "one", 1, [a for a in argv if "microbatch" not in a])
    launch(tmp_path / "two", 2, argv)
    single, double = (load_file(tmp_path / name / "gradients.safetensors") for name in ("one", "two"))
    assert single.keys() == double.keys()
    for step in {key.split("/")[0] for key in single}:
        keys = [key for key in single if key.startswith(f"{step}/")]
        difference = torch.cat([(single[k] - double[k]).flatten() for k in keys]).norm()
        assert difference <= 1e-5 * torch.cat([single[k].flatten() for k in keys]).norm()
