"""An autoencoder with the latents' normalisation folded in, against the one without."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoder.model import AutoencoderKL, decode, encode
from diffusion.fold import fold

from diffusers import AutoencoderKL as StockAutoencoderKL  # isort: skip  (after ours: model.py)

KINDS = {
    "with both": {"use_quant_conv": True, "use_post_quant_conv": True},
    "like FLUX": {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159, "scaling_factor": 0.3611},
    "with one": {"use_quant_conv": True, "use_post_quant_conv": False},
}


def network(kind: str, latent_channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(len(kind))
    levels: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    widths: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": latent_channels, "sample_size": 16}
    return AutoencoderKL(**levels, **widths, **KINDS[kind]).eval()


def statistics(channels: int, seed: int) -> tuple[list[float], list[float]]:
    rng = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(channels, generator=rng, dtype=torch.float64)
    return mean.tolist(), torch.randn(channels, generator=rng, dtype=torch.float64).exp().tolist()


def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def columns(mean: list[float], std: list[float]) -> tuple[Tensor, Tensor]:
    m, s = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return m, s


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "seed"), [(4, 0), (4, 1), (16, 2)])
def test_folded_and_unfolded_agree(kind: str, channels: int, seed: int) -> None:
    vae, (mean, std) = network(kind, channels), statistics(channels, seed)
    folded, (m, s) = fold(vae, mean, std), columns(mean, std)
    own, normalised = encode(vae, images()), encode(folded, images())
    # In units of the data's deviation, which normalised latents have.
    torch.testing.assert_close(normalised.mean, (own.mean - m) / s, rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised.logvar, own.logvar - 2 * s.log(), rtol=0, atol=1e-5)
    latents = torch.randn(own.mean.shape, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(decode(folded, latents), decode(vae, latents * s + m), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_stock_diffusers_reads_the_folded_folder_alike(kind: str, tmp_path: Path) -> None:
    vae, (mean, std) = network(kind), statistics(4, 3)
    (m, s), own = columns(mean, std), encode(vae, images())
    fold(vae, mean, std).save_pretrained(tmp_path)
    stock = StockAutoencoderKL.from_pretrained(tmp_path)
    posterior = stock.encode(images()).latent_dist
    torch.testing.assert_close(posterior.mean, (own.mean - m) / s, rtol=0, atol=1e-5)
    torch.testing.assert_close(posterior.logvar, own.logvar - 2 * s.log(), rtol=0, atol=1e-5)
    torch.testing.assert_close(stock.decode(posterior.mean).sample, decode(vae, own.mean), rtol=0, atol=1e-5)
    # What stock pipelines of any kind do with latents leaves them as they are.
    assert stock.config["scaling_factor"] == 1
    assert [stock.config[key] for key in ("shift_factor", "latents_mean", "latents_std")] == [None] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_is_untouched(kind: str) -> None:
    vae = network(kind)
    weights, config = copy.deepcopy(vae.state_dict()), dict(vae.config)
    fold(vae, *statistics(4, 4))
    assert vae.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())
    assert dict(vae.config) == config


@torch.no_grad()
def test_folding_is_undone_by_the_inverse() -> None:
    vae, (mean, std) = network("with both"), statistics(4, 5)
    back = fold(fold(vae, mean, std), [-m / s for m, s in zip(mean, std, strict=True)], [1 / s for s in std])
    for name, value in vae.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value, rtol=0, atol=1e-5)
