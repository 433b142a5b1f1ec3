"""A discriminator of the user's own: what is demanded of it, and whole runs with one."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from autoencoder import train
from autoencoder.adversarial.network import build_discriminator
from autoencoder.adversarial.patchgan import iterate_norms
from autoencoder.adversarial.saved import FILE
from autoencoder.adversarial_config import AdversarialConfig
from autoencoder.runtime.errors import ConfigError
from autoencoder.runtime.own_class import OwnClass
from tests.children import SMALL, run
from tests.own_classes import Critic
from tests.test_training import assert_same_run, lines

GAN = [
    "--objective.adversarial.name=hinge", "--objective.adversarial.start=16", "--objective.adversarial.warmup_images=16",
    "--objective.adversarial.ramp_images=16", "--objective.adversarial.gate=[0,1]",
]  # fmt: skip
RUN = [*SMALL, "--log.validate_every_images=160", "--checkpoint.every_images=40", *GAN]
OWN = ["--objective.adversarial.own=tests.own_classes.Critic", "--objective.adversarial.own.init_args.norm=hook"]


pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def discriminator(name: str = "Critic", *, r1: float = 0.0, seed: int = 0, **arguments: Any) -> nn.Module:
    own = OwnClass(class_path=f"tests.own_classes.{name}", init_args=arguments)
    config = AdversarialConfig(name="hinge", own=own, r1=r1)
    return build_discriminator(config, shape=(3, 16, 16), seed=seed, device=torch.device("cpu"))


@pytest.mark.parametrize("norm", ["group", "spectral", "hook", "drop"])
def test_it_is_constructed_with_the_images_channels_from_the_seed(norm: str) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    made, again, other = (discriminator(norm=norm, width=4, seed=seed, r1=1) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(made, Critic) and made.body[-1].in_channels == 4
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in made.state_dict().items())
    assert not all(torch.equal(value, other.state_dict()[name]) for name, value in made.state_dict().items())
    assert not any(module.training for module in made.modules())


def test_other_generators_are_seeded_for_it_too() -> None:
    made, again, other = (discriminator("Drawn", by="numpy", seed=seed).weight for seed in (3, 3, 2**32 + 4))
    assert torch.equal(made, again) and not torch.equal(made, other)  # type: ignore[arg-type]


def test_frozen_batch_norm_with_statistics_of_its_own_is_taken() -> None:
    made = discriminator("OnFrozenFeatures", norm="frozen", r1=1)
    assert made.norm.running_mean is not None and not made.norm.training  # type: ignore[union-attr]


@pytest.mark.parametrize("norm", ["spectral", "hook"])
def test_spectral_norms_of_both_kinds_move_once_a_step_and_reach_one(norm: str) -> None:
    made = discriminator(norm=norm)
    first = made.body[0]
    with torch.no_grad():
        (first.parametrizations.weight.original if norm == "spectral" else first.weight_orig).copy_(torch.randn(8, 3, 4, 4))
    before = {name: value.clone() for name, value in made.state_dict().items()}
    made(torch.rand(2, 3, 16, 16))
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in before.items())
    for _ in range(200):
        iterate_norms(made)
    made(torch.rand(2, 3, 16, 16))
    assert torch.linalg.matrix_norm(first.weight.flatten(1), ord=2).item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Critic", {"norm": "batch"}, r"body\.1 is a BatchNorm2d: in evaluation mode, .* never move, .* give GroupNorm"),
        ("OnFrozenFeatures", {"norm": "untracked"}, r"norm is a BatchNorm2d"),
        ("Drawn", {"by": "system"}, r"twice gives two values of weight"),
        ("FaultyCritic", {"fault": "overwrites"}, r"it changes its input"),
        ("FaultyCritic", {"fault": "backward"}, r"raised RuntimeError: no way back \(own_classes.py, line \d+\)"),
        ("FaultyCritic", {"fault": "pairs"}, r"called with images \(1, 3, 16, 16\) it raised IndexError"),
        ("Critic", {"norm": "sync"}, r"body\.1 is a SyncBatchNorm"),
        ("FaultyCritic", {"fault": "score"}, r"images \(2, 3, 16, 16\) give \(2,\); give logits of patches, \(2, 1, h, w\)"),
        ("FaultyCritic", {"fault": "channels"}, r"give \(2, 3, 16, 16\); give logits of patches"),
        ("FaultyCritic", {"fault": "cut"}, r"it has no gradient"),
        ("FaultyCritic", {"fault": "infinite"}, r"not finite"),
        ("FaultyCritic", {"fault": "coupled"}, r"with the other images of its batch"),
        ("FaultyCritic", {"fault": "counts"}, r"a forward pass changes passes"),
        ("FaultyCritic", {"fault": "unused"}, r"does not depend on spare\.weight, spare\.bias"),
        ("FaultyCritic", {"fault": "tied"}, r"one tensor under two names, layer\.weight and again\.weight"),
        ("FaultyCritic", {"fault": "frozen"}, r"no parameter that trains"),
        ("FaultyCritic", {"fault": "extra"}, r"its state has _extra_state, a str"),
        ("FaultyCritic", {"fault": "none", "channels": 3}, r"^objective\.adversarial\.own\.init_args: .* channels is given by us"),
        ("Constant", {}, r"^objective\.adversarial\.own\.init_args: .* takes \(\), of which we give channels"),
    ],
)
def test_what_cannot_be_trained_exactly_is_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        discriminator(name, **arguments)
    assert str(error.value).startswith("objective.adversarial.own.")


def test_a_network_without_second_derivatives_is_refused_for_r1_alone() -> None:
    discriminator("FaultyCritic", fault="once")
    with pytest.raises(ConfigError, match=r"raised RuntimeError: .*, by the R1 penalty"):
        discriminator("FaultyCritic", fault="once", r1=1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--objective.adversarial.name=none"],
            "objective.adversarial.own.class_path): objective.adversarial.name is none, so that there is no",
        ),
        (["--objective.adversarial.width=32"], "objective.adversarial.width: got 32; it is of our discriminator"),
        (["--objective.adversarial.norm=spectral"], "objective.adversarial.norm: got 'spectral'; it is of our discriminator"),
        (["--objective.adversarial.own.init_args.norm=batch"], "body.1 is a BatchNorm2d"),
        (["--objective.adversarial.own.init_args.depth=3"], "takes (channels: int, width: int = 8, norm: str = 'group'), of which we give"),
    ],
)
def test_a_run_that_cannot_have_it_ends_at_its_start(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*RUN, *OWN, *argv, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_one_of_a_file_that_is_switched_off_is_not_looked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "critic.yaml"
    file.write_text("objective: {adversarial: {name: hinge, own: {class_path: no_such_module.Critic, init_args: {a: 1}}}}")
    argv = [*SMALL, "--train.images=8", "--log.validate_every_images=8", "--config", str(file)]
    assert train.main([*argv, "--objective.adversarial.name=none", "--out", str(tmp_path / "off")]) == 0
    # In its place ours, with its layers.
    more = ["--objective.adversarial.own=null", "--objective.adversarial.layers=2"]
    assert train.main([*argv, *more, "--out", str(tmp_path / "ours")]) == 0
    assert "hinge, weight" in capsys.readouterr().err
    assert train.main([*argv, "--out", str(tmp_path / "run")]) == 2


def test_a_killed_run_resumes_to_the_same_bits_and_the_next_phase_takes_it_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*RUN, *OWN, "--objective.adversarial.r1=1", "--objective.adversarial.r1_every=2", "--train.microbatch=4"]
    assert run([*argv, "--out", str(tmp_path / "whole")]) == 0
    assert run([*argv, "--out", str(tmp_path / "run")], kill_at=2 * 7 + 1) == -signal.SIGKILL
    assert run([*argv, "--out", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert (tmp_path / "whole" / FILE).read_bytes() == (tmp_path / "run" / FILE).read_bytes()
    saved = load_file(tmp_path / "whole" / FILE)
    assert saved.keys() == Critic(3, norm="hook").state_dict().keys()
    assert any(line.get("adversarial_weight", 0) > 0 for line in lines(tmp_path / "whole"))

    following = [*argv, "--train.images=8", "--init_from", str(tmp_path / "whole")]
    assert train.main([*following, "--out", str(tmp_path / "next")]) == 0
    said = capsys.readouterr()
    told = said.out + said.err
    assert f"init_from: the discriminator of {tmp_path / 'whole'} goes on" in told
    assert "discriminator: tests.own_classes.Critic(norm='hook'), 0.00 M parameters" in told
    assert "hinge by tests.own_classes.Critic(norm='hook'), weight 0.1" in told
    assert train.main([*following, "--objective.adversarial.own.init_args.width=4", "--out", str(tmp_path / "other")]) == 0
    said = capsys.readouterr()
    assert "it starts anew" in said.out + said.err


def test_frozen_layers_stay_and_the_others_train_also_beside_probes(tmp_path: Path) -> None:
    own = ["--objective.adversarial.own=tests.own_classes.OnFrozenFeatures", "--log.gradient_norms"]
    assert train.main([*RUN, *own, "--out", str(tmp_path / "run")]) == 0
    torch.manual_seed(0)
    saved, fresh = load_file(tmp_path / "run" / FILE), discriminator("OnFrozenFeatures").state_dict()
    assert torch.equal(saved["features.weight"], fresh["features.weight"])
    assert not torch.equal(saved["head.weight"], fresh["head.weight"])
    told = json.loads((tmp_path / "run" / "evaluation.json").read_text())["objective"]["adversarial"]
    assert told["own"] == {"class_path": "tests.own_classes.OnFrozenFeatures", "init_args": {}}
