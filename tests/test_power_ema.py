"""Averages whose lengths are shares of the run: their closed form, their length, steps of any size, skipped steps, the choice."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from autoencoder.model_path import checkpoint_weights
from autoencoder.runtime import checkpoint
from autoencoder.runtime.averages import Averages
from autoencoder.runtime.config import TrainConfig
from autoencoder.runtime.errors import ConfigError
from autoencoder.runtime.power_ema import PowerEma, exponent

ZERO, ONE = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
LENGTHS = [0.01, 0.05, 0.1, 0.2, 0.28]


class Weights(nn.Module):
    """One trained parameter in float64, so that rounding hides nothing, and one that is frozen at -0."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.full((3,), math.pi, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.full((2,), -0.0, dtype=torch.float64), requires_grad=False)

    def move(self, values: torch.Tensor) -> None:
        with torch.no_grad():
            self.trained.copy_(values)


def several(lengths: list[float]) -> tuple[Weights, Averages[Weights]]:
    source = Weights()
    return source, Averages(source, TrainConfig(ema_halflife_images=None, ema_lengths=lengths))


@pytest.mark.parametrize("length", LENGTHS)
def test_the_profile_has_the_length_that_was_asked_for(length: float) -> None:
    """The shares that an average gives to the images of a run, found by averaging each image's indicator: their mean and spread."""
    images = 4000
    decays = [PowerEma(nn.Linear(1, 1), length=length).decay(n, 1) for n in range(1, images + 1)]
    shares = np.array([1 - decay for decay in decays]) * np.append(np.cumprod(decays[:0:-1])[::-1], 1)
    assert shares.sum() == pytest.approx(1, abs=1e-12)
    middles = (np.arange(images) + 0.5) / images
    mean = (shares * middles).sum()
    assert math.sqrt((shares * (middles - mean) ** 2).sum()) == pytest.approx(length, abs=1e-4)
    # t**gamma has its mean at (gamma + 1) / (gamma + 2).
    assert mean == pytest.approx((exponent(length) + 1) / (exponent(length) + 2), abs=1e-4)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_exponent_solves_the_published_equation_without_a_negative_power(length: float) -> None:
    gamma = exponent(length)
    assert gamma >= 0
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(length, rel=1e-9)


def test_the_average_is_the_integral_of_the_weights_under_the_power() -> None:
    torch.manual_seed(0)
    source, averages = several(LENGTHS)
    values, batches = torch.randn(30, 3, dtype=torch.float64), [8, 3, 8, 1, 20] * 6
    images = 0
    for value, batch in zip(values, batches, strict=True):
        images += batch
        source.move(value)
        averages.update(images, batch, ZERO)
    edges = torch.tensor([0, *batches]).cumsum(0).double() / images
    for length, average in zip(LENGTHS, averages.each.values(), strict=True):
        powers = edges ** (exponent(length) + 1)
        expected = ((powers[1:] - powers[:-1])[:, None] * values).sum(0)
        torch.testing.assert_close(average.module.trained, expected, rtol=1e-12, atol=1e-12)


