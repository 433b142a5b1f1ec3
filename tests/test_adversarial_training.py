"""Both players in whole runs: they resume bitwise, are one over two processes, wait for their start, and never wait for the device."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autoencoder import evaluate, train
from autoencoder.adversarial.gradients import layer_gradient
from autoencoder.adversarial.patchgan import PatchGAN
from autoencoder.adversarial.saved import FILE
from autoencoder.model import Autoencoder
from autoencoder.runtime.loop import Trainer
from tests.children import SMALL, run
from tests.gradients import launch
from tests.test_processes import ARGV
from tests.test_training import assert_same_run, lines

GAN = [
    "--objective.adversarial.name=hinge", "--objective.adversarial.width=4", "--objective.adversarial.layers=2",
    "--objective.adversarial.start=40", "--objective.adversarial.warmup_images=40", "--objective.adversarial.ramp_images=40",
    "--objective.adversarial.gate=[0,1]",
]  # fmt: skip
"""The discriminator trains from step 5 on and is heard from step 10 on, in full from step 15 on."""
RUN = [*SMALL, "--log.validate_every_images=160", "--checkpoint.every_images=40", *GAN]
SHORT = [*RUN, "--train.images=64", "--checkpoint.every_images=null"]


pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert run([*RUN, "--objective.adversarial.r1=1", "--objective.adversarial.r1_every=4", "--out", str(folder)]) == 0
    return folder


def training_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in lines(folder) if line["phase"] == "train"]


# Before the start, in the warm-up, on the ramp, and in full.
@pytest.mark.parametrize("kill_at", [4, 8, 16])
def test_a_killed_run_resumes_to_the_same_bits_of_both_players(unbroken: Path, tmp_path: Path, kill_at: int) -> None:
    argv = [*RUN, "--objective.adversarial.r1=1", "--objective.adversarial.r1_every=4", "--out", str(tmp_path / "run")]
    assert run(argv, kill_at=kill_at) == -signal.SIGKILL
    assert run(argv) == 0
    assert_same_run(unbroken, tmp_path / "run")
    held = {f.name for f in (unbroken / "checkpoints" / "step-00000020").glob("*.safetensors")}
    assert {FILE, "discriminator_optimizer.safetensors", "adversarial.safetensors"} <= held
    assert (unbroken / FILE).read_bytes() == (tmp_path / "run" / FILE).read_bytes()


def test_a_run_that_waits_for_a_plateau_under_bf16_resumes_to_the_same_bits(tmp_path: Path) -> None:
    extra = ["start=plateau", "plateau_images=20", "warmup_images=16", "norm=spectral", "name=non_saturating", "gate=[0.3,0.7]"]
    argv = [*RUN, "--train.microbatch=3", "--train.precision=bf16", *(f"--objective.adversarial.{setting}" for setting in extra)]
    assert run([*argv, "--out", str(tmp_path / "whole")]) == 0
    begun = [line["images"] for line in training_lines(tmp_path / "whole") if "discriminator_loss" in line]
    assert begun and 40 < begun[0] < 160
    assert run([*argv, "--out", str(tmp_path / "run")], kill_at=3 * 8 + 1) == -signal.SIGKILL
    assert run([*argv, "--out", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_before_its_start_the_discriminator_neither_moves_nor_is_there(unbroken: Path) -> None:
    first = unbroken / "checkpoints" / "step-00000005"
    fresh = PatchGAN(3, width=4, layers=2, seed=0).state_dict()
    saved = load_file(first / FILE)
    assert saved.keys() == fresh.keys() and all(torch.equal(value, fresh[name]) for name, value in saved.items())
    assert load_file(first / "discriminator_optimizer.safetensors") == {}
    told = training_lines(unbroken)
    names = {"adversarial", "discriminator_loss", "discriminator_accuracy", "discriminator_gradient_norm", "adversarial_weight"}
    assert [names <= line.keys() for line in told] == [False] * 5 + [True] * 15
    assert not any(names & line.keys() for line in told[:5])
    assert [line["images"] for line in told if "r1" in line] == [(step + 1) * 8 for step in (8, 12, 16)]
    weights = [line["adversarial_weight"] for line in told[5:]]
    # The first step on the ramp has a share of zero.
    assert weights[:6] == [0.0] * 6 and all(weight > 0 for weight in weights[6:])


def test_one_pass_through_the_autoencoder_serves_both_players_and_the_discriminator_runs_from_its_start_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {PatchGAN: 0, Autoencoder: 0}
    for kind in calls:
        forward = kind.forward

        def counted(self: Any, *arguments: Any, kind: Any = kind, forward: Any = forward) -> Any:
            calls[kind] += 1
            return forward(self, *arguments)

        monkeypatch.setattr(kind, "forward", counted)
    assert train.main([*SHORT, "--out", str(tmp_path / "run")]) == 0
    assert calls == {PatchGAN: 3, Autoencoder: 8}


class HostReads(TorchDispatchMode):
    """Counts values that are read from a tensor: on a GPU each would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("start", ["16", "plateau"])
