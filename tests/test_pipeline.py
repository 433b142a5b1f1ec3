"""The exported pipeline: stock code samples what we sample, and what it would sample otherwise is not put in place."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoder.model import decode
from autoencoder.runtime.errors import ConfigError, TrainingError
from diffusion import pipeline, sampling
from diffusion.card import model_card
from diffusion.config import ProcessConfig, SamplingConfig, TrainDiffusionConfig
from diffusion.denoiser import NULL_CLASS, Denoiser
from diffusion.pipeline import Parts, gate, sample_as_stock, sample_in_stock, write_pipeline
from diffusion.process import build
from diffusion.schedulers import build_scheduler, read_process
from tests.pipelines import CLASSES, parts, perturb, stock_in_this_process

from diffusers import (  # isort: skip  (after ours: model.py)
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

Written = tuple[Path, Parts, float]


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A pipeline of six classes that passed its gate, in a fresh process."""
    folder = tmp_path_factory.mktemp("conditional")
    made = parts(vae_from=folder / "run" / "vae")
    config = TrainDiffusionConfig(latents=str(folder / "latents"), out=str(folder / "run"), sampling=SamplingConfig(steps=3))
    evaluation = {"metrics": {"loss": {"mean": 1.25}}, "frechet_on": "Fréchet distance of this and that."}
    card = model_card(config, made.space, evaluation=evaluation, provenance={"encoder_hash": made.space.encoder_hash})
    made = dataclasses.replace(made, card=card)
    return folder / "run" / "pipeline", made, write_pipeline(made, folder / "run" / "pipeline")


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Likewise without classes, of grey images, by an autoencoder without quant convs."""
    folder = tmp_path_factory.mktemp("unconditional") / "pipeline"
    made = parts(None, channels=1, quant_conv=False)
    return folder, made, write_pipeline(made, folder)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock code runs in this process: a fresh one takes seconds, and each pipeline above had one."""

    stock_in_this_process(monkeypatch)


def request(labels: list[int], guidance: float, *, steps: int, seed: int) -> dict[str, Any]:
    return {"class_labels": labels, "guidance_scale": guidance, "steps": steps, "seed": seed}


def start_of(asked: dict[str, Any], shape: tuple[int, ...]) -> Tensor:
    return torch.randn((len(asked["class_labels"]), *shape), generator=torch.Generator().manual_seed(asked["seed"]))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_gate_measures_rounding_errors(conditional: Written, unconditional: Written) -> None:
    assert 0 < conditional[2] < 1e-4
    assert 0 < unconditional[2] < 1e-4


@pytest.mark.usefixtures("here")
@torch.no_grad()
@pytest.mark.parametrize("steps", [5, 20])
def test_stock_first_order_dpm_is_our_euler_with_guidance_over_six_classes(conditional: Written, steps: int) -> None:
    folder, made, _ = conditional
    asked = request([0, 1, 2, 3, 4, 5], 3.5, steps=steps, seed=7)
    latents, images, _ = sample_in_stock(folder, asked)
    own = sample_as_stock(Denoiser(made.dit).eval(), asked, made.space.shape)
    torch.testing.assert_close(latents, own, rtol=0, atol=1e-4)
    # By the autoencoder as it was trained.
    decoded = decode(made.vae, own * torch.tensor(made.space.std).view(-1, 1, 1) + torch.tensor(made.space.mean).view(-1, 1, 1))
    torch.testing.assert_close(images, ((decoded + 1) / 2).clamp(0, 1), rtol=0, atol=1e-4)
    # The comparison has content: velocity, class and guidance each move the samples.
    assert float((own - start_of(asked, made.space.shape)).abs().mean()) > 0.1
    for other in (request([5, 4, 3, 2, 1, 0], 3.5, steps=steps, seed=7), request([0, 1, 2, 3, 4, 5], 1.0, steps=steps, seed=7)):
        assert float((sample_as_stock(Denoiser(made.dit).eval(), other, made.space.shape) - own).abs().max()) > 1e-2


PROCESSES = {
    "flow, shifted": (ProcessConfig(), 3.0),
    "v": (ProcessConfig(name="vp"), 1.0),
    "epsilon": (ProcessConfig(name="vp", prediction="epsilon", schedule="scaled_linear"), 1.0),
    "v, cosine": (ProcessConfig(name="vp", prediction="v", schedule="squaredcos_cap_v2"), 1.0),
}


