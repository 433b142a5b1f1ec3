"""Two processes train the diffusion model that one trains: gradients, weights, average and validation do not depend on the split."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.children import together
from tests.diffusion_children import LENGTHS, SMALL_DIFFUSION, gradients, run
from tests.small_latents import encode_photos, write_photos, write_vae

# Three steps of nine rows, in shares of four and five and microbatches of one and two; at the last step of one row a process has none.
STEPS, LAST = 4, "step-00000004"
ARGV = [
    *SMALL_DIFFUSION, "--train.batch_size=9", "--train.images=28", "--train.microbatch=2", "--log.validate_every_images=16",
    "--process.weight=min_snr", "--optimizer.clip_norm=null", "--optimizer.lr=0.1", "--optimizer.warmup_images=0", *LENGTHS,
]  # fmt: skip


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """From trained weights: at the published start all gradients but the last layers' are zero."""
    folder = tmp_path_factory.mktemp("data")
    latents = encode_photos(write_vae(folder / "vae", seed=0), write_photos(folder / "photos"), folder / "latents")
    small = [*SMALL_DIFFUSION, "--latents", str(latents), "--optimizer.lr=1e-2"]
    assert run([*small, "--out", str(folder / "begun")]) == 0
    return [*ARGV, "--latents", str(latents), "--init_from", str(folder / "begun")]


@pytest.fixture(scope="module")
def one(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    together(1, out / "console", gradients, 1, out, [*argv, "--out", str(out / "run")])
    return out


@pytest.fixture(scope="module")
def two(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    together(2, out / "console", gradients, 2, out, [*argv, "--out", str(out / "run")])
    return out


def test_gradients_of_every_step_are_equal(one: Path, two: Path) -> None:
    single, double = (load_file(out / "gradients.safetensors") for out in (one, two))
    assert single.keys() == double.keys()
    for step in range(STEPS):
        names = [key for key in single if key.startswith(f"{step}/")]
        whole = torch.cat([single[name].flatten() for name in names])
        difference = torch.cat([(single[name] - double[name]).flatten() for name in names]).norm()
        assert difference <= 1e-5 * whole.norm()
        # Not by the last layers alone: each parameter by itself, where its gradient is not zero by mathematics (an attention's
        # output does not depend on the keys' bias) but some of the whole.
        weighty = [name for name in names if single[name].norm() > 1e-3 * whole.norm()]
        assert len(weighty) > len(names) / 2
        assert all(f"{step}/dit.transformer_blocks.{block}.attn1.to_v.weight" in weighty for block in (0, 1))
        assert f"{step}/embedder.timestep_embedder.linear_2.weight" in weighty
        for name in weighty:
            assert (single[name] - double[name]).norm() <= 1e-5 * single[name].norm(), name
    assert len(single) == STEPS * len(names)


def test_weights_and_every_average_are_equal(one: Path, two: Path, argv: list[str]) -> None:
    begun = load_file(Path(argv[-1]) / "checkpoints" / "step-00000012" / "ema.safetensors")
    for file in ("model", "ema-0.050", "ema-0.200"):
        single, double = (load_file(out / "run" / "checkpoints" / LAST / f"{file}.safetensors") for out in (one, two))
        assert single.keys() == double.keys()
        for key, value in single.items():
            torch.testing.assert_close(value, double[key], atol=1e-6, rtol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
        # They have moved, and far more than the tolerance.
        assert max(float((single[key] - begun[key]).abs().max()) for key in begun) > 1e-3


def test_logged_and_validated_scalars_are_equal(one: Path, two: Path) -> None:
    single, double = ([json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()] for out in (one, two))
    assert [(line["phase"], line["step"]) for line in single] == [(line["phase"], line["step"]) for line in double]
    assert {"train", "validation"} == {line["phase"] for line in single}
    for first, second in zip(single, double, strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() - {"images_per_second", "phase"}:
            assert first[key] == pytest.approx(second[key], rel=1e-5, abs=1e-7), key


def test_two_processes_finish_the_run(one: Path, two: Path) -> None:
    for out in (one, two):
        assert {"evaluation.json", "finished.json", "latents.json", "pipeline", "report.html"} <= {p.name for p in (out / "run").iterdir()}
    single, double = (json.loads((out / "run" / "evaluation.json").read_text()) for out in (one, two))
    assert single["averages"]["chosen"] == double["averages"]["chosen"]
    for name, metric in single["metrics"].items():
        assert metric["mean"] == pytest.approx(double["metrics"][name]["mean"], rel=1e-4), name
    for first, second in zip(single["noise_levels"], double["noise_levels"], strict=True):
        assert first == pytest.approx(second, rel=1e-5)
