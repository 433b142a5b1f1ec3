"""The gradient of each term of a loss apart: what pulls how hard on the weights."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def term_gradient_norms(
    batches: Sequence[Any],
    parts: Callable[[Any], dict[str, Tensor]],
    parameters: Sequence[nn.Parameter],
    *,
    images: int,
    scale: Tensor | float = 1.0,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> dict[str, Tensor]:
    """|gradient of the mean over the global batch of each weighted term| at `parameters`, scalars on the device.

    Args:
        batches: this process's microbatches of a step, on the device.
        parts: a microbatch to its weighted terms, (B,) each.
        images: of the global batch.
        scale: the loss is multiplied by it for the way back, as fp16 needs it, and the gradient divided.

    Leaves `grad` of every parameter as it is. Takes a forward pass over the microbatches, a backward pass for each term, and the
    memory of a gradient for each term.
    """
    sums: dict[str, list[Tensor]] = {}
    for batch in batches:
        with autocast():
            terms = parts(batch)
        for i, (name, term) in enumerate(terms.items()):
            total = (term * batch.weight).sum() * (scale / images)
            if not total.requires_grad:
                continue
            found = torch.autograd.grad(total, parameters, retain_graph=i < len(terms) - 1, allow_unused=True)
            gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
            if name in sums:
                torch._foreach_add_(sums[name], gradients)
            else:
                sums[name] = gradients
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    norms = {}
    for name in terms:
        flat = torch.cat([g.flatten() for g in sums.get(name, [torch.zeros_like(p) for p in parameters])])
        if several:
            torch.distributed.all_reduce(flat)
        norms[name] = flat.norm() / scale
    return norms
