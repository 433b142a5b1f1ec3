"""The adversarial term of the objective against autograd references and LDM's loss written out; its start, weight and gate."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from autoencoder.adversarial.game import Game
from autoencoder.adversarial.gradients import attach
from autoencoder.adversarial.losses import accuracy
from autoencoder.adversarial.patchgan import PatchGAN
from autoencoder.adversarial.start import Start
from autoencoder.adversarial.weight import RunningWeight, adaptive_weight
from autoencoder.adversarial_config import AdversarialConfig
from autoencoder.objective import Objective, Terms
from autoencoder.objective_config import KLConfig, LikelihoodConfig, ObjectiveConfig, PerceptualConfig
from autoencoder.perceptual import LPIPSDistance
from autoencoder.posterior import DiagonalGaussian
from autoencoder.runtime.errors import ConfigError

CPU = torch.device("cpu")
GOOD, BAD = torch.zeros(()), torch.ones(())
"""`found_inf` of a finite and of a non-finite step."""
AT_ONCE: dict[str, Any] = {"start": 0, "warmup_images": 0, "ramp_images": 0, "gate": (0.0, 1.0), "width": 4, "layers": 2}


class Codec(nn.Module):
    """Images (B, 3, 24, 24) through four latent channels and back; `outputs` channels come out."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, 4, stride=4)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(4, 8, 4, stride=4), nn.SiLU())
        self.conv_out = nn.Conv2d(8, outputs, 3, padding=1)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[DiagonalGaussian, Tensor]:
        posterior = DiagonalGaussian(*self.encoder(images).chunk(2, dim=1))
        return posterior, self.conv_out(self.decoder(posterior.sample(noise)))


def codec(outputs: int = 3) -> Codec:
    torch.manual_seed(0)
    return Codec(outputs).double()


def batch(images: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(images, 3, 24, 24, generator=generator, dtype=torch.float64) * 2 - 1
    return pixels, torch.randn(images, 4, 6, 6, generator=generator, dtype=torch.float64)


def game(vae: Codec, batch_size: int = 4, **settings: Any) -> Game:
    config = AdversarialConfig(**{"name": "hinge", **AT_ONCE, **settings})
    made = Game(config, layer=vae.conv_out.weight, shape=(3, 24, 24), batch_size=batch_size, seed=0, device=CPU)
    made.player.network.double()
    return made


def play(
    objective: Objective, vae: Codec, made: Game, pixels: Tensor, noise: Tensor, *, weight: Tensor | None = None, seen: int = 0,
    scale: Tensor | None = None,
) -> Terms:  # fmt: skip
    posterior, decoded = vae(pixels, noise)
    weight = torch.ones(len(pixels), dtype=torch.float64) if weight is None else weight
    scale = torch.tensor(0.1, dtype=torch.float64) if scale is None else scale
    return objective(pixels, posterior, decoded, scale=scale, kl_weight=0.5, opponent=made.opponent(weight, seen))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_an_attached_gradient_is_that_of_the_graph_it_stands_for() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 5, dtype=torch.float64)
    share = torch.tensor([1.0, 0.0, 0.25], dtype=torch.float64)
    y = x @ weight
    (expected,) = torch.autograd.grad((y.exp().sum(1) * share).sum(), weight, retain_graph=True)
    value = y.exp().sum(1)
    attached = attach(y, value, y.detach().exp())
    assert torch.equal(attached.detach(), value.detach())
    (actual,) = torch.autograd.grad((attached * share).sum(), weight)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("scale", ["fixed", "pixel"])
