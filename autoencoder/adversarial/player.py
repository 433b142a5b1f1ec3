"""The discriminator as a player of its own: network, optimiser and the gate on its accuracy."""

import math

import torch
from torch import Tensor

from autoencoder.adversarial.network import build_discriminator
from autoencoder.adversarial.patchgan import iterate_norms
from autoencoder.adversarial_config import AdversarialConfig
from autoencoder.controller import RunningMean
from autoencoder.runtime.config import count
from autoencoder.runtime.optim import Optimizers


class Discriminator:
    """A PatchGAN, or the network of a user's own class, in full precision, its AdamW, and how often it has lately been right.

    It is never wrapped for data parallelism: its gradients are sums over images that `gradients` and `finish` hand to one exchange, so
    that every process takes the same step from the same weights.
    """

    def __init__(self, config: AdversarialConfig, *, shape: tuple[int, int, int], seed: int, device: torch.device) -> None:
        self.config = config
        self.network = build_discriminator(config, shape=shape, seed=seed, device=device)
        named = {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}
        adamw = torch.optim.AdamW(named.values(), lr=config.lr, betas=config.betas, weight_decay=0.0, fused=True)
        self.optimizer = Optimizers({"adamw": adamw}, {parameter: name for name, parameter in named.items()})
        self.accuracy = RunningMean((), memory=count(config.gate_images, "gate_images"), device=device)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a microbatch's summed loss to its parameters', and to nothing else's."""
        torch.autograd.backward(loss, inputs=self.optimizer.parameters())

    def gradients(self) -> list[Tensor]:
        """Of the images so far, summed."""
        return [parameter.grad for parameter in self.optimizer.parameters() if parameter.grad is not None]

    def finish(self, gradients: list[Tensor], images: int) -> Tensor:
        """Make the sums over all processes' `images` the gradient of the mean loss, clipped; returns its norm before that."""
        parameters = self.optimizer.parameters()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        torch._foreach_div_(gradients, images)
        return torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm or math.inf)

    @property
    def heard(self) -> Tensor:
        """1 where its judgement is worth hearing, 0 where its running accuracy is below the gate."""
        return 1 - (self.accuracy.value < self.config.gate[0]).float()

    @property
    def held(self) -> Tensor:
        """1 where its running accuracy is above the gate."""
        return (self.accuracy.value > self.config.gate[1]).float()

    def update(self, accuracy: Tensor, images: int, found_inf: Tensor, factor: float) -> None:
        """One step at `factor` of its learning rate, by the global mean accuracy of the step's `images`; none where `found_inf` is 1."""
        self.accuracy.update(accuracy, images, found_inf)
        self.optimizer.step(factor, torch.maximum(found_inf, self.held))
        self.optimizer.zero_grad()
        iterate_norms(self.network)
