"""Finding where a value left the finite numbers, in networks that are wrong at one known place."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from autoencoder.runtime.config import TrainConfig
from autoencoder.runtime.meters import LossScale
from autoencoder.runtime.nonfinite import BadSteps, find_culprit
from autoencoder.runtime.recovery import Recovery


class Network(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, between: Any = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.between = nn.Linear(2, 3), nn.Linear(3, 1), between

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.second(self.between(self.first(rows)))
        return made


def found(network: Network, rows: torch.Tensor, loss: Any = lambda made: made.square().sum(1)) -> str | None:
    batch = SimpleNamespace(rows=rows, weight=torch.ones(len(rows)), ids=[f"photo {i}" for i in range(len(rows))])
    culprit = find_culprit(network, [batch], lambda given: SimpleNamespace(loss=loss(network(given.rows)), named={}))
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network.first._forward_hooks
    return None if culprit is None else str(culprit)


ROWS = torch.tensor([[0.5, -0.25], [1.0, 2.0], [-1.0, 0.5]])


def test_a_sound_step_has_no_culprit() -> None:
    assert found(Network(), ROWS) is None


def test_images_that_are_not_finite_are_named_at_the_first_layer() -> None:
    rows = ROWS.clone()
    rows[1, 0] = float("nan")
    assert found(Network(), rows) == "first in the input of first, of image photo 1"


def test_a_layer_that_overflows_is_named_before_those_that_it_reaches() -> None:
    network = Network()
    with torch.no_grad():
        network.first.weight *= 100
    assert found(network, ROWS * torch.tensor([[1.0], [1e38], [1.0]])) == "first in the output of first, of image photo 1"


def test_a_function_between_modules_is_named_by_what_it_feeds() -> None:
    def half_infinite(values: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.tensor([[False], [False], [True]]), float("inf"), values)

    assert found(Network(half_infinite), ROWS) == "first in the input of second, of image photo 2"


def test_weights_that_are_not_finite_come_before_all_else() -> None:
    network = Network()
    with torch.no_grad():
        network.second.bias[0] = float("inf")
    assert found(network, ROWS) == "first in the weights second.bias"


def test_a_term_past_the_network_is_named() -> None:
    told = found(Network(), ROWS, lambda made: (made * torch.tensor([[1.0], [0.0], [1.0]])).log().abs().sum(1) * 0 + made.sum(1) * 1e39)
    assert told is not None and told.startswith("first in the term loss, past the network, of image")


def test_a_gradient_that_explodes_on_the_way_back_is_named() -> None:
    # The root's slope is infinite at 0, where its value is sound.
    told = found(Network(), ROWS, lambda made: (made - made.detach()).abs().clamp(min=0)[:, 0].sqrt())
    assert told is not None and told.startswith("first in the gradient at the output of second, of images photo 0, photo 1, photo 2")


def test_the_last_bad_step_is_kept_on_the_device() -> None:
    steps = BadSteps(torch.device("cpu"))
    assert steps.last() is None
    for step, bad in enumerate((0.0, 1.0, 1.0, 0.0)):
        steps.add(step, torch.tensor(bad))
    assert steps.last() == 2


@pytest.mark.parametrize(("value", "names", "left"), [
    (2.0**10, ["gradient_norm"], []),
    (0.5, ["gradient_norm"], ["gradient_norm"]),
    (2.0**10, ["gradient_norm", "loss"], ["gradient_norm", "loss"]),
])  # fmt: skip
def test_an_overflow_that_no_loss_scale_cures_is_reported(value: float, names: list[str], left: list[str]) -> None:
    scale = LossScale(torch.device("cpu"), enabled=True, initial=value)
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"))
    console: Any = None
    recovery = Recovery(
        TrainConfig(), accelerator=accelerator, folder=Path(), loss_scale=scale, console=console, metrics=None, find=lambda step: None
    )
    assert recovery.unanswered(names) == left