def test_no_step_waits_for_the_device_but_one_a_window_on_the_look_for_a_plateau(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    reads, step = [], Trainer._step

    def watched(*arguments: Any) -> None:
        with HostReads() as mode:
            step(*arguments)
        reads.append(mode.count)

    monkeypatch.setattr(Trainer, "_step", watched)
    settings = [f"start={start}", "plateau_images=24", "warmup_images=0", "ramp_images=0", "r1=1", "r1_every=2", "gate=[0.3,0.7]"]
    argv = [*SHORT, "--objective.perceptual.name=ssim", *(f"--objective.adversarial.{setting}" for setting in settings)]
    assert train.main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert reads == [0] * 8 if start == "16" else [step in (2, 5) for step in range(8)]


def test_weights_average_and_optimisers_stay_in_full_precision_under_bf16(tmp_path: Path) -> None:
    argv = [*SHORT, "--train.precision=bf16", "--objective.adversarial.start=0", "--objective.adversarial.warmup_images=0"]
    argv.append("--train.gradient_checkpointing=true")
    # A process has one precision.
    assert run([*argv, "--out", str(tmp_path / "run")]) == 0
    folder = tmp_path / "run" / "checkpoints" / "step-00000008"
    for name in ("model", "ema", "optimizer", "discriminator", "discriminator_optimizer", "adversarial"):
        tensors = load_file(folder / f"{name}.safetensors")
        assert tensors and {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_new_phase_takes_the_discriminator_along_where_it_fits(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*SHORT, "--train.images=8", "--optimizer.lr=1e-12", "--init_from", str(unbroken), "--out"]
    assert train.main([*argv, str(tmp_path / "along"), "--objective.adversarial.start=0"]) == 0
    said = capsys.readouterr().err
    assert f"the discriminator of {unbroken} goes on" in said
    assert f"init_from: {unbroken} gives weights; optimiser, learning-rate schedule and image count start anew" in said
    before, after = (load_file(folder / FILE) for folder in (unbroken, tmp_path / "along"))
    fresh = PatchGAN(3, width=4, layers=2, seed=0).state_dict()
    name = "layers.0.weight"
    assert (after[name] - before[name]).abs().max() < 1e-2 * (fresh[name] - before[name]).abs().max() + 3e-4

    assert train.main([*argv, str(tmp_path / "wider"), "--objective.adversarial.width=6"]) == 0
    said = capsys.readouterr().err
    assert "layers.0.weight of shape (4, 3, 4, 4), this run's (6, 3, 4, 4); it starts anew" in said
    assert not (tmp_path / "wider" / FILE).exists()
    without = [a for a in argv if not a.startswith("--objective.adversarial.")]
    assert train.main([*without, str(tmp_path / "none")]) == 0
    assert "has a discriminator, which this run has no use for" in capsys.readouterr().err


def test_the_objective_of_a_run_says_when_the_discriminator_began(unbroken: Path) -> None:
    told = json.loads((unbroken / "evaluation.json").read_text())["objective"]["adversarial"]
    assert told["began"] == 40
    assert "from 40 images on; the decoder hears it 40 images later, in full after 40 more" in told["words"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--objective.adversarial.layers=3"], "data.resolution: got 16; give at least 24 pixels, or fewer objective.adversarial.layers"),
        (["--train.precision=fp16"], "train.precision: got 'fp16'"),
        (["--objective.adversarial.weighting=step", "--train.microbatch=4"], "a step has 2 microbatches here"),
        (["--experimental.iwae_samples=2"], "objective.adversarial.name: got 'hinge'"),
        (["--objective.adversarial.start=soon"], "objective.adversarial.start: got 'soon'; give images seen, such as 50k, or `plateau`"),
        (["--objective.perceptual.name=lpips", "--objective.perceptual.weights=random"], "data.resolution: got 16; LPIPS with alex needs"),
        (["--objective.perceptual.bands=[0]"], "objective.perceptual.bands: got (0,); leave it out unless name is `lpips`"),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*SHORT, "--objective.perceptual.net=alex", *settings, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_preflight_says_that_memory_and_hours_are_those_of_both_players(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*SMALL, "--train.images=64", "--preflight", "--out", str(tmp_path / "run")]
    for discriminator in ([], GAN):
        assert train.main([*argv, *discriminator]) == 0
        told = capsys.readouterr()
        assert ("players      the discriminator trained from the first step on" in told.out) == bool(discriminator)
    # What is told of the run is the run's, not the trial's.
    assert "from 40 images on; the decoder hears it 40 images later, in full after 40 more" in " ".join(told.err.split())
    assert "note: the decoder hears no discriminator in this run: not before 80 images" in told.err


def test_evaluation_refuses_crops_on_which_lpips_has_no_features(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.pth"
    weights.touch()
    argv = [f"--model={unbroken}", "--lpips=alex", f"--lpips_weights={weights}"]
    # Given, and taken from the run.
    for extra in (["--data.resolution=16"], []):
        assert evaluate.main([*argv, *extra]) == 2
        assert "data.resolution: got 16; LPIPS with alex needs at least 31 pixels" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [[], ["--train.precision=bf16", "--train.microbatch=4"]])
def test_the_adaptive_weight_of_a_compiled_network_is_the_plain_ones_and_costs_one_layers_backward_pass(
    extra: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    # All that compiling does to the graphs, their cut at the last layer among it, but for the minute that making kernels takes.
    compiled, convolutions, visited = torch.compile, [0], []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        convolutions[0] += sum("conv2d" in str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    class Backward(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            visited[-1] += function is torch.ops.aten.convolution_backward.default
            return function(*arguments, **(keywords or {}))

    def counted(*arguments: Tensor) -> Tensor:
        visited.append(0)
        with Backward():
            return layer_gradient(*arguments)

    monkeypatch.setattr(torch, "compile", lambda module: compiled(module, backend=backend))
    monkeypatch.setattr("autoencoder.adversarial.game.layer_gradient", counted)
    # The kernels of the two are to round alike.
    monkeypatch.setattr("autoencoder.layout.helps", lambda *_, **__: False)
    argv = [*SHORT, *extra, *(f"--objective.adversarial.{setting}" for setting in ("start=0", "warmup_images=8", "ramp_images=0"))]
    for name in ("plain", "compiled"):
        assert train.main([*argv, f"--train.compile={str(name == 'compiled').lower()}", "--out", str(tmp_path / name)]) == 0
    assert convolutions[0] > 10
    assert set(visited) == {1}
    for one, other in zip(lines(tmp_path / "plain"), lines(tmp_path / "compiled"), strict=True):
        assert one.keys() == other.keys()
        for key in {"loss", "nll_nats", "adversarial", "adversarial_weight", "discriminator_loss", "gradient_norm"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=0.02 if extra else 1e-3), key
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    # ARGV's four steps over microbatches of two, the last step uneven.
    extra = ["start=8", "warmup_images=8", "ramp_images=0", "r1=1", "r1_every=2", "lr=1e-6"]
    argv = [*ARGV, *GAN, *(f"--objective.adversarial.{setting}" for setting in extra), "--log.validate_every_images=64"]
    folders = []
    for processes in (1, 2):
        out = tmp_path_factory.mktemp(f"processes-{processes}") / "out"
        launch(out, processes, argv)
        folders.append(out)
    return folders[0], folders[1]


def test_two_processes_give_one_processs_gradients_of_both_players_at_every_step(one_and_two: tuple[Path, Path]) -> None:
    single, double = (load_file(out / "gradients.safetensors") for out in one_and_two)
    assert single.keys() == double.keys()
    steps = {key.split("/")[0] for key in single}
    assert steps == {"0", "1", "2", "3", "discriminator-0", "discriminator-1", "discriminator-2"}
    for step in steps:
        keys = [key for key in single if key.startswith(f"{step}/")]
        difference = torch.cat([(single[k] - double[k]).flatten() for k in keys]).norm()
        assert difference <= 1e-5 * torch.cat([single[k].flatten() for k in keys]).norm(), step


def test_two_processes_have_one_processs_discriminator_weight_and_gate(one_and_two: tuple[Path, Path]) -> None:
    for name in ("discriminator", "adversarial"):
        single, double = (load_file(out / "run" / "checkpoints" / "step-00000004" / f"{name}.safetensors") for out in one_and_two)
        assert single.keys() == double.keys()
        for key, value in single.items():
            torch.testing.assert_close(value, double[key], atol=2e-6, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    weight = load_file(one_and_two[0] / "run" / "checkpoints" / "step-00000004" / "adversarial.safetensors")
    assert weight["weight.mass"] > 0 and weight["accuracy.mass"] > 0


def test_a_meter_that_begins_late_is_a_mean_over_its_own_steps() -> None:
    from autoencoder.runtime.meters import Meters

    meters = Meters(torch.device("cpu"))
    value: Any = Tensor([2.0])[0]
    meters.add({"loss": value}, 8)
    meters.add({"loss": value + 2, "late": value}, 8)
    meters.add({"loss": value + 4, "late": value + 1, "r1": value * torch.nan}, 8)
    meters.add({"loss": value, "late": value + 3}, 4)
    again = Meters(torch.device("cpu"))
    again.names = list(meters.names)
    again.load_tensors({name: tensor.clone() for name, tensor in meters.tensors().items()})
    for each in (meters, again):
        means, nonfinite = each.read()
        assert means == pytest.approx({"loss": (16 + 32 + 8) / 20, "late": (16 + 20) / 12, "skipped_steps": 1})
        assert nonfinite == ["r1"]
        assert each.read() == ({}, [])
