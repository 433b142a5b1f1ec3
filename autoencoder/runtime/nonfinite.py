"""Where a value that is not finite comes from: a step's images once more through the network, with every module watched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOST_NAMED = 8
"""Images that a message names."""


class BadSteps:
    """The last step that was not finite, on the device: kept without waiting for it, until a log line asks.

    It is no part of a checkpoint: what a step computed before a restart is not looked for after it.
    """

    def __init__(self, device: torch.device) -> None:
        self._last = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, step: int, found_inf: Tensor) -> None:
        """Take note of a step; `found_inf` is 1 where it was not finite."""
        self._last = torch.where(found_inf > 0, step, self._last)

    def last(self) -> int | None:
        """The last such step, if there was one; waits for the device."""
        step = int(self._last.item())
        return None if step < 0 else step


@dataclass(frozen=True)
class Culprit:
    """The first place where a value was not finite."""

    place: str
    """Such as `the output of vae.decoder.conv_in`."""
    images: tuple[str, ...]
    """Names of the images whose values these were; empty where that cannot be told."""

    def __str__(self) -> str:
        shown = ", ".join(self.images[:MOST_NAMED])
        more = f" and {len(self.images) - MOST_NAMED} more" if len(self.images) > MOST_NAMED else ""
        return f"first in {self.place}" + (f", of image{'s' if len(self.images) > 1 else ''} {shown}{more}" if self.images else "")


def find_culprit(module: nn.Module, batches: Sequence[Any], losses: Callable[[Any], Any], *, scale: Tensor | float = 1.0) -> Culprit | None:
    """Run microbatches through `module` and back until something is not finite; None where all is.

    Looked for, in this order: weights, then what goes into and comes out of each module as it runs, terms of the loss, gradients at
    the modules' outputs on the way back, gradients of weights. Gradients of `module` are cleared afterwards.

    Args:
        losses: a microbatch to its terms (`loss` and `named`, (B,) each), by way of `module`.
        scale: what the loss is multiplied by on the way back.
    """
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            return Culprit(f"the weights {name}", ())
    for batch in batches:
        found = _watch(module, batch, losses, scale)
        module.zero_grad(set_to_none=True)
        if found is not None:
            return found
    return None


def _watch(module: nn.Module, batch: Any, losses: Callable[[Any], Any], scale: Tensor | float) -> Culprit | None:
    ids: list[str] = getattr(batch, "ids", [])
    found: list[Culprit] = []

    def check(place: str, value: Tensor) -> None:
        if not found and not value.isfinite().all():
            found.append(Culprit(place, _images(value, ids)))

    def after(name: str, inputs: Any, output: Any) -> None:
        for value in _tensors(inputs):
            check(f"the input of {name}", value)
        for value in _tensors(output):
            check(f"the output of {name}", value)
            if value.requires_grad:
                value.register_hook(lambda gradient: check(f"the gradient at the output of {name}", gradient))

    hooks = [
        part.register_forward_hook(lambda part, inputs, output, name=name: after(name, inputs, output))
        for name, part in module.named_modules()
        if name
    ]
    try:
        terms = losses(batch)
        for name, value in {**terms.named, "loss": terms.loss}.items():
            check(f"the term {name}, past the network", value)
        if not found:
            ((terms.loss * batch.weight).sum() * scale).backward()
    finally:
        for hook in hooks:
            hook.remove()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            check(f"the gradient of {name}", parameter.grad[None])
    return found[0] if found else None


def _tensors(values: Any) -> list[Tensor]:
    found = values if isinstance(values, tuple | list) else (values,)
    return [value for value in found if isinstance(value, Tensor) and value.is_floating_point() and value.ndim]


def _images(value: Tensor, ids: list[str]) -> tuple[str, ...]:
    """Names of the images whose rows of `value` are not all finite; none where its rows are not images."""
    rows = len(value)
    if not ids or rows % len(ids):
        return ()
    bad = ~value.detach().isfinite().flatten(1).all(1) if value.ndim > 1 else ~value.detach().isfinite()
    return tuple(dict.fromkeys(ids[row * len(ids) // rows] for row in bad.nonzero().flatten().tolist()))