@pytest.mark.usefixtures("here")
@torch.no_grad()
@pytest.mark.parametrize("name", PROCESSES)
def test_every_process_samples_in_stock_as_with_us(name: str, tmp_path: Path) -> None:
    process, shift = PROCESSES[name]
    made = parts(process=process, time_shift=shift)
    assert write_pipeline(made, tmp_path / "pipeline") < 1e-4
    asked = request([0, 3, 5], 2.0, steps=12, seed=2)
    own = sample_as_stock(Denoiser(made.dit).eval(), asked, made.space.shape, process, shift)
    latents = sample_in_stock(tmp_path / "pipeline", asked)[0]
    torch.testing.assert_close(latents, own, rtol=1e-5, atol=1e-4)
    # Another process or shift would have shown.
    for other in ("flow, shifted", "v") if name not in ("flow, shifted", "v") else ("epsilon",):
        with pytest.raises(TrainingError, match="samples something else"):
            gate(tmp_path / "pipeline", Denoiser(made.dit).eval(), made.vae, made.space, *PROCESSES[other])
    # As it is, with its second order, it is the sampler that we call by its name.
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = pipe([0, 3], 2.0, torch.Generator().manual_seed(2), num_inference_steps=12, output_type="pt").images
    again, its_shift = read_process(pipe.scheduler, "here")
    assert its_shift == shift

    def drawn(sampler: str) -> Tensor:
        start = start_of({**asked, "class_labels": [0, 3]}, made.space.shape)
        latents = sampling.sample(
            Denoiser(pipe.transformer), start, torch.tensor([0, 3]), process=again, sampler=sampler, steps=12, guidance=2.0,
            time_shift=its_shift,
        )  # fmt: skip
        return ((decode(pipe.vae, latents) + 1) / 2).clamp(0, 1)

    torch.testing.assert_close(images, drawn("dpm++"), rtol=0, atol=1e-4)
    if name == "v":
        # As the card has it.
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, timestep_spacing="trailing")
        images = pipe([0, 3], 2.0, torch.Generator().manual_seed(2), num_inference_steps=12, output_type="pt").images
        torch.testing.assert_close(images, drawn("ddim"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_pipelines_scheduler_says_its_process(name: str) -> None:
    process, shift = PROCESSES[name]
    found, its_shift = read_process(build_scheduler(process, shift), "here")
    meant, t = build(process), torch.linspace(0, 0.999, 333, dtype=torch.float64)
    assert (found.head, its_shift) == (meant.head, shift)
    for one, other in zip(found.path.scales(t), meant.path.scales(t), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (DDIMScheduler(clip_sample=False, prediction_type="sample"), r"\(DDIMScheduler\) predicts sample"),
        (DDIMScheduler(), "clips what it predicts"),
        (DPMSolverMultistepScheduler(thresholding=True), "clips what it predicts"),
        (DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True), "ends without signal"),
        (DPMSolverMultistepScheduler(rescale_betas_zero_snr=True), "ends without signal"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "predicts flow_prediction on other noise levels"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "predicts epsilon on other noise levels"),
        (FlowMatchEulerDiscreteScheduler(), "predicts None"),
        (EDMDPMSolverMultistepScheduler(prediction_type="epsilon"), "has no table of alphas"),
    ],
)
def test_schedulers_of_other_processes_are_refused(scheduler: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read_process(scheduler, "a/pipeline")
    assert str(caught.value).startswith("pipeline: got 'a/pipeline'; its scheduler")
    assert "this samples flow_prediction on flow sigmas, or v_prediction or epsilon by a table of betas" in str(caught.value)


@pytest.mark.usefixtures("here")
@torch.no_grad()
def test_unconditional_pipelines_sample_the_null_class(unconditional: Written) -> None:
    folder, made, _ = unconditional
    asked = request([NULL_CLASS] * 3, 1.0, steps=6, seed=1)
    latents, images, table = sample_in_stock(folder, asked)
    own = sample_as_stock(Denoiser(made.dit).eval(), asked, made.space.shape)
    torch.testing.assert_close(latents, own, rtol=0, atol=1e-4)
    assert float((own - start_of(asked, made.space.shape)).abs().mean()) > 0.1
    assert images.shape == (3, 1, 16, 16)
    assert table == {}


def test_a_plain_from_pretrained_loads_it_with_its_classes(conditional: Written) -> None:
    pipe = DiffusionPipeline.from_pretrained(conditional[0])
    assert type(pipe).__name__ == "DiTPipeline"
    assert pipe.labels == {"heron": 0, "cat": 1, "tabby": 1, "hubble deep field": 2, "5": 3, "naïve": 4, "zebra": 5}
    assert pipe.get_label_ids(["zebra", "hubble deep field", "heron"]) == [5, 2, 0]
    assert pipe.scheduler.config["solver_order"] == 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_cards_code_runs(conditional: Written) -> None:
    folder, made, _ = conditional
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    assert f"num_inference_steps={3}" in code
    names: dict[str, Any] = {}
    exec(code.replace("PATH_OR_HUB_ID", str(folder)), names)
    assert [image.size for image in names["images"]] == [(16, 16)] * 4
    front = card.split("---\n")[1]
    assert "library_name: diffusers\n" in front
    assert all(f"{i}: {name}" in card for i, name in enumerate(CLASSES))
    assert made.space.encoder_hash in card
    assert "Validation loss" in card and "| 1.25 |" in card
    assert "Fréchet distance of this and that." in card


def test_the_unconditional_cards_call_asks_for_the_null_class(unconditional: Written) -> None:
    config = TrainDiffusionConfig(latents="/data/latents", out="/data/run")
    card = model_card(config, unconditional[1].space, evaluation={"metrics": {}}, provenance={})
    assert "pipe(class_labels=[1000] * 4, guidance_scale=1," in card
    assert "## Classes" not in card
    assert "/data" not in card


def test_nothing_that_is_published_holds_a_path_of_this_machine(conditional: Written) -> None:
    folder, made, _ = conditional
    texts = {name: content for name, content in files_of(folder).items() if not name.endswith(".safetensors")}
    assert {"README.md", "model_index.json", "vae/config.json", "vae/preprocessing.json", "transformer/config.json"} <= texts.keys()
    for name, content in texts.items():
        assert str(folder.parents[1]) not in content.decode(), name
    assert str(folder.parents[1]) in str(made.vae.config["_name_or_path"]), "the autoencoder was loaded from a path"


def test_the_folded_autoencoder_says_what_was_folded_into_which(conditional: Written) -> None:
    folder, made, _ = conditional
    told = json.loads((folder / "vae" / "preprocessing.json").read_text())
    assert told["folded"]["of"] == {"encoder_hash": made.space.encoder_hash, "decoder_hash": made.space.decoder_hash}
    assert (told["folded"]["mean"], told["folded"]["std"]) == (made.space.mean, made.space.std)
    assert told["pixels"] == made.preprocessing["pixels"]
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] == 1


