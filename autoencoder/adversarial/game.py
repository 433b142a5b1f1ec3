"""Two players on one pass through the autoencoder.

The gradient of pixels and perceptual term to the reconstruction is taken once. The discriminator sees images and detached
reconstructions once: the decoder's adversarial gradient is taken to the reconstruction alone, the discriminator's to its parameters alone.
Nothing of either player can reach the other's parameters, and the sum of the decoder's two gradients goes through the autoencoder once.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from autoencoder.adversarial.gradients import attach, layer_gradient, summed_over_processes
from autoencoder.adversarial.losses import accuracy, discriminator_loss, generator_loss, r1_penalty
from autoencoder.adversarial.player import Discriminator
from autoencoder.adversarial.start import Start
from autoencoder.adversarial.weight import RunningWeight, adaptive_weight
from autoencoder.adversarial_config import AdversarialConfig
from autoencoder.missing import filled
from autoencoder.runtime.checkpoint import HasTensors, ModuleTensors
from autoencoder.runtime.config import count

Opponent = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, dict[str, Tensor], Tensor | None]]
"""(images, decoded, loss of pixels and perceptual term (B,), `valid` of the images) to that loss with the adversarial term, named
terms (B,), and for a probe the weighted adversarial term by itself (B,), where there is one."""


class Game:
    """The adversarial term over a run.

    Args:
        layer: the decoder's last convolution's weight, whose gradients the adaptive weight compares.
        shape: (C, H, W) of the images.
        batch_size: images of an optimiser step.
        precision: the dtype that the discriminator computes in under autocast; None for that of its inputs.
    """

    def __init__(
        self,
        config: AdversarialConfig,
        *,
        layer: nn.Parameter,
        shape: tuple[int, int, int],
        batch_size: int,
        seed: int,
        device: torch.device,
        precision: torch.dtype | None = None,
    ) -> None:
        self.config, self.layer, self.batch_size, self.precision = config, layer, batch_size, precision
        self.player = Discriminator(config, shape=shape, seed=seed, device=device)
        self.start = Start(config, dims=shape[0] * shape[1] * shape[2], device=device)
        self.running = RunningWeight(count(config.memory_images, "memory_images"), device)
        self.applied = torch.zeros((), device=device)
        """The adversarial weight of the last step that had one, ramp and gate included: shown, and what a probe has."""
        self._seen = 0
        self._played = False
        self._layer_gradients: Tensor | None = None

    def opponent(self, weight: Tensor, seen: int, *, probe: bool = False) -> Opponent | None:
        """What the objective plays against, for a microbatch of `weight` (B,) in the step before which `seen` images were; None as long as
        there is none. A `probe` leaves both players as they are and has the adversarial weight of the last step."""
        if not probe:
            self._seen = seen
        if not self.start.begun(seen):
            return None
        if probe:
            return partial(self._probe, loud=self.start.loudness(seen) > 0)
        return partial(self._play, weight=weight)

    def _play(
        self, images: Tensor, decoded: Tensor, fidelity: Tensor, valid: Tensor | None, *, weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], None]:
        channels, each = images.shape[1], weight.view(-1, 1, 1, 1)
        (descent,) = torch.autograd.grad(fidelity.sum(), decoded)  # (B, C or 2C, H, W)
        leaf = decoded.detach()[:, :channels].requires_grad_()
        real, fake = self._judge(images, filled(leaf, images.to(leaf), valid))
        adversarial = generator_loss(self.config.name, fake)
        (against,) = torch.autograd.grad(adversarial.sum(), leaf, retain_graph=True)
        own = discriminator_loss(self.config.name, real, fake)
        named = {
            "adversarial": adversarial,
            "discriminator_loss": own,
            "discriminator_accuracy": accuracy(real.detach(), fake.detach(), valid),
        }
        # By the step, a ceiling as the last batch before a run was lengthened may have been short.
        if self.config.r1 > 0 and -(-self._seen // self.batch_size) % self.config.r1_every == 0:
            named["r1"] = r1_penalty(self.player.network, images)
            own = own + 0.5 * self.config.r1 * self.config.r1_every * named["r1"]
        self.player.backward((own * weight).sum())
        self._played = True

        named = {name: value.detach() for name, value in named.items()}
        strength = self._strength(decoded, each * descent, each * against, weight)
        if strength is None:
            return attach(decoded, fidelity, descent), named, None
        self.applied = strength
        gradient = descent.clone()
        gradient[:, :channels] += strength * against
        return attach(decoded, fidelity + strength * adversarial, gradient), named, None

    def _probe(
        self, images: Tensor, decoded: Tensor, fidelity: Tensor, valid: Tensor | None, *, loud: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        reconstruction = filled(decoded[:, : images.shape[1]], images, valid)
        # Frozen while its graph is made: whoever takes the loss's gradient moves nothing of the discriminator's.
        trained = self.player.optimizer.parameters()
        for parameter in trained:
            parameter.requires_grad_(False)
        real, fake = self._judge(images, reconstruction)
        for parameter in trained:
            parameter.requires_grad_(True)
        adversarial = generator_loss(self.config.name, fake)
        named = {"adversarial": adversarial, "discriminator_loss": discriminator_loss(self.config.name, real, fake)}
        named = {name: value.detach() for name, value in named.items()}
        if not loud:
            return fidelity, named, None
        return fidelity + self.applied * adversarial, named, self.applied * adversarial

    def _judge(self, images: Tensor, reconstruction: Tensor) -> list[Tensor]:
        """Logits of images and reconstructions, (B, 1, h, w) each, at least fp32."""
        with torch.autocast(images.device.type, dtype=self.precision, enabled=self.precision is not None):
            logits = self.player.network(torch.cat((images.to(reconstruction), reconstruction)))
        return list(logits.to(torch.promote_types(logits.dtype, torch.float32)).chunk(2))

    def _strength(self, decoded: Tensor, descent: Tensor, against: Tensor, weight: Tensor) -> Tensor | None:
        """The weight of the decoder's adversarial loss in this step; None where it is not to hear it yet."""
        loudness = self.start.loudness(self._seen) * self.config.weight
        base = torch.ones_like(self.applied)
        if self.config.weighting != "fixed":
            rows = against.shape[1]
            padded = torch.nn.functional.pad(against, (0, 0, 0, 0, 0, decoded.shape[1] - rows))
            both = torch.stack([layer_gradient(decoded, self.layer, gradient)[:rows] for gradient in (descent, padded)])
            if self.config.weighting == "step":
                both, images = summed_over_processes([both, weight.sum()])
                base = adaptive_weight(both / images, self.config.ratio_bound)
            else:
                self._layer_gradients = both if self._layer_gradients is None else self._layer_gradients + both
                base = self.running.value
        return base * loudness * self.player.heard if loudness else None

    def finish_gradients(self, images: int) -> dict[str, Tensor]:
        """Make the discriminator's gradients those of the mean over all processes' `images`; returns global figures of the step."""
        if not self._played:
            return {}
        layer = [] if self._layer_gradients is None else [self._layer_gradients]
        summed = summed_over_processes([*self.player.gradients(), *layer])
        if layer:
            self._layer_gradients = summed.pop() / images
        return {"discriminator_gradient_norm": self.player.finish(summed, images)}

    def update(self, means: dict[str, Tensor], images: int, found_inf: Tensor, lr_factor: float) -> None:
        """Move the discriminator and all that follows the step's global means; not where `found_inf` is 1."""
        if self._played:
            self.player.update(means["discriminator_accuracy"], images, found_inf, lr_factor)
            if self._layer_gradients is not None:
                self.running.update(adaptive_weight(self._layer_gradients, self.config.ratio_bound), images, found_inf)
        else:
            # Values that are missing have no part in the NLL.
            self.start.update(means["nll_nats"] / means.get("valid_share", 1), self._seen, images, found_inf)
        self._played, self._layer_gradients = False, None

    def scalars(self) -> dict[str, float]:
        """What a log line shows: the weight as it was last applied; nothing before the start."""
        if not self.start.begun(self._seen):
            return {}
        heard = self.start.loudness(self._seen) > 0
        return {"adversarial_weight": self.applied.item() if heard else 0.0}

    def held(self) -> dict[str, HasTensors]:
        """For the checkpoint."""
        return {
            "discriminator": ModuleTensors(self.player.network),
            "discriminator_optimizer": self.player.optimizer,
            "adversarial": self,
        }

    def tensors(self) -> dict[str, Tensor]:
        parts = {f"{name}.{key}": value for name, part in self._parts().items() for key, value in part.tensors().items()}
        return {"applied": self.applied, **parts}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.applied = tensors["applied"].to(self.applied.device)
        for name, part in self._parts().items():
            part.load_tensors({key.removeprefix(f"{name}."): v for key, v in tensors.items() if key.startswith(f"{name}.")})

    def _parts(self) -> dict[str, HasTensors]:
        return {"start": self.start, "weight": self.running, "accuracy": self.player.accuracy}
