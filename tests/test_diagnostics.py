"""What the latents carry: figures against numpy on arbitrary splits, and the decoder's use of shuffled latents."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from autoencoder.data.batch import Batch
from autoencoder.data.pixels import to_images
from autoencoder.diagnostics import ACTIVE_VARIANCE, LatentStatistics, share_outside, sharpness
from autoencoder.likelihood import Gaussian
from autoencoder.model import LOGVAR_RANGE
from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.posterior import DiagonalGaussian
from autoencoder.shuffling import LatentShuffle, Shuffled

SPLITS = [[23], [1] * 23, [5, 5, 5, 5, 3], [0, 20, 3]]
CPU = torch.device("cpu")


def moments(images: int = 23, shape: tuple[int, ...] = (3, 4, 5)) -> tuple[Tensor, Tensor]:
    """Means whose spread over images differs from unit to unit, around a pattern of each unit's own, and log-variances."""
    draw = torch.Generator().manual_seed(1)
    spread = torch.logspace(-2, 0.5, int(np.prod(shape)))[torch.randperm(int(np.prod(shape)), generator=draw)].reshape(shape)
    mean = torch.randn(shape, generator=draw) * 3 + spread * torch.randn((images, *shape), generator=draw)
    return mean, torch.randn((images, *shape), generator=draw) - 1


def gathered(mean: Tensor, logvar: Tensor, split: Sequence[int], processes: int = 1) -> LatentStatistics:
    """Statistics of batches of these sizes, each with a padding image, dealt to processes and merged."""
    parts = [LatentStatistics() for _ in range(processes)]
    for number, (m, v) in enumerate(zip(mean.split(list(split)), logvar.split(list(split)), strict=True)):
        padding = torch.full_like(mean[:1], 1e6)
        weight = torch.cat([torch.ones(len(m)), torch.zeros(1)])
        parts[number % processes].add(DiagonalGaussian(torch.cat([m, padding]), torch.cat([v, torch.zeros_like(padding)])), weight)
    whole = LatentStatistics()
    for part in parts:
        if part.sums:
            whole.merge(part.sums)
    return whole


@pytest.mark.parametrize(("split", "processes"), itertools.product(SPLITS, (1, 2)))
@pytest.mark.parametrize("shape", [(3, 4, 5), (6,)])
def test_figures_are_numpys_whatever_the_split(split: list[int], processes: int, shape: tuple[int, ...]) -> None:
    mean, logvar = moments(shape=shape)
    found = gathered(mean, logvar, split, processes)
    m, v = mean.double().numpy(), np.exp(logvar.double().numpy())
    kl = 0.5 * (m**2 + v - 1 - np.log(v))
    variance = m.var(axis=0)
    per_channel = (len(m), shape[0], -1)
    channels = found.channels()
    np.testing.assert_allclose([c.kl_nats for c in channels], kl.reshape(per_channel).sum(2).mean(0), rtol=1e-9)
    np.testing.assert_allclose([c.posterior_std for c in channels], np.sqrt(v.reshape(per_channel).mean((0, 2))), rtol=1e-9)
    np.testing.assert_allclose([c.mean_variance for c in channels], variance.reshape(shape[0], -1).mean(1), rtol=1e-9)
    np.testing.assert_allclose(found.site_kl(), kl.sum(1).mean(0), rtol=1e-9)
    assert np.array_equal(found.active_units(), variance > ACTIVE_VARIANCE)
    assert 0 < found.active_units().sum() < found.active_units().numel()
    assert np.array_equal(found.active_sites(), (variance > ACTIVE_VARIANCE).any(0))
    assert found.share_near_prior() == pytest.approx((v > 0.9).mean())
    z = np.array(found.sample_mean_and_std())
    np.testing.assert_allclose(z, (m.mean(), np.sqrt(m.var() + v.mean())), rtol=1e-9)


def test_a_pattern_that_every_image_has_is_no_activity() -> None:
    mean = torch.linspace(-5, 5, 16).reshape(1, 1, 4, 4).expand(10, 2, 4, 4).clone()
    mean[:, 1, 2, 3] += torch.arange(10)
    found = gathered(mean, torch.zeros_like(mean), [10])
    assert [c.active for c in found.channels()] == [False, True]
    assert found.active_sites().nonzero().tolist() == [[2, 3]]


def test_log_variances_at_either_end_of_the_clamp_are_counted() -> None:
    logvar = torch.zeros(4, 1, 1, 4)
    logvar[0, 0, 0, 0], logvar[1, 0, 0, 1] = LOGVAR_RANGE
    logvar[2, 0, 0, 2] = LOGVAR_RANGE[0] + 0.01
    assert gathered(torch.zeros_like(logvar), logvar, [3, 1]).share_at_clamp() == 2 / 16


