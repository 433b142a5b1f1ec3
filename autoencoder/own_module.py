"""Networks of the user's own: constructed, and tried once on a few images before anything trains.

What is demanded of one is what makes training exact: processes start from the same weights, an image's value is its own, whatever else
is in the batch, and nothing is drawn at random. Microbatches, processes and a resumed run then have the same gradients.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autoencoder.runtime.errors import ConfigError, UsageError
from autoencoder.runtime.own_class import OwnClass, build_own, raised

SLACK = 1e-2
"""Relative difference between an image's values in a batch and alone that kernels may make."""

T = TypeVar("T")


def build_module(own: OwnClass, key: str, *, seed: int, **ours: object) -> nn.Module:
    """The network that `own`, configured under `key`, names: what it draws from the generators of torch, numpy and Python is a function of
    `seed`, and they stay as they are.

    Raises:
        ConfigError: there is none, or constructing it again gives other values.
    """
    module, again = (_seeded(own, key, seed, ours) for _ in range(2))
    if not isinstance(module, nn.Module):
        remedy = f"constructing it gives a {type(module).__name__}; give a class that is a torch.nn.Module"
        raise ConfigError(f"{key}.class_path", own.class_path, remedy)
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if lazy:
        remedy = f"{lazy[0]} is of a lazy module and has no shape yet; give its layers their channels"
        raise ConfigError(f"{key}.class_path", own.class_path, remedy)
    values, others = _values(module), _values(again)
    unlike = [name for name in {**values, **others} if values.get(name) != others.get(name)]
    if unlike:
        remedy = (
            f"constructing it twice gives two values of {unlike[0]}, and every process would have its own; draw from the global generators "
            "of torch, numpy or random, which are seeded for it, or from one with a seed"
        )
        raise ConfigError(f"{key}.class_path", own.class_path, remedy)
    return module


def noise(*shape: int, seed: int, device: torch.device) -> Tensor:
    """Uniform in [-1, 1], the same every time."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(device)


def tried(call: Callable[[], T], shape: tuple[int, ...], refuse: Callable[[str], ConfigError]) -> T:
    """What `call` gives, which has a network see images of `shape`; the refusal of whatever it raised."""
    try:
        return call()
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise refuse(f"called with images {shape} it raised {raised(error)}") from error


def called(network: Callable[..., Tensor], *images: Tensor, refuse: Callable[[str], ConfigError]) -> Tensor:
    """What `network` gives for copies of `images`; the refusal of whatever it raised, of no tensor, and of a change to its input."""
    shape, copies = tuple(images[0].shape), [image.clone() for image in images]
    found = tried(lambda: network(*copies), shape, refuse)
    if not isinstance(found, Tensor):
        raise refuse(f"called with images {shape} it gives a {type(found).__name__}, not a tensor")
    if not all(torch.equal(copy, image) for copy, image in zip(copies, images, strict=True)):
        raise refuse("it changes its input, which others read after it; leave out what works in place")
    return found


def check_alone(together: Tensor, alone: Tensor, refuse: Callable[[str], ConfigError]) -> None:
    """Refuse values of the first of several images that are not what it has by itself."""
    scale = together.detach().abs().max().clamp(min=1e-6)
    difference = (together[:1] - alone).abs().max() / scale
    # NaN is within nothing.
    if not difference <= SLACK:
        raise refuse(
            f"an image's value changes by {difference:.2g} of itself with the other images of its batch, or from call to call; it must "
            "depend on that image alone, and draw nothing at random"
        )


def _seeded(own: OwnClass, key: str, seed: int, ours: dict[str, object]) -> object:
    with torch.random.fork_rng(devices=[]), _other_generators(seed):
        torch.manual_seed(seed)
        return build_own(own, key, **ours)


@contextmanager
def _other_generators(seed: int) -> Iterator[None]:
    """Python's and numpy's global ones, seeded within."""
    before, numpy_before = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)  # noqa: NPY002


def _values(module: object) -> dict[str, object]:
    """The bits of each parameter and buffer by its name, as something that can be compared."""
    if not isinstance(module, nn.Module):
        return {}
    named = [*module.named_parameters(), *module.named_buffers()]
    return {
        name: (tensor.shape, tensor.dtype, tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()) for name, tensor in named
    }
