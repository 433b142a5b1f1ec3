"""The command `export_pipeline`: which files, what variants hold and give, what goes into the card, and what is refused."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from autoencoder.export_folder import RECORD, published
from autoencoder.runtime.errors import ConfigError, UsageError
from diffusion.config import ProcessConfig
from diffusion.pipeline import run_stock
from diffusion.pipeline_path import network_hash
from diffusion.variants import Reference, check_fp16, request
from tests.exports import main, refusal, write_run
from tests.hub import FakeHub, install
from tests.pipelines import CLASSES, parts, stock_in_this_process, write_ungated

from diffusers import DiffusionPipeline  # isort: skip  (after ours: model.py)

WEIGHTS = ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model")
PLAIN = {
    *("README.md", "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"),
    *("vae/config.json", "vae/preprocessing.json", *(f"{name}.safetensors" for name in WEIGHTS)),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "fresh_processes" not in request.node.name:
        stock_in_this_process(monkeypatch)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return install(monkeypatch)


@pytest.fixture(scope="module")
def both(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported with both variants."""
    out = tmp_path_factory.mktemp("both") / "out"
    with pytest.MonkeyPatch.context() as patch:
        stock_in_this_process(patch)
        assert main(run, out, "--variants", "fp16,bf16") == 0
    return out


def test_the_pipelines_own_files_are_copied_and_no_others(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run, tmp_path / "out") == 0
    assert set(published(tmp_path / "out")) == PLAIN | {RECORD}
    for name in PLAIN - {"README.md"}:
        assert (tmp_path / "out" / name).read_bytes() == (run / "pipeline" / name).read_bytes(), name
    said = capsys.readouterr().out
    assert "not published: checkpoints/model.safetensors, log.txt, " in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_variants_are_the_weights_rounded_under_the_names_that_diffusers_knows(run: Path, both: Path) -> None:
    assert set(published(both)) == PLAIN | {RECORD} | {f"{name}.{variant}.safetensors" for name in WEIGHTS for variant in ("fp16", "bf16")}
    for variant, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        for name in WEIGHTS:
            exact, rounded = load_file(run / "pipeline" / f"{name}.safetensors"), load_file(both / f"{name}.{variant}.safetensors")
            assert exact.keys() == rounded.keys()
            assert all(torch.equal(rounded[key], value.to(dtype)) for key, value in exact.items())
        pipe = DiffusionPipeline.from_pretrained(both, variant=variant, torch_dtype=dtype)
        assert {value.dtype for part in (pipe.transformer, pipe.vae) for value in part.parameters()} == {dtype}
        key = "proj_out_2.weight"
        assert torch.equal(pipe.transformer.state_dict()[key], load_file(both / f"{WEIGHTS[0]}.{variant}.safetensors")[key])


def test_the_record_tells_how_far_variants_are_from_fp32(both: Path) -> None:
    told = json.loads((both / RECORD).read_text())["variants"]
    assert told.keys() == {"fp16", "bf16"}
    exact = run_stock(both, request(len(CLASSES)))[0]
    for name, figures in told.items():
        rounded = run_stock(both, {**request(len(CLASSES)), "precision": name})[0]
        squares = (rounded["images"] - exact["images"]).double().square().flatten(1).mean(1)
        assert figures["psnr_db"] == pytest.approx(sum(-10 * math.log10(float(value)) for value in squares) / 2, abs=1e-3)
        assert figures["largest_difference_of_latents"] == pytest.approx(float((rounded["latents"] - exact["latents"]).abs().max()))
    # Three bits of mantissa more: 18 dB.
    assert told["fp16"]["psnr_db"] - told["bf16"]["psnr_db"] == pytest.approx(18, abs=6)


@torch.no_grad()
def test_the_imitation_of_fp16_is_as_far_from_fp32_as_fp16_is(both: Path) -> None:
    asked = request(len(CLASSES))
    exact, imitated = run_stock(both, asked)[0]["images"], run_stock(both, {**asked, "precision": "fp16"})[0]["images"]
    pipe = DiffusionPipeline.from_pretrained(both, variant="fp16", torch_dtype=torch.float16)
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, solver_order=1)
    native = pipe(
        class_labels=asked["class_labels"], guidance_scale=asked["guidance_scale"], num_inference_steps=asked["steps"],
        generator=torch.Generator().manual_seed(asked["seed"]), output_type="pt",
    ).images.float()  # fmt: skip
    errors = [float((images - exact).square().mean().sqrt()) for images in (imitated, native)]
    assert 0.5 < errors[0] / errors[1] < 2


