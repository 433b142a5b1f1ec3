"""Whole diffusion runs: what they leave, resumed bitwise wherever they are killed, stopped, extended, begun from weights."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from diffusion import pipeline
from diffusion import train as command
from tests.diffusion_children import SMALL_DIFFUSION, run
from tests.small_latents import CLASSES, encode_photos, write_photos, write_vae

LAST = "step-00000012"


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return encode_photos(write_vae(folder / "vae", seed=0), write_photos(folder / "photos"), folder / "latents")


@pytest.fixture(scope="module")
def small(latents: Path) -> list[str]:
    return [*SMALL_DIFFUSION, "--latents", str(latents)]


@pytest.fixture(scope="module")
def unbroken(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert run([*small, "--out", str(folder)], whole=True) == 0
    return folder


def lines(folder: Path) -> list[dict[str, object]]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in read]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, average, optimiser, logged scalars, evaluation and pictures are the same bits."""
    assert lines(one) == lines(other)
    names = {f.name for f in (one / "checkpoints" / LAST).glob("*.safetensors")}
    assert {"model.safetensors", "ema.safetensors", "optimizer.safetensors"} <= names
    for name in names:
        first, second = (load_file(folder / "checkpoints" / LAST / name) for folder in (one, other))
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert torch.equal(value, second[key]), f"{name}: {key}"
    assert evaluation(one)["metrics"] == evaluation(other)["metrics"]
    for file in ["pipeline/transformer/diffusion_pytorch_model.safetensors", *(f"images/{f.name}" for f in (one / "images").iterdir())]:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def evaluation(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / "evaluation.json").read_text())  # type: ignore[no-any-return]


def test_a_run_leaves_what_the_contract_names(unbroken: Path, latents: Path) -> None:
    files = {"config.yaml", "metrics.jsonl", "latents.json", "evaluation.json", "report.html", "finished.json"}
    assert files | {"checkpoints", "images", "pipeline"} <= {p.name for p in unbroken.iterdir()}
    assert {p.name for p in (unbroken / "checkpoints").iterdir()} == {f"step-{step:08d}" for step in (3, 6, 9, 12)}
    assert {p.name for p in (unbroken / "images").iterdir()} == {*(f"step-{s:08d}.png" for s in (4, 8, 12)), "neighbours.png"}
    for picture in (unbroken / "images").iterdir():
        with Image.open(picture) as image:
            assert image.mode == "RGB"
            assert image.getextrema() != ((0, 0),) * 3
    config = yaml.safe_load((unbroken / "config.yaml").read_text())
    assert (config["latents"], config["train"]["images"]) == (str(latents), 96)
    logged = lines(unbroken)
    assert [(line["phase"], line["step"]) for line in logged if line["step"] in (4, 12)] == [
        ("train", 4), ("validation", 4), ("train", 12), ("validation", 12),
    ]  # fmt: skip
    # The network starts at velocity 0, where the loss is 1 + E[latents**2]: about 2 for normalised latents.
    assert 1.5 < float(str(logged[0]["loss"])) < 2.5
    assert logged[-1]["loss"] == pytest.approx(evaluation(unbroken)["metrics"]["loss"]["mean"])  # type: ignore[index]


