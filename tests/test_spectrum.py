"""Spectra against scipy's transform, Parseval's identity, and maps whose spectrum is known."""

import math

import pytest
import torch
from scipy.fft import dctn

from autoencoder.spectrum import Spectrum, cosine_power, frequency


def test_power_is_that_of_scipys_orthonormal_cosine_transform() -> None:
    maps = torch.randn(2, 3, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(dctn(maps.numpy(), axes=(2, 3), norm="ortho") ** 2)
    torch.testing.assert_close(cosine_power(maps), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cosine_power(maps).sum((2, 3)), maps.square().sum((2, 3)))


def wave(side: int, k: int) -> torch.Tensor:
    row = torch.cos(math.pi * (torch.arange(side, dtype=torch.float64) + 0.5) * k / side)
    return row.expand(1, 1, side, side)


@pytest.mark.parametrize(("k", "octave"), [(15, 0), (9, 0), (8, 1), (5, 1), (3, 2), (1, 4)])
def test_a_wave_lies_in_its_octave_alone(k: int, octave: int) -> None:
    spectrum = Spectrum()
    spectrum.add(3 + wave(16, k))
    shares = [band["share"] for band in spectrum.octaves()]
    expected = [float(i == octave) for i in range(len(shares))]
    assert shares == pytest.approx(expected, abs=1e-12)
    assert spectrum.octaves()[octave]["above"] < k / 16 <= 2 * spectrum.octaves()[octave]["above"]


def test_octaves_share_out_all_of_the_energy_and_white_noise_by_area() -> None:
    spectrum = Spectrum()
    spectrum.add(torch.randn(400, 2, 16, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 50.0])[:, None, None])
    bands = spectrum.octaves()
    assert sum(band["share"] for band in bands) == pytest.approx(1)
    where = frequency(16, 16)
    assert bands[0]["share"] == pytest.approx(((where > 0.5).sum() / 255).item(), abs=0.005)
    assert all(ring["power"] == pytest.approx(1, abs=0.15) for ring in spectrum.radial())


def test_channels_count_alike_and_a_constant_one_not_at_all() -> None:
    spectrum = Spectrum()
    maps = torch.cat([wave(8, 7), 1000 * wave(8, 1), torch.ones(1, 1, 8, 8, dtype=torch.float64)], 1)
    spectrum.add(maps)
    shares = [band["share"] for band in spectrum.octaves()]
    assert shares[0] == pytest.approx(0.5) and shares[-1] == pytest.approx(0.5)


def test_a_spectrum_without_maps_says_so() -> None:
    with pytest.raises(ValueError, match="no maps"):
        Spectrum().octaves()