def test_variants_load_and_sample_in_fresh_processes(run: Path, both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run, tmp_path / "out", "--variants", "fp16") == 0
    assert "fp16: latents differ from those of fp32 by up to" in capsys.readouterr().out
    told, before = (json.loads((folder / RECORD).read_text())["variants"]["fp16"] for folder in (tmp_path / "out", both))
    assert told["psnr_db"] == pytest.approx(before["psnr_db"], abs=0.5)


def test_the_card_keeps_what_was_there_and_tells_of_the_variants(both: Path) -> None:
    card = ModelCard((both / "README.md").read_text())
    assert card.data.license == "mit"
    headings = [line for line in card.text.splitlines() if line.startswith("#")]
    assert headings == ["# Ours", "## Weights", "## Measured", "## Notes"]
    assert "Mine." in card.text and "`PATH_OR_HUB_ID`" in card.text
    assert 'variant="bf16", torch_dtype=torch.bfloat16' in card.text


def test_exporting_again_replaces_the_export_and_loses_what_is_not_asked_for(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(run, out, "--variants", "bf16", "--license", "cc-by-4.0") == 0
    assert "license: cc-by-4.0" in (out / "README.md").read_text()
    assert main(out, out) == 0
    assert set(published(out)) == PLAIN | {RECORD}
    assert "## Weights" not in (out / "README.md").read_text()
    (out / "README.md").write_text("mine")
    assert main(run, out) == 2
    assert (out / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("process", "shift"),
    [
        (ProcessConfig(), 3.0),
        (ProcessConfig(name="vp"), 1.0),
        (ProcessConfig(name="vp", prediction="epsilon", schedule="squaredcos_cap_v2"), 1.0),
    ],
)
def test_every_process_is_exported_and_gated_against_our_own_sampler(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], process: ProcessConfig, shift: float
) -> None:
    folder = write_ungated(parts(None, process=process, time_shift=shift), tmp_path / "run" / "pipeline")
    assert main(folder, tmp_path / "out", "--variants", "bf16,fp16") == 0
    said = capsys.readouterr().out
    assert float(re.search(r"our own sampler's by (\S+);", said)[1]) < 1e-3  # type: ignore[index]
    told = json.loads((tmp_path / "out" / RECORD).read_text())["variants"]
    assert told["fp16"]["psnr_db"] > told["bf16"]["psnr_db"] > 20


def test_weights_that_stock_code_samples_otherwise_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusion import variants

    exact = variants.sample_as_stock
    monkeypatch.setattr(variants, "sample_as_stock", lambda *arguments: exact(*arguments) + 2e-3)
    assert "stock diffusers samples something else than we do (latents differ by 0.002)" in refusal(capsys, run, tmp_path / "out")
    monkeypatch.setattr(variants, "sample_as_stock", lambda *arguments: exact(*arguments) + math.nan)
    assert "samples something else" in refusal(capsys, run, tmp_path / "out")


def test_a_scheduler_of_others_is_said_and_not_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run, tmp_path / "copy") == 0
    file = tmp_path / "copy" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "flow_shift": 2.0, "thresholding": True}))
    capsys.readouterr()
    assert main(tmp_path / "copy", tmp_path / "out") == 0
    assert "its scheduler is not ours" in capsys.readouterr().out


