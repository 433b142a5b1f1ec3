"""What the adaptive weight costs: our one gradient to the reconstruction against its definition by two gradients through the whole graphs.

A step of both players on the same network and batch, timed in four ways in turn, over and over: written out plainly and by the project's
objective, each with a fixed weight and with the adaptive one. The weights of both are compared. Writes
benchmarks/results/adaptive-weight-<device>.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import frame
import torch
from torch import Tensor

from autoencoder.adversarial.game import Game
from autoencoder.adversarial.losses import discriminator_loss, generator_loss
from autoencoder.config import ModelConfig
from autoencoder.model import Autoencoder, build
from autoencoder.objective import Objective
from autoencoder.objective_config import ObjectiveConfig, PerceptualConfig
from autoencoder.perceptual import build_perceptual
from autoencoder.posterior import DiagonalGaussian

KL_WEIGHT = 1e-6


class Step:
    """A network, an objective and a batch; each of its methods is one step of both players, without the optimisers."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(0)
        self.vae = Autoencoder(build(ModelConfig(preset=options.preset), channels=3, resolution=options.resolution)).to(device)
        perceptual = PerceptualConfig(name="lpips", net=options.lpips, weights="random")
        distance = build_perceptual(perceptual)
        assert distance is not None
        self.objective = Objective(ObjectiveConfig(convention="ldm", perceptual=perceptual), distance.to(device))
        self.images = torch.rand(options.batch, 3, options.resolution, options.resolution, device=device) * 2 - 1
        with torch.no_grad():
            side = self.vae(self.images[:1], torch.zeros((), device=device)).mean.shape
        self.noise = torch.randn(options.batch, *side[1:], device=device)
        self.weight, self.scale = torch.ones(options.batch, device=device), torch.tensor(0.1, device=device)
        self.layer = self.vae.vae.decoder.conv_out.weight
        self.games = {weighting: self._game(weighting, options, device) for weighting in ("fixed", "step")}

    def _game(self, weighting: Any, options: argparse.Namespace, device: torch.device) -> Game:
        config = frame.players_at_once(weighting, width=options.width)
        shape = (3, options.resolution, options.resolution)
        return Game(config, layer=self.layer, shape=shape, batch_size=options.batch, seed=0, device=device)

    def ours(self, weighting: str) -> Tensor:
        """The project's objective and its opponent."""
        game, output = self.games[weighting], self.vae(self.images, self.noise)
        posterior = DiagonalGaussian(output.mean, output.logvar)
        opponent = game.opponent(self.weight, 0)
        terms = self.objective(self.images, posterior, output.decoded, scale=self.scale, kl_weight=KL_WEIGHT, opponent=opponent)
        terms.loss.mean().backward()
        game.finish_gradients(len(self.images))
        return game.applied

    def plain(self, weighting: str) -> Tensor:
        """LDM's loss as it is written, with the discriminator frozen in the decoder's step and one pass through the autoencoder."""
        discriminator, output = self.games[weighting].player.network, self.vae(self.images, self.noise)
        reconstruction = output.decoded
        assert self.objective.perceptual is not None
        distance = self.objective.perceptual(self.images, reconstruction)[:, None, None, None]
        fidelity = ((self.images - reconstruction).abs() + distance).sum() / len(self.images)
        kl = DiagonalGaussian(output.mean, output.logvar).kl_to_standard_normal().mean()
        discriminator.requires_grad_(False)
        against = generator_loss("hinge", discriminator(reconstruction)).mean()
        weight = torch.ones((), device=fidelity.device)
        if weighting == "step":
            first, second = (torch.autograd.grad(loss, self.layer, retain_graph=True)[0] for loss in (fidelity, against))
            weight = (first.norm() / (second.norm() + 1e-4)).clamp(0, 1e4)
        (fidelity + KL_WEIGHT * kl + weight * against).backward()
        discriminator.requires_grad_(True)
        real, fake = discriminator(torch.cat((self.images, reconstruction.detach()))).chunk(2)
        discriminator_loss("hinge", real, fake).mean().backward()
        return weight

    def timed(self, step: Callable[[str], Tensor], weighting: str) -> tuple[float, Tensor]:
        """Seconds of a step: of the device, or of the processor's time where that is the device, which other load does not lengthen."""
        for module in (self.vae, *(game.player.network for game in self.games.values())):
            module.zero_grad(set_to_none=True)
        cuda = self.images.is_cuda
        if cuda:
            torch.cuda.synchronize()
        clock = time.perf_counter if cuda else time.process_time
        begun = clock()
        weight = step(weighting)
        if cuda:
            torch.cuda.synchronize()
        return clock() - begun, weight


def main() -> None:
    """Measure and write the result."""
    parser = frame.parser(__doc__)
    parser.add_argument("--preset", default="tiny", choices=["tiny", "kl-f4", "kl-f8", "kl-f16"])
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=16, help="of the discriminator's first layer")
    parser.add_argument("--lpips", default="squeeze", choices=["vgg", "alex", "squeeze"], help="its backbone, with random weights")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = Step(options, device)
    ways = {f"{name}, {weighting}": (step, weighting) for name, step in (("plain", steps.plain), ("ours", steps.ours))
            for weighting in ("fixed", "step")}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    weights: dict[str, float] = {}
    for turn in range(options.rounds + 2):
        for name, (step, weighting) in ways.items():
            taken, weight = steps.timed(step, weighting)
            weights[name] = weight.item()
            if turn >= 2:
                seconds[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    added = {who: medians[f"{who}, step"] - medians[f"{who}, fixed"] for who in ("plain", "ours")}
    device_name = frame.device_name()
    result = {
        **frame.made_with(device_name),
        "setting": {key: getattr(options, key) for key in ("preset", "resolution", "batch", "width", "lpips", "rounds")},
        "milliseconds_a_step": {name: round(1000 * median, 2) for name, median in medians.items()},
        "milliseconds_of_the_adaptive_weight": {who: round(1000 * value, 2) for who, value in added.items()},
        "step_by_definition_over_ours": round(medians["plain, step"] / medians["ours, step"], 3),
        "adaptive_weight": {who: weights[f"{who}, step"] for who in ("plain", "ours")},
        "relative_difference": abs(weights["ours, step"] / weights["plain, step"] - 1),
    }
    print(json.dumps(result, indent=1))
    file = frame.result_file("adaptive-weight", device_name)
    frame.write(file, result)
    frame.say_written(file)


if __name__ == "__main__":
    main()
