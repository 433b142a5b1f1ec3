"""fp16 headroom: how far a network's activations on real images stay from where fp16 ends, 65,504.

Measured in fp32, where nothing overflows. Pipelines that run in fp16 read `force_upcast` from an autoencoder's configuration and
decode in fp32 where it is true; what is measured here sets it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.data.loader import ValidationSet
from autoencoder.model import AutoencoderKL, decode, decoded_at_once, encode
from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.probing import MOST_CROPS, spread_batches
from autoencoder.runtime.errors import UsageError

FP16_LARGEST = 65504.0
"""The largest finite fp16 number."""
ENOUGH = 8.0
"""Headroom from which fp16 is trusted: three doublings for images unlike those that were measured, and for sums inside a layer."""
LISTED = 5
"""Layers that are listed, those with the largest activations."""


@dataclass(frozen=True)
class Headroom:
    """Largest activations by layer."""

    largest: dict[str, float]
    """Largest |value| that each module gave, by its dotted name, in the order in which they ran."""
    crops: int

    @property
    def worst(self) -> str:
        """The layer with the largest activation; the first of them, where several overflow even fp32."""
        return max(self.largest, key=lambda name: _order(self.largest[name]))

    @property
    def factor(self) -> float:
        """By how much the largest activation could grow before fp16 overflows; below 1 it does; 0 where it is not finite."""
        largest = self.largest[self.worst]
        return FP16_LARGEST / max(largest, 1e-30) if math.isfinite(largest) else 0.0

    @property
    def force_upcast(self) -> bool:
        """Whether fp16 is not to be trusted with this network."""
        return self.factor < ENOUGH

    def report(self) -> dict[str, Any]:
        """For JSON."""
        layers = sorted(self.largest, key=lambda name: -_order(self.largest[name]))[:LISTED]
        return {
            "crops": self.crops,
            "factor": self.factor,
            "enough": ENOUGH,
            "force_upcast": self.force_upcast,
            "layers": [{"name": name, "largest": self.largest[name] if math.isfinite(self.largest[name]) else None} for name in layers],
        }


@torch.no_grad()
def measure_headroom(vae: AutoencoderKL, crops: ValidationSet, recipe: PixelRecipe, device: torch.device) -> Headroom:
    """Largest activations of `vae` as it encodes and decodes (the posterior's mean) at most `MOST_CROPS` crops in fp32."""
    vae = vae.to(device).eval()
    found: dict[str, Tensor] = {}
    crops_seen = 0

    def note(name: str, output: Any) -> None:
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                largest = value.detach().abs().amax()
                # `maximum` keeps a NaN.
                found[name] = torch.maximum(found[name], largest) if name in found else largest

    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: note(name, output))
        for name, module in vae.named_modules()
        if name and not isinstance(module, nn.ModuleList)
    ]
    try:
        with torch.autocast(device.type, enabled=False):
            for _, images, _ in spread_batches(crops, recipe, MOST_CROPS, decoded_at_once(crops.side), device):
                decode(vae, encode(vae, images).mode())
                crops_seen += len(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise UsageError(f"headroom: none of the {min(MOST_CROPS, len(crops))} crops to measure on can be read")
    return Headroom({name: value.item() for name, value in found.items()}, crops_seen)


def _order(value: float) -> float:
    """NaN beyond infinity beyond all else."""
    return math.inf if math.isnan(value) else value