def test_shares_at_the_bounds() -> None:
    values = torch.tensor([[0.1, 0.1, 1.0, 5.0], [1.0, 9.0, 9.0, 9.0]])
    low, high = share_outside(values, 0.1, 9.0)
    assert low.tolist() == [0.5, 0.0]
    assert high.tolist() == [0.0, 0.75]


def test_sharpness_is_the_share_of_edge_energy() -> None:
    images = torch.rand(3, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sharpness(images, images), torch.ones(3))
    torch.testing.assert_close(sharpness(images, 0.5 * images + 0.2), torch.full((3,), 0.25))
    assert sharpness(images, torch.zeros_like(images)).tolist() == [0, 0, 0]
    assert sharpness(torch.zeros(1, 3, 4, 4), images[:1, :, :4, :4]).tolist() == [1]
    gradient = [np.square(np.diff(images.numpy(), axis=axis)).sum((1, 2, 3)) for axis in (2, 3)]
    blurred = images.mean(-1, keepdim=True).expand_as(images)
    expected = np.square(np.diff(blurred.numpy(), axis=2)).sum((1, 2, 3)) / sum(gradient)
    np.testing.assert_allclose(sharpness(images, blurred), expected, rtol=1e-5)


# Latents shuffled between images


def batches(photos: int, crops: int, split: int, seed: int = 0) -> list[Batch]:
    """Crops of several photos in order, as a validation set gives them; each batch ends in padding."""
    count = photos * crops
    pixels = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    made = []
    for start in range(0, count, split):
        place = torch.arange(start, min(start + split, count))
        real = torch.cat([torch.ones(len(place)), torch.zeros(1)])
        place = torch.cat([place, torch.tensor([-1])])
        made.append(
            Batch(
                pixels=pixels[place], labels=place, ids=[str(i) for i in place.tolist()], noise=torch.zeros(len(place), 1), position=place,
                photo=torch.where(place < 0, -1, place // crops), weight=real, bad=[],
            )
        )  # fmt: skip
    return made


def shuffled(parts: list[Batch], likelihood: Gaussian, *, use: float = 1.0, most: int = 64, at_once: int = 7) -> Shuffled | None:
    """For a decoder whose latents are the images, used to a share."""
    shuffle = LatentShuffle(PixelRecipe(), most)
    for batch in parts:
        images = to_images(batch.pixels)
        shuffle.add(batch, images, -likelihood.log_prob(images, use * images))
    return shuffle.measure(lambda latents: use * latents, likelihood, CPU, at_once)


def test_the_choice_and_the_pairs_depend_on_no_split_or_order() -> None:
    wanted = shuffled(batches(9, 4, 36), Gaussian(0.5), most=16)
    assert wanted is not None
    for split, at_once in ((1, 3), (5, 16), (7, 1)):
        parts = batches(9, 4, split)
        assert shuffled(parts, Gaussian(0.5), most=16, at_once=at_once) == pytest.approx(wanted)
        assert shuffled(parts[::-1], Gaussian(0.5), most=16, at_once=at_once) == pytest.approx(wanted)


def test_a_decoder_that_ignores_its_latents_loses_nothing() -> None:
    found = shuffled(batches(5, 3, 4), Gaussian(0.5), use=0.0)
    assert found is not None
    assert found.delta_nats == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("photos", "crops", "most"), [(5, 3, 64), (3, 64, 64), (40, 1, 8), (2, 5, 64)])
def test_each_image_is_decoded_from_another_photo(photos: int, crops: int, most: int) -> None:
    pairs: list[tuple[float, float]] = []

    class Recording(Gaussian):
        def log_prob(self, images: Tensor, reconstruction: Tensor) -> Tensor:
            pairs.extend(zip(images.flatten(1)[:, 0].tolist(), reconstruction.flatten(1)[:, 0].tolist(), strict=True))
            return super().log_prob(images, reconstruction)

    parts = batches(photos, crops, 10)
    for batch in parts:
        batch.pixels = batch.photo.clamp(min=0).to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    found = shuffled(parts, Recording(1.0), most=most)
    again = pairs[-min(most, photos * crops) :]
    assert found is not None
    assert len(again) == min(most, photos * crops)
    assert all(own != others for own, others in again)


def test_crops_of_one_photo_are_still_decoded_from_each_other() -> None:
    found = shuffled(batches(1, 6, 6), Gaussian(0.5))
    assert found is not None
    assert found.delta_nats > 1
    assert shuffled(batches(1, 1, 1), Gaussian(0.5)) is None


def test_chosen_images_are_spread_over_the_set() -> None:
    shuffle = LatentShuffle(PixelRecipe(), 10)
    for batch in batches(1000, 1, 100):
        shuffle.add(batch, torch.zeros(len(batch.position), 1), torch.zeros(len(batch.position)))
    chosen = sorted(row.position for row in shuffle._kept)
    gaps = np.diff([-1, *chosen, 1000])
    assert len(chosen) == 10
    assert gaps.max() < 250