def test_the_adaptive_weight_is_that_of_two_gradients_through_the_whole_graph(scale: Any) -> None:
    objective = Objective(ObjectiveConfig(likelihood=LikelihoodConfig(scale=scale, value=0.5)), Distance())
    vae, (pixels, noise) = codec(6 if scale == "pixel" else 3), batch()
    made = game(vae, weighting="step", weight=1.0, ratio_bound=1e4)
    play(objective, vae, made, pixels, noise, scale=torch.tensor(0.5, dtype=torch.float64))

    _, decoded = vae(pixels, noise)
    fidelity = -objective.likelihood(0.5).log_prob(pixels, decoded) + pixels[0].numel() * Distance()(pixels, decoded[:, :3])
    adversarial = -made.player.network(decoded[:, :3]).mean()
    losses = (fidelity.mean(), adversarial)
    # Log scales have rows of their own, which the discriminator does not see.
    first, second = (torch.autograd.grad(loss, vae.conv_out.weight, retain_graph=True)[0][:3] for loss in losses)
    expected = (first.norm() / (second.norm() + 1e-4)).clamp(0, 1e4).item()
    assert 0 < expected < 1e4
    assert made.applied.item() == pytest.approx(expected, rel=1e-5)


def test_the_running_weight_is_the_same_however_a_step_is_split() -> None:
    objective, (pixels, noise) = Objective(ObjectiveConfig(), None), batch(6)
    found = []
    for parts in ([range(6)], [range(2), range(2, 5), [5, 5, 5]]):
        vae = codec()
        made = game(vae, batch_size=6)
        for part in parts:
            rows = list(part)
            # The last microbatch repeats an image as padding.
            weight = torch.tensor([1.0 if rows.index(row) == i else 0.0 for i, row in enumerate(rows)], dtype=torch.float64)
            terms = play(objective, vae, made, pixels[rows], noise[rows], weight=weight)
            ((terms.loss * weight).sum() / 6).backward()
        norm = made.finish_gradients(6)["discriminator_gradient_norm"]
        grads = gradients(vae) | {f"discriminator.{k}": v for k, v in gradients(made.player.network).items()}
        made.update({"discriminator_accuracy": torch.tensor(0.5)}, 6, GOOD, 1.0)
        found.append((norm.double(), made.running.value.double(), grads))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=0)
    assert found[0][1] > 0
    for name, value in found[0][2].items():
        torch.testing.assert_close(value, found[1][2][name], rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("scale", ["analytic", "learned", "pixel"])
@pytest.mark.parametrize("name", ["hinge", "non_saturating"])
def test_each_player_gets_its_own_gradient_and_nothing_of_the_others(scale: Any, name: Any) -> None:
    config = ObjectiveConfig(likelihood=LikelihoodConfig(scale=scale), perceptual=PerceptualConfig(name="ssim", window=5, weight=0.2))
    objective, (pixels, noise) = Objective(config, Distance()), batch()
    vae = codec(6 if scale == "pixel" else 3)
    made = game(vae, name=name, weighting="fixed", weight=30.0)
    given = torch.tensor(0.2, dtype=torch.float64, requires_grad=scale == "learned")
    terms = play(objective, vae, made, pixels, noise, scale=given)
    terms.loss.mean().backward()
    made.finish_gradients(4)
    actual, slope = gradients(vae), given.grad
    vae.zero_grad()
    given.grad = None

    network = made.player.network
    posterior, decoded = vae(pixels, noise)
    reconstruction = decoded[:, :3]
    nll = -objective.likelihood(given).log_prob(pixels, decoded)
    weighted = 0.2 * pixels[0].numel() * Distance()(pixels, reconstruction)
    logits = network(reconstruction)
    against = -logits if name == "hinge" else -nn.functional.logsigmoid(logits)
    kl = posterior.kl_to_standard_normal()
    expected = nll + weighted + 0.5 * kl + 30.0 * against.flatten(1).mean(1)
    torch.testing.assert_close(terms.loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(terms.named["elbo_nats"], -nll - kl)
    (kept,) = (gradients(network),)
    expected.mean().backward()
    for parameter, value in gradients(vae).items():
        torch.testing.assert_close(actual[parameter], value, rtol=1e-8, atol=1e-10)
    if scale == "learned":
        assert slope is not None and given.grad is not None
        torch.testing.assert_close(slope, given.grad)

    network.zero_grad()
    real, fake = network(pixels), network(reconstruction.detach())
    if name == "hinge":
        loss = 0.5 * (relu(1 - real).mean() + relu(1 + fake).mean())
    else:
        loss = -0.5 * (nn.functional.logsigmoid(real).mean() + nn.functional.logsigmoid(-fake).mean())
    loss.backward()
    share = min(1.0, 1.0 / nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None]).item())
    for parameter, value in gradients(network).items():
        torch.testing.assert_close(kept[parameter], share * value, rtol=1e-5, atol=1e-10)


