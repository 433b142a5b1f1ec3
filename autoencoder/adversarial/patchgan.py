"""The discriminator: a convolutional network that judges patches (Isola et al. 2017), with nothing that couples the images of a batch."""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm

WIDEST = 8
"""Factor over the first layer's width at which widths stop doubling."""


class PatchGAN(nn.Module):
    """Images (B, C, H, W) to logits (B, 1, h, w): 4 x 4 convolutions, `layers` of stride 2 and two of stride 1, LeakyReLU 0.2 between them.

    Weights start at N(0, 0.02) and biases at zero, the same for one seed. GroupNorm stands where the original has BatchNorm, whose
    statistics would make an image's gradient depend on the batch and its split.

    Args:
        channels: of the images.
        norm: `group`, `spectral` or `none`.
    """

    def __init__(self, channels: int, *, width: int = 64, layers: int = 3, norm: str = "group", seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(*_layers(channels, [width * min(2**k, WIDEST) for k in range(layers + 1)], norm))
            for module in self.layers:
                if isinstance(module, nn.Conv2d):
                    nn.init.normal_(module.weight, 0, 0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
                    if norm == "spectral":
                        spectral_norm(module)
        # In training mode each forward pass would iterate spectral norms: weights would depend on the number of microbatches.
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the patches, above zero where they are taken for real."""
        logits: Tensor = self.layers(images)
        return logits


@torch.no_grad()
def iterate_norms(network: nn.Module) -> None:
    """One power iteration of every spectral norm, of either of torch's two kinds: once an optimiser step."""
    for module in network.modules():
        if is_parametrized(module):
            parametrizations = module.get_submodule("parametrizations").train()
            for name, _ in parametrizations.named_children():
                getattr(module, name)  # read in training mode, a parametrised weight iterates
            parametrizations.eval()
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                hook.compute_weight(module, do_power_iteration=True)


def _layers(before: int, widths: list[int], norm: str) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for k, after in enumerate(widths):
        inner = k > 0 and norm == "group"
        modules.append(nn.Conv2d(before, after, 4, stride=2 if k < len(widths) - 1 else 1, padding=1, bias=not inner))
        modules += [nn.GroupNorm(math.gcd(32, after), after)] if inner else []
        modules.append(nn.LeakyReLU(0.2))
        before = after
    return [*modules, nn.Conv2d(before, 1, 4, padding=1)]
