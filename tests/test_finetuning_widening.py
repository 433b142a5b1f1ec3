"""Widened networks compute what they did, and learn to use what was added."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from autoencoder.freezing import freeze
from autoencoder.model import AutoencoderKL, decode, encode
from autoencoder.posterior import DiagonalGaussian
from autoencoder.runtime.config import OptimizerConfig
from autoencoder.runtime.errors import ConfigError
from autoencoder.runtime.optim import build_optimizers
from autoencoder.widening import widen_images, widen_latents
from tests.test_ldm_names import network

KINDS: dict[str, dict[str, Any]] = {
    "quant convs": {},
    "no quant convs": {"use_quant_conv": False, "use_post_quant_conv": False},
    "one quant conv": {"use_post_quant_conv": False},
}


def small(**given: Any) -> AutoencoderKL:
    return network(**{"block_out_channels": (16,), "norm_num_groups": 4, "latent_channels": 2, **given})


def images(channels: int = 3) -> torch.Tensor:
    return torch.rand(4, channels, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_more_latent_channels_start_at_the_prior_and_unread(kind: str) -> None:
    vae, wide = small(**KINDS[kind]), small(**KINDS[kind])
    assert "from 2 to 5 latent channels" in widen_latents(wide, 5)
    before, after = encode(vae, images()), encode(wide, images())
    torch.testing.assert_close(after.mean[:, :2], before.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(after.logvar[:, :2], before.logvar, atol=1e-6, rtol=0)
    assert torch.equal(after.mean[:, 2:], torch.zeros(4, 3, 8, 8))
    assert torch.equal(after.logvar[:, 2:], torch.zeros(4, 3, 8, 8))
    torch.testing.assert_close(after.kl_to_standard_normal(), before.kl_to_standard_normal())
    latents = torch.randn(4, 5, 8, 8)
    torch.testing.assert_close(decode(wide, latents), decode(vae, latents[:, :2]), atol=1e-6, rtol=0)
    assert wide.config["latent_channels"] == 5
    # What comes out is a network of stock diffusers' own.
    stock = AutoencoderKL(**{k: v for k, v in wide.config.items() if not k.startswith("_")})
    stock.load_state_dict(wide.state_dict())
    torch.testing.assert_close(stock.encode(images()).latent_dist.mean, after.mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["quant convs", "no quant convs"])
def test_new_latent_channels_learn(kind: str) -> None:
    vae = small(**KINDS[kind])
    widen_latents(vae, 4)
    optimizer = build_optimizers(vae, OptimizerConfig(lr=3e-3))
    noise = torch.Generator().manual_seed(0)
    for step in range(40):
        posterior = encode(vae, images())
        latents = posterior.sample(torch.randn(posterior.mean.shape, generator=noise))
        loss = 100 * functional.mse_loss(decode(vae, latents), images()) + 1e-3 * posterior.kl_to_standard_normal().mean()
        loss.backward()
        if step == 0:
            # The samples of the prior reach the decoder's zeros, whose columns the encoder's gradient has to come through.
            columns = vae.decoder.conv_in.weight.grad[:, 2:]
            assert (columns.abs().amax((0, 2, 3)) > 0).all()
        optimizer.step(1.0, torch.zeros(()))
        optimizer.zero_grad()
    with torch.no_grad():
        mean = encode(vae, images()).mean
    spread = mean.var(dim=(0, 2, 3))
    # Not the prior any more, different for different images, and not twins.
    assert (spread[2:] > 1e-4).all()
    assert not torch.allclose(mean[:, 2], mean[:, 3])


@torch.no_grad()
def test_more_image_channels_start_unread_and_made_as_the_mean() -> None:
    vae, wide = small(), small()
    assert "from 3 to 5 image channels" in widen_images(wide, 5)
    posterior = encode(wide, images(5))
    torch.testing.assert_close(posterior.mean, encode(vae, images(5)[:, :3]).mean, atol=1e-6, rtol=0)
    made, before = decode(wide, posterior.mean), decode(vae, posterior.mean)
    torch.testing.assert_close(made[:, :3], before, atol=1e-6, rtol=0)
    torch.testing.assert_close(made[:, 3:], before.mean(1, keepdim=True).expand(-1, 2, -1, -1), atol=1e-5, rtol=0)
    assert (wide.config["in_channels"], wide.config["out_channels"]) == (5, 5)


@torch.no_grad()
def test_a_grey_image_has_the_moments_it_had_as_rgb() -> None:
    vae, grey = small(), small()
    widen_images(grey, 1)
    one = images(1)
    for mine, theirs in zip(moments(encode(grey, one)), moments(encode(vae, one.expand(-1, 3, -1, -1))), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    latents = torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(decode(grey, latents), decode(vae, latents).mean(1, keepdim=True), atol=1e-6, rtol=0)


def moments(posterior: DiagonalGaussian) -> tuple[torch.Tensor, torch.Tensor]:
    return posterior.mean, posterior.logvar


def test_fewer_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 1; the pretrained network has 2 and cannot be narrowed: give null"):
        widen_latents(small(), 1)
    with pytest.raises(ConfigError, match=r"takes 3: give 3 or more, or 1 \(grey\)"):
        widen_images(small(), 2)
    with pytest.raises(ConfigError, match=r"takes 4: give 4 or more$"):
        widen_images(small(in_channels=4, out_channels=4), 1)


@pytest.mark.parametrize(("train", "trains"), [("decoder", {"decoder"}), ("encoder", {"encoder", "quant_conv"})])
def test_a_frozen_half_has_no_gradient_and_no_optimiser(train: str, trains: set[str]) -> None:
    vae = small()
    freeze(vae, train)
    posterior = encode(vae, images())
    assert posterior.mean.requires_grad == (train == "encoder")
    decode(vae, posterior.mean).square().mean().backward()
    assert {name.split(".")[0] for name, p in vae.named_parameters() if p.grad is not None} == trains
    for kind in ("adamw", "muon"):
        optimizers = build_optimizers(vae, OptimizerConfig(name=kind, weight_decay=0.1), edges=("decoder.conv", "encoder.conv"))
        assert {optimizers.names[p].split(".")[0] for p in optimizers.parameters()} == trains