class Distance(nn.Module):
    """Any distance, one number an image."""

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return (images - reconstruction).abs().pow(1.5).flatten(1).mean(1)


def test_twenty_steps_of_the_ldm_objective_are_those_of_its_written_out_loss() -> None:
    """LPIPSWithDiscriminator (Rombach et al. 2022) with both players' updates made from one forward pass, and GroupNorm in place of the
    discriminator's BatchNorm; its optimiser begins with it."""
    lpips = LPIPSDistance("squeeze", "random").double()
    start, images = 6, 4
    config = ObjectiveConfig(
        convention="ldm", kl=KLConfig(weight=1e-6), perceptual=PerceptualConfig(name="lpips", net="squeeze", weights="random")
    )
    objective = Objective(config, lpips)
    vae, theirs = codec(), codec()
    made = game(vae, weighting="step", weight=0.5, ratio_bound=1e4, start=start * images, lr=1e-3, clip_norm=None)
    network = PatchGAN(3, width=4, layers=2, seed=0).double()
    ours = torch.optim.Adam(vae.parameters(), lr=1e-3, betas=(0.5, 0.9))
    opt_ae = torch.optim.Adam(theirs.parameters(), lr=1e-3, betas=(0.5, 0.9))
    opt_disc = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for step in range(20):
        pixels, noise = batch(images, seed=step)
        posterior, decoded = vae(pixels, noise)
        weight = torch.ones(images, dtype=torch.float64)
        opponent = made.opponent(weight, step * images)
        terms = objective(pixels, posterior, decoded, scale=torch.tensor(0.1), kl_weight=1e-6, opponent=opponent)
        terms.loss.mean().backward()
        made.finish_gradients(images)
        ours.step()
        ours.zero_grad()
        made.update({name: value.mean() for name, value in terms.named.items()}, images, GOOD, 1.0)

        their_posterior, reconstructions = theirs(pixels, noise)
        p_loss = lpips(pixels, reconstructions)[:, None, None, None]
        rec_loss = torch.abs(pixels - reconstructions) + 1.0 * p_loss
        nll_loss = rec_loss / math.exp(0.0) + 0.0
        nll_loss = torch.sum(nll_loss) / nll_loss.shape[0]
        kl_loss = their_posterior.kl_to_standard_normal()
        kl_loss = torch.sum(kl_loss) / kl_loss.shape[0]
        disc_factor = 1.0 if step >= start else 0.0
        g_loss = -torch.mean(network(reconstructions))
        last_layer = theirs.conv_out.weight
        nll_grads = torch.autograd.grad(nll_loss, last_layer, retain_graph=True)[0]
        g_grads = torch.autograd.grad(g_loss, last_layer, retain_graph=True)[0]
        d_weight = torch.norm(nll_grads) / (torch.norm(g_grads) + 1e-4)
        d_weight = torch.clamp(d_weight, 0.0, 1e4).detach() * 0.5
        loss = nll_loss + 1e-6 * kl_loss + d_weight * disc_factor * g_loss
        d_loss = disc_factor * 0.5 * (relu(1.0 - network(pixels)).mean() + relu(1.0 + network(reconstructions.detach())).mean())
        opt_ae.zero_grad()
        loss.backward()
        opt_ae.step()
        if step >= start:
            opt_disc.zero_grad()
            d_loss.backward()
            opt_disc.step()
            assert made.applied.item() == pytest.approx(d_weight.item(), rel=1e-6)
            assert terms.named["adversarial"].mean().item() == pytest.approx(g_loss.item(), rel=1e-6)
            assert terms.named["discriminator_loss"].mean().item() == pytest.approx(d_loss.item(), rel=1e-6)
        assert terms.named["perceptual"].mean().item() == pytest.approx(p_loss.mean().item(), rel=1e-6)
        assert terms.named["kl_nats"].mean().item() == pytest.approx(kl_loss.item(), rel=1e-6)
        assert terms.loss.mean().item() == pytest.approx(loss.item(), rel=1e-6)
    for mine, other in ((vae, theirs), (made.player.network, network)):
        for name, value in mine.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-4, atol=1e-7)


