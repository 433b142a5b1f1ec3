"""Networks of the user's own: constructed, and tried once on a few images before anything trains.

What is demanded of one is what makes training exact: an image's value is its own, whatever else is in the batch, and nothing is drawn
at random. Microbatches, processes and a resumed run then have the same gradients.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autoencoder.runtime.errors import ConfigError
from autoencoder.runtime.own_class import OwnClass, build_own, raised

SLACK = 1e-2
"""Relative difference between an image's values in a batch and alone that kernels may make."""


def build_module(own: OwnClass, key: str, **ours: object) -> nn.Module:
    """The network that `own`, configured under `key`, names; ConfigError where there is none."""
    module = build_own(own, key, **ours)
    if not isinstance(module, nn.Module):
        remedy = f"constructing it gives a {type(module).__name__}; give a class that is a torch.nn.Module"
        raise ConfigError(f"{key}.class_path", own.class_path, remedy)
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        remedy = f"{lazy[0]} is of a lazy module and has no shape yet; give its layers their channels"
        raise ConfigError(f"{key}.class_path", own.class_path, remedy)
    return module


def noise(*shape: int, seed: int, device: torch.device) -> Tensor:
    """Uniform in [-1, 1], the same every time."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(device)


def tried(call: Callable[[], Tensor], shape: tuple[int, ...], refuse: Callable[[str], ConfigError]) -> Tensor:
    """What `call` gives for images of `shape`; the refusal of whatever it raised, or of something that is no tensor."""
    try:
        found = call()
    except Exception as error:
        raise refuse(f"called with images {shape} it raised {raised(error)}") from error
    if not isinstance(found, Tensor):
        raise refuse(f"called with images {shape} it gives a {type(found).__name__}, not a tensor")
    return found


def check_alone(together: Tensor, alone: Tensor, refuse: Callable[[str], ConfigError]) -> None:
    """Refuse values of the first of several images that are not what it has by itself."""
    scale = together.detach().abs().max().clamp(min=1e-6)
    difference = (together[:1] - alone).abs().max() / scale
    if difference > SLACK:
        raise refuse(
            f"an image's value changes by {difference:.2g} of itself with the other images of its batch, or from call to call; it must "
            "depend on that image alone, and draw nothing at random"
        )