def test_only_what_was_written_is_sent(run: Path, tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    argv = ["--variants", "bf16", "--push_to_hub", "me/dit", "--private"]
    assert main(run, out, *argv, "--dry_run") == 0
    assert hub.writes == [] and "nothing was sent" in capsys.readouterr().out
    assert main(run, out, *argv) == 0
    assert hub.repositories == {"me/dit": (True, {name: (out / name).read_bytes() for name in published(out)})}
    assert set(published(out)) == PLAIN | {RECORD} | {f"{name}.bf16.safetensors" for name in WEIGHTS}
    assert "`me/dit`" in (out / "README.md").read_text()


def test_fp16_is_refused_where_activations_come_near_its_end(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run, tmp_path / "copy") == 0
    file = tmp_path / "copy" / f"{WEIGHTS[1]}.safetensors"
    state = load_file(file)
    state["decoder.conv_in.weight"] *= 1e5
    save_file(state, file, metadata={"format": "pt"})
    (tmp_path / "new").mkdir()
    said = refusal(capsys, tmp_path / "copy", tmp_path / "new" / "out", "--variants", "bf16,fp16")
    assert said.startswith("variants: got ['fp16']; vae.decoder.")
    assert "give bf16" in said
    assert main(tmp_path / "copy", tmp_path / "new" / "out", "--variants", "bf16") == 0
    images = torch.zeros(1)
    check_fp16(Reference(images, images, "layer", 65504 / 8.01))
    with pytest.raises(ConfigError, match=r"8 times are enough"):
        check_fp16(Reference(images, images, "layer", 65504 / 7.99))


@pytest.mark.parametrize(("value", "variant"), [(1e5, "fp16"), (math.nan, "bf16")])
def test_weights_that_a_precision_cannot_hold_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, variant: str
) -> None:
    assert main(run, tmp_path / "copy") == 0
    file = tmp_path / "copy" / f"{WEIGHTS[1]}.safetensors"
    state = load_file(file)
    # Sampling does not use the encoder.
    state["encoder.conv_in.weight"][0, 0, 0, 0] = value
    save_file(state, file, metadata={"format": "pt"})
    (tmp_path / "new").mkdir()
    said = refusal(capsys, tmp_path / "copy", tmp_path / "new" / "out", "--variants", variant)
    assert f"{variant} cannot hold encoder.conv_in.weight of the vae" in said


def test_a_variant_whose_images_are_not_finite_is_refused(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion import variants

    asked = request(len(CLASSES))
    reference = variants.sample_reference(both, asked)
    broken = run_stock(both, asked)[0] | {"images": torch.tensor([math.nan])}
    monkeypatch.setattr(variants, "run_stock", lambda folder, asked: (broken, {}))
    with pytest.raises(UsageError, match="the fp16 variant give images that are not finite"):
        variants.compare(both, "fp16", asked, reference)


def test_an_export_of_an_export_is_loaded_from_its_own_repository(run: Path, tmp_path: Path) -> None:
    code = 'from_pretrained("{}")'
    pipeline = shutil.copytree(run / "pipeline", tmp_path / "pipeline")
    card = (pipeline / "README.md").read_text().replace("`PATH_OR_HUB_ID`", f"`{code.format('PATH_OR_HUB_ID')}`")
    mine = 'from_pretrained("me/another") stays'
    (pipeline / "README.md").write_text(card + mine)
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert main(pipeline, first, "--push_to_hub", "me/one", "--dry_run") == 0
    assert main(first, second, "--push_to_hub", "me/two", "--dry_run") == 0
    assert main(second, third) == 0
    for out, place in ((first, "me/one"), (second, "me/two"), (third, "me/two")):
        text = (out / "README.md").read_text()
        assert text.count("from_pretrained(") == 2 and code.format(place) in text and mine in text
        assert json.loads((out / "export.json").read_text())["repository"] == place


def test_the_networks_hash_is_of_its_fp32_weights_and_configuration(run: Path, both: Path, tmp_path: Path) -> None:
    assert network_hash(run / "pipeline") == network_hash(both)
    file = both / "transformer" / "config.json"
    before = file.read_text()
    try:
        file.write_text(before + "\n")
        assert network_hash(run / "pipeline") != network_hash(both)
    finally:
        file.write_text(before)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--pipeline", "owner/model"], "if it is a repository of the hub, fetch it first"),
        (["--pipeline", "/no/such/run"], "pipeline: got '/no/such/run'; no such folder"),
        (["--variants", "fp16,fp16"], "variants: got ['fp16', 'fp16']; give each once"),
        (["--variants", "fp8"], "variants: got"),
        (["--account", "/no/such.json"], "account: got '/no/such.json'; no such file"),
        (["--private"], "private: got True; it would have no effect"),
        (["--license", "Mine"], "license: got 'Mine'"),
        (["--push_to_hub", "me"], "push_to_hub: got 'me'; give OWNER/NAME"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    assert said in refusal(capsys, run, tmp_path / "out", *argv)


def test_a_damaged_pipeline_is_refused_and_nothing_is_left(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run, tmp_path / "copy") == 0
    file = tmp_path / "copy" / f"{WEIGHTS[0]}.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    (tmp_path / "new").mkdir()
    said = refusal(capsys, tmp_path / "copy", tmp_path / "new" / "out")
    assert "stock diffusers in a process of its own cannot load and sample it" in said and ".partial" not in said