def swap_scheduler(kind: type, **settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / "scheduler")
        kind(**settings).save_pretrained(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", kind.__name__]
        (folder / "model_index.json").write_text(json.dumps(index))

    return change


def edit_json(file: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def move_weights(part: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        network = getattr(DiffusionPipeline.from_pretrained(folder), part)
        torch.manual_seed(1)
        perturb(network, by=0.02)
        network.save_pretrained(folder / part)

    return change


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swap_scheduler(EulerDiscreteScheduler), "samples something else"),
        (swap_scheduler(FlowMatchEulerDiscreteScheduler), "cannot load and sample"),
        (edit_json("scheduler/scheduler_config.json", prediction_type="epsilon"), "something else"),
        (edit_json("scheduler/scheduler_config.json", use_flow_sigmas=False), "something else"),
        (edit_json("scheduler/scheduler_config.json", flow_shift=3.0), "something else"),
        (edit_json("vae/config.json", scaling_factor=0.18215), "something else"),
        (edit_json("model_index.json", id2label={"0": "heron"}), "classes 1 of 7"),
        (move_weights("transformer"), "samples something else"),
        (move_weights("vae"), "samples something else"),
        (remove("transformer/diffusion_pytorch_model.safetensors"), "cannot load and sample"),
    ],
)
def test_the_gate_refuses_what_samples_something_else(
    conditional: Written, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    folder, made, _ = conditional
    changed = tmp_path / "pipeline"
    shutil.copytree(folder, changed)
    change(changed)
    with pytest.raises(TrainingError, match=said):
        gate(changed, Denoiser(made.dit).eval(), made.vae, made.space)


@pytest.mark.usefixtures("here")
def test_the_gate_samples_by_the_scheduler_that_the_folder_names(conditional: Written, tmp_path: Path) -> None:
    # Another class's settings with which ours would sample rightly; DiTPipeline runs the class that is named.
    folder, made, _ = conditional
    changed = tmp_path / "pipeline"
    shutil.copytree(folder, changed)
    swap_scheduler(EulerDiscreteScheduler)(changed)
    edit_json("scheduler/scheduler_config.json", prediction_type="flow_prediction", use_flow_sigmas=True)(changed)
    with pytest.raises(TrainingError):
        gate(changed, Denoiser(made.dit).eval(), made.vae, made.space)


@pytest.mark.usefixtures("here")
def test_a_refused_pipeline_leaves_the_old_one_in_place(conditional: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, made, _ = conditional
    place = tmp_path / "pipeline"
    shutil.copytree(folder, place)
    before = files_of(place)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "fold", lambda vae, mean, std: vae)
        with pytest.raises(TrainingError, match="not put in place"):
            write_pipeline(made, place)
    assert files_of(place) == before
    assert (tmp_path / ".pipeline.partial" / "model_index.json").is_file(), "what was written stays to look at"
    assert write_pipeline(made, place) < 1e-4
    assert files_of(place) == before
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_writing_leaves_the_runs_networks_as_they_were(conditional: Written) -> None:
    _, made, _ = conditional
    again = parts()
    for ours, fresh in ((made.dit, again.dit), (made.vae, again.vae)):
        assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in ours.state_dict().items())


def test_the_scheduler_ends_at_no_noise_and_starts_at_the_networks_last_timestep() -> None:
    scheduler = build_scheduler(ProcessConfig())
    scheduler.set_timesteps(10)
    assert scheduler.init_noise_sigma == 1
    assert int(scheduler.timesteps[0]) == 999
    assert float(scheduler.sigmas[-1]) == 0