def test_the_pipeline_holds_the_average_the_classes_and_its_origin(unbroken: Path, latents: Path) -> None:
    average = load_file(unbroken / "checkpoints" / LAST / "ema.safetensors")
    exported = load_file(unbroken / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    # One embedder, in each block of the pipeline's network.
    blocks = {f"transformer_blocks.{block}.norm1.emb." for block in (0, 1)}
    places = {name: re.sub(r"^transformer_blocks\.\d\.norm1\.emb\.", "embedder.", name) for name in exported}
    assert {f"{block}{name.removeprefix('embedder.')}" for name in average if name.startswith("embedder.") for block in blocks} == {
        name for name, place in places.items() if place != name
    }
    origin = {name: place if place != name else f"dit.{name}" for name, place in places.items()}
    assert set(origin.values()) == average.keys()
    assert all(torch.equal(average[origin[name]], value) for name, value in exported.items())
    assert json.loads((unbroken / "pipeline" / "model_index.json").read_text())["id2label"] == dict(zip("01", CLASSES, strict=True))
    manifest, told = json.loads((latents / "manifest.json").read_text()), evaluation(unbroken)["provenance"]
    assert told["encoder_hash"] == manifest["encoder_hash"]
    assert told["pipeline"]["largest_difference_to_stock"] < pipeline.GATE_TOLERANCE  # type: ignore[index]
    state = json.loads((unbroken / "checkpoints" / LAST / "state.json").read_text())
    assert state["task"]["encoder_hash"] == manifest["encoder_hash"]
    frozen = json.loads((unbroken / "latents.json").read_text())
    assert (frozen["mean"], frozen["std"]) == (manifest["statistics"]["mean"], manifest["statistics"]["std"])
    assert frozen["labels"] == list(CLASSES)


# An epoch has 54 rows, so that every step but one in seven is inside of one. Step 7 follows the checkpoint of step 6; the
# validation at step 8, its grid half drawn, has its train line in the log already.
@pytest.mark.parametrize("kill", [("losses", 0), ("losses", 7), ("images", 1)])
def test_a_killed_run_resumes_to_the_same_bits(unbroken: Path, small: list[str], tmp_path: Path, kill: tuple[str, int]) -> None:
    argv = [*small, "--out", str(tmp_path / "run")]
    assert run(argv, kill=kill) == -signal.SIGKILL
    assert run(argv) == 0
    assert_same_run(unbroken, tmp_path / "run")


def test_a_run_killed_inside_an_accumulation_with_muon_resumes_to_the_same_bits(small: list[str], tmp_path: Path) -> None:
    accumulating = [*small, "--train.microbatch=3", "--optimizer.name=muon"]
    assert run([*accumulating, "--out", str(tmp_path / "whole")]) == 0
    argv = [*accumulating, "--out", str(tmp_path / "run")]
    # Three microbatches a step: this is the second of the eighth step.
    assert run(argv, kill=("losses", 22)) == -signal.SIGKILL
    assert run(argv) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert any(key.startswith("muon/") for key in load_file(tmp_path / "run" / "checkpoints" / LAST / "optimizer.safetensors"))


def test_a_run_killed_while_it_exports_exports_again(unbroken: Path, small: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    for lost in ("finished.json", "evaluation.json", "pipeline/model_index.json"):
        (folder / lost).unlink()
    (folder / ".pipeline.partial").mkdir()
    assert run([*small, "--out", str(folder)]) == 0
    assert_same_run(unbroken, folder)
    assert (folder / "pipeline" / "model_index.json").is_file()
    assert (folder / "finished.json").is_file()
    assert not (folder / ".pipeline.partial").exists()


def test_sigterm_leaves_a_checkpoint_and_its_exit_code(unbroken: Path, small: list[str], tmp_path: Path) -> None:
    argv = [*small, "--checkpoint.every_images=null", "--out", str(tmp_path / "run")]
    assert run(argv, kill=("losses", 4, signal.SIGTERM)) == 143
    # The step that was under way is finished.
    assert (tmp_path / "run" / "checkpoints" / "step-00000005" / "complete").is_file()
    assert not (tmp_path / "run" / "finished.json").exists()
    assert run(argv) == 0
    assert_same_run(unbroken, tmp_path / "run")


def test_a_finished_run_has_nothing_to_do_and_a_longer_one_goes_on(unbroken: Path, small: list[str], tmp_path: Path) -> None:
    folder, output = tmp_path / "run", tmp_path / "output"
    shutil.copytree(unbroken, folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "config.yaml")}
    assert run([*small, "--out", str(folder)], output=output) == 0
    assert "finished already; nothing to do" in output.read_text()
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert run([*small, "--train.images=112", "--out", str(folder)], output=output) == 0
    assert "train.images: 96 -> 112" in output.read_text()
    assert "going on from step-00000012" in output.read_text()
    assert lines(folder)[: len(lines(unbroken))] == lines(unbroken)
    assert lines(folder)[-1]["images"] == 112
    assert evaluation(folder)["provenance"]["images_seen"] == 112


def test_a_run_lengthened_after_an_uneven_last_batch_counts_and_averages_by_its_steps(small: list[str], tmp_path: Path) -> None:
    argv = [*small, "--train.batch_size=8", "--log.every_images=8", "--optimizer.schedule=constant", "--sampling.evaluate=0"]
    argv += ["--log.validate_every_images=1k", "--optimizer.lr=1e-6", "--out", str(tmp_path / "run")]
    assert run([*argv, "--train.images=12"]) == 0
    output = tmp_path / "log"
    assert run([*argv, "--train.images=26"], output=output) == 0
    trained = [line for line in lines(tmp_path / "run") if line["phase"] == "train"]
    assert [line["images"] for line in trained] == [8, 12, 24, 26]
    # At this rate the network stays where it starts: each line is near E|noise - latents|**2 = 2, whatever its batch's size.
    assert all(1.5 < float(str(line["loss"])) < 2.5 for line in trained)
    assert "images 12 to 15" in output.read_text()
    assert run([*argv, "--train.images=26"], output=output) == 0
    assert "going on" not in output.read_text()


def test_changed_settings_are_refused_by_name(unbroken: Path, small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    changed = ["--denoiser.layers=3", "--process.t_mean=0.5", "--conditioning.dropout=0.2"]
    assert command.main([*small, *changed, "--out", str(unbroken)]) == 2
    message = capsys.readouterr().err
    for said in ("denoiser.layers: 2 -> 3", "process.t_mean: 0.0 -> 0.5", "conditioning.dropout: 0.1 -> 0.2", "give another --out"):
        assert said in message
    assert message.count("->") == 3
    assert "Traceback" not in message


def test_preflight_goes_through_everything_and_leaves_nothing(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(pipeline, "gate", lambda folder, *_: asked.append(folder) or 0.0)
    assert command.main([*small, "--preflight", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    for word in ("memory", "GiB", "images/s", "hours", "96 images", "checkpoint"):
        assert word in printed
    assert len(asked) == 1
    assert not asked[0].exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", ["", f"checkpoints/{LAST}"])
def test_a_new_phase_starts_from_the_averaged_weights_of_a_run(unbroken: Path, small: list[str], tmp_path: Path, given: str) -> None:
    argv = [*small, "--train.images=8", "--optimizer.lr=1e-12", "--init_from", str(unbroken / given), "--out", str(tmp_path / "run")]
    assert run(argv) == 0
    before = load_file(unbroken / "checkpoints" / LAST / "ema.safetensors")
    after = load_file(tmp_path / "run" / "checkpoints" / "step-00000001" / "model.safetensors")
    assert all(torch.allclose(before[k], after[k], atol=1e-7) for k in before)
    assert before["dit.proj_out_2.weight"].abs().max() > 0
    # Of 8 levels of noise, a line each: a different network would have another loss at the first step.
    assert lines(tmp_path / "run")[-1]["loss"] == pytest.approx(lines(unbroken)[-1]["loss"], rel=1e-5)


def test_without_classes_every_label_is_the_null_class(small: list[str], tmp_path: Path) -> None:
    argv = [*small, "--conditioning.classes=none", "--train.images=32", "--out", str(tmp_path / "run")]
    assert run(argv) == 0
    assert json.loads((tmp_path / "run" / "latents.json").read_text())["labels"] is None
    assert "id2label" not in json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())
    # AdamW moves no row of the table that no label asked for.
    table = "adamw/embedder.class_embedder.embedding_table.weight/exp_avg"
    moved = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "optimizer.safetensors")[table].abs().sum(1).nonzero()
    assert moved.flatten().tolist() == [1000]


def test_means_alone_train_and_draws_of_them_are_refused(latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    means = encode_photos(latents / "vae", latents.parent / "photos", tmp_path / "means", "--moments=false")
    argv = [*SMALL_DIFFUSION, "--train.images=16", "--latents", str(means), "--out", str(tmp_path / "run")]
    capsys.readouterr()
    assert command.main([*argv, "--data.draw=sample"]) == 2
    message = capsys.readouterr().err
    assert message == f"error: data.draw: got 'sample'; {means} holds means only; give data.draw=mean, or encode with moments\n"
    assert run(argv) == 0
    assert lines(tmp_path / "run")[-1]["images"] == 16


def test_a_dozen_rows_are_too_few_for_a_distance_but_not_for_a_run(latents: Path, tmp_path: Path) -> None:
    few = encode_photos(latents / "vae", write_photos(tmp_path / "photos", each=6), tmp_path / "few")
    output = tmp_path / "output"
    argv = [*SMALL_DIFFUSION, "--train.images=16", "--latents", str(few), "--out", str(tmp_path / "run")]
    assert run(argv, output=output) == 0, output.read_text()
    assert "frechet" not in evaluation(tmp_path / "run")["metrics"]
    assert "1 held-out row" in output.read_text()


def test_under_a_weight_the_plain_error_stands_beside_the_loss(small: list[str], tmp_path: Path) -> None:
    told = ["--process.times=uniform", "--process.weight=min_snr", "--process.min_snr_gamma=2", "--optimizer.lr=1e-12"]
    argv = [*small, *told, "--train.images=8", "--sampling.evaluate=0", "--out", str(tmp_path / "run")]
    assert run(argv) == 0
    train, validation = lines(tmp_path / "run")
    assert 1.5 < float(str(train["squared_error"])) < 2.5
    # The network gives 0 still, so that a row's error is the same at all times: the loss is the mean weight of the eight.
    t = [(k + 0.5) / 8 for k in range(8)]
    weights = [(1 - at) ** 2 * min(1, 2 * at**2 / (1 - at) ** 2) for at in t]
    assert validation["loss"] == pytest.approx(float(str(validation["squared_error"])) * sum(weights) / 8, rel=1e-4)
    found = evaluation(tmp_path / "run")
    assert [level["weight"] for level in found["noise_levels"]] == pytest.approx(weights)
    assert [level["loss"] for level in found["noise_levels"]] == pytest.approx([validation["squared_error"]] * 8, rel=1e-4)
    assert found["metrics"]["loss"]["mean"] == pytest.approx(validation["loss"])  # type: ignore[index]


def test_a_fine_tune_for_likelihood_starts_from_a_runs_weights(unbroken: Path, small: list[str], tmp_path: Path) -> None:
    argv = [*small, "--train.images=16", "--init_from", str(unbroken), "--process.times=likelihood", "--out", str(tmp_path / "run")]
    output = tmp_path / "output"
    assert run(argv, output=output) == 0, output.read_text()
    assert "process: flow, velocity; t as the bound counts it: a loss of 1 is 4.013 nats a latent value of it" in output.read_text()
    # Half of these times are below 0.052, of the earlier run's a half.
    assert 0 < sorted(level["t"] for level in evaluation(tmp_path / "run")["noise_levels"])[4] < 0.1