def test_the_weight_waits_for_the_warm_up_and_rises_over_the_ramp() -> None:
    config = AdversarialConfig(name="hinge", start=100, warmup_images=40, ramp_images=20)
    start = Start(config, dims=10, device=CPU)
    assert [start.begun(images) for images in (0, 99, 100, 500)] == [False, False, True, True]
    assert [start.loudness(images) for images in (100, 139, 140, 145, 150, 160, 500)] == [0, 0, 0, 0.25, 0.5, 1, 1]
    at_once = Start(AdversarialConfig(name="hinge", start=100, warmup_images=0, ramp_images=0), dims=10, device=CPU)
    assert at_once.loudness(100) == 1


def test_a_plateau_is_two_windows_between_which_the_nll_falls_by_less_than_a_hundredth_of_a_nat_a_value() -> None:
    start = Start(AdversarialConfig(name="hinge", plateau_images=20), dims=10, device=CPU)
    # Steps of 10 images, window means 100, 50, 49.85, 49.77 nats over 10 values: falls of 5, 0.015 and 0.008 a value.
    values = [110, 90, 50, 50, 49.8, 49.9, 49.77, 49.77]
    begun = []
    for step, nll in enumerate(values):
        start.update(torch.tensor(float(nll)), step * 10, 10, GOOD)
        # A non-finite step neither counts nor spoils the mean.
        begun.append(start.at)
    assert begun == [None] * 7 + [80]
    assert not start.begun(79) and start.begun(80)


def test_non_finite_steps_leave_no_trace_in_the_state() -> None:
    start = Start(AdversarialConfig(name="hinge", plateau_images=20), dims=10, device=CPU)
    start.update(torch.tensor(5.0), 0, 10, GOOD)
    start.update(torch.tensor(torch.nan), 10, 5, BAD)
    assert start.tensors()["sum"].item() == 50 and start.tensors()["images"].item() == 10
    running = RunningWeight(100, CPU)
    assert running.value.item() == 0
    running.update(torch.tensor(4.0), 10, GOOD)
    for value, flag in ((torch.nan, GOOD), (7.0, BAD), (torch.inf, GOOD)):
        running.update(torch.tensor(value), 10, flag)
    assert running.value.item() == pytest.approx(4)
    running.update(torch.tensor(4.0), 10, GOOD)
    assert running.value.item() == pytest.approx(4)


def test_the_running_weight_is_a_geometric_mean() -> None:
    running, expected, mass, keep = RunningWeight(50, CPU), 0.0, 0.0, math.exp(-10 / 50)
    for value in (4.0, 9.0, 1.0):
        running.update(torch.tensor(value), 10, GOOD)
        expected, mass = keep * expected + (1 - keep) * math.log(value), keep * mass + (1 - keep)
        assert running.value.item() == pytest.approx(math.exp(expected / mass), rel=1e-5)


def test_the_adaptive_weight_is_bounded_where_it_is_to_be_and_finite_without_a_gradient() -> None:
    one, none = torch.ones(4), torch.zeros(4)
    assert adaptive_weight(torch.stack((one * 1e9, one)), 1e4).item() == 1e4
    assert adaptive_weight(torch.stack((one * 1e9, one))).item() == pytest.approx(1e9, rel=1e-3)
    assert adaptive_weight(torch.stack((none, one))).item() == 0
    assert adaptive_weight(torch.stack((one, none))).item() == pytest.approx(2e4)


def played(made: Game, vae: Codec, right: float, steps: int = 30) -> tuple[dict[str, Tensor], float]:
    """The discriminator's change over a step, and the weight applied in it, after `steps` steps in which it was right of that share."""
    for _ in range(steps):
        made.player.accuracy.update(torch.tensor(right), 100, GOOD)
    before = {name: value.clone() for name, value in made.player.network.state_dict().items()}
    terms = play(Objective(ObjectiveConfig(), None), vae, made, *batch())
    terms.loss.mean().backward()
    made.finish_gradients(4)
    made.update({"discriminator_accuracy": torch.tensor(right)}, 4, GOOD, 1.0)
    return {name: value - before[name] for name, value in made.player.network.state_dict().items()}, made.applied.item()