def test_batch_size_does_not_change_the_average() -> None:
    """Weights that stand still over 64 images: one step of 64 is as good as 64 of one, or an uneven split."""
    found = []
    for split in ([64], [1] * 64, [40, 7, 17]):
        source, averages = several(LENGTHS)
        images = 0
        for stretch in range(5):
            source.move(torch.full((3,), float(stretch**2)))
            for batch in split:
                images += batch
                averages.update(images, batch, ZERO)
        found.append(torch.stack([average.module.trained.detach() for average in averages.each.values()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-12)


def test_the_start_has_no_part_and_what_is_frozen_keeps_its_bits() -> None:
    source, averages = several([0.05, 0.2])
    source.move(torch.tensor([1.0, -2.0, 0.5]))
    averages.update(8, 8, ZERO)
    for average in averages.each.values():
        assert torch.equal(average.module.trained, source.trained)
        assert average.module.frozen.signbit().all()
        assert not average.module.trained.requires_grad


def test_a_skipped_step_moves_no_average() -> None:
    source, averages = several([0.05, 0.2])
    averages.update(8, 8, ZERO)
    source.move(torch.tensor([1.0, -2.0, 0.5]))
    averages.update(16, 8, ZERO)
    before = [average.module.trained.clone() for average in averages.each.values()]
    source.move(torch.tensor([5.0, 5.0, 5.0]))
    averages.update(24, 8, ONE)
    assert all(torch.equal(average.module.trained, held) for average, held in zip(averages.each.values(), before, strict=True))
    averages.update(32, 8, ZERO)
    assert not any(torch.equal(average.module.trained, held) for average, held in zip(averages.each.values(), before, strict=True))


def test_the_best_on_held_out_data_is_in_use_from_then_on() -> None:
    _, averages = several([0.2, 0.05, 0.1])
    assert list(averages.each) == ["ema-0.050", "ema-0.100", "ema-0.200"]
    assert averages.chosen == "ema-0.200"
    losses = {"ema-0.050": 2.0, "ema-0.100": 1.0, "ema-0.200": math.nan}
    of = {id(average.module): losses[name] for name, average in averages.each.items()}
    scalars = averages.validate(lambda module: {"other": of[id(module)] + 10}, lambda found: found["other"] - 10)
    assert averages.chosen == "ema-0.100"
    assert averages.module is averages.each["ema-0.100"].module
    assert math.isnan(scalars.pop("loss_ema_0.200"))
    assert scalars == {"other": 11.0, "loss_ema_0.050": 2.0, "loss_ema_0.100": 1.0}
    _, resumed = several([0.2, 0.05, 0.1])
    resumed.load_report({"step": 3, **averages.report()})
    assert resumed.chosen == "ema-0.100"


def test_one_average_or_none_is_used_without_a_choice() -> None:
    for train, name in (
        (TrainConfig(), "ema"),
        (TrainConfig(ema_halflife_images=None, ema_lengths=[0.1]), "ema-0.100"),
        (TrainConfig(ema_halflife_images=None), None),
    ):
        source = Weights()
        averages = Averages(source, train)
        assert averages.chosen == name
        assert averages.validate(lambda module, own=averages.module: {"own": float(module is own)}, lambda _: math.nan) == {"own": 1.0}  # type: ignore[misc]
        assert averages.report() == {}
        assert list(averages.held()) == ([] if name is None else [name])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ema_lengths": [0.1]}, r"ema_halflife_images: got '20k'; train.ema_lengths is \[0.1\] beside it"),
        ({"ema_halflife_images": None, "ema_lengths": []}, r"ema_lengths: got \[\]; give at least one length, or null"),
        ({"ema_halflife_images": None, "ema_lengths": [0.1, 0.3]}, "0.005 to 0.288"),
        ({"ema_halflife_images": None, "ema_lengths": [0.0]}, "0.005 to 0.288"),
        ({"ema_halflife_images": None, "ema_lengths": [0.1, 0.1001]}, "told apart by three decimals"),
    ],
)
def test_lengths_that_cannot_be_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig(**given)  # type: ignore[arg-type]


def test_a_checkpoint_s_weights_are_the_best_average_s_else_the_longest_s(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000004"
    source, averages = several([0.05, 0.1])
    held = {"model": checkpoint.ModuleTensors(source), **averages.held()}
    checkpoint.save(folder, held, {"step": 4})
    assert checkpoint_weights(folder) == folder / "ema-0.100.safetensors"
    averages.losses = {"ema-0.050": 1.0, "ema-0.100": 2.0}
    checkpoint.save(folder, held, {"step": 4, **averages.report()})
    assert checkpoint_weights(folder) == folder / "ema-0.050.safetensors"
    (folder / "state.json").write_text("[]")
    assert checkpoint_weights(folder) == folder / "ema-0.100.safetensors"
    assert checkpoint_weights(folder / "none") is None