def test_the_gate_holds_a_discriminator_that_wins_and_silences_one_that_guesses() -> None:
    vae = codec()
    for right, moves, weight in ((0.9, False, 3.0), (0.7, True, 3.0), (0.5, True, 0.0)):
        moved, applied = played(game(vae, gate=(0.6, 0.8), weighting="fixed", weight=3.0), vae, right)
        assert (sum(change.abs().sum().item() for change in moved.values()) > 0) == moves
        assert applied == weight


@pytest.mark.parametrize("found_inf", [GOOD, BAD])
def test_a_non_finite_step_moves_neither_the_discriminator_nor_its_optimiser(found_inf: Tensor) -> None:
    vae = codec()
    made = game(vae)
    for flag in (GOOD, found_inf):
        before = {name: value.clone() for name, value in {**made.player.network.state_dict(), **made.player.optimizer.tensors()}.items()}
        state = {name: value.clone() for name, value in made.tensors().items()}
        play(Objective(ObjectiveConfig(), None), vae, made, *batch()).loss.mean().backward()
        made.finish_gradients(4)
        made.update({"discriminator_accuracy": torch.tensor(0.5)}, 4, flag, 1.0)
    after = {**made.player.network.state_dict(), **made.player.optimizer.tensors()}
    same = all(torch.equal(value, after[name]) for name, value in before.items())
    assert same == bool(found_inf)
    moved = {name for name, value in made.tensors().items() if not torch.equal(value, state[name])}
    # The weight that the last step had is shown, and no step follows from it.
    assert bool(moved - {"applied"}) != bool(found_inf)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"start": "soon"}, "start"),
        ({"gate": (0.9, 0.6)}, "gate"),
        ({"layers": 0}, "layers"),
        ({"weight": -1.0}, "weight"),
        ({"r1_every": 0}, "r1_every"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"memory_images": 0}, "memory_images"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: "):
        AdversarialConfig(name="hinge", **settings)


def test_patches_that_show_missing_pixels_have_no_part_in_the_accuracy() -> None:
    real, fake = torch.full((2, 1, 4, 4), -1.0), torch.full((2, 1, 4, 4), 1.0)
    real[:, :, :, 3], fake[:, :, :, 3] = 1.0, -1.0
    valid = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    valid[0, :, :, 24:] = True
    # The discriminator is right of the one column of patches that it can judge; of an image without one, all count.
    assert accuracy(real, fake, valid).tolist() == [1.0, 0.25]
    assert accuracy(real, fake).tolist() == [0.25, 0.25]


def test_a_probe_has_the_gradient_of_the_step_and_moves_nothing() -> None:
    vae, objective = codec(), Objective(ObjectiveConfig(), None)
    made = game(vae, weighting="fixed", weight=3.0)
    pixels, noise = batch()
    ones = torch.ones(4, dtype=torch.float64)
    play(objective, vae, made, pixels, noise).loss.sum().backward()
    step = gradients(vae)
    before = {name: tensor.clone() for name, tensor in made.tensors().items()}
    for held in (vae, made.player.network):
        held.zero_grad(set_to_none=True)
    posterior, decoded = vae(pixels, noise)
    scale = torch.tensor(0.1, dtype=torch.float64)
    terms = objective(pixels, posterior, decoded, scale=scale, kl_weight=0.5, opponent=made.opponent(ones, 4, probe=True))
    parts = [
        torch.autograd.grad(part.sum(), vae.conv_out.weight, retain_graph=True)[0] for name, part in terms.parts.items() if name != "kl"
    ]
    assert "adversarial" in terms.parts
    terms.loss.sum().backward()
    torch.testing.assert_close(gradients(vae), step)
    torch.testing.assert_close(sum(parts), step["conv_out.weight"])
    assert not gradients(made.player.network)
    assert all(parameter.requires_grad for parameter in made.player.network.parameters())
    assert all(torch.equal(value, made.tensors()[name]) for name, value in before.items())
