"""Gradients taken once and used twice: to the reconstruction, and from there to one layer or through the whole network."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, at: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream.view(-1, *[1] * (gradient.ndim - 1)) * gradient, None, None


def attach(at: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """`value` (B,) with `gradient` (B, ...) as each image's gradient to `at` (B, ...), already known.

    Its backward pass continues from `at`, each image's gradient times what arrives for its value: nothing behind `value` is visited.
    """
    attached: Tensor = _Attached.apply(at, value.detach(), gradient)
    return attached


def layer_gradient(output: Tensor, weight: nn.Parameter, gradient: Tensor) -> Tensor:
    """The gradient to one layer's `weight` from that to its `output`: autograd visits what lies between the two and no more."""
    (found,) = torch.autograd.grad(output, weight, grad_outputs=gradient, retain_graph=True)
    return found


def leave_uncompiled(layer: nn.Conv2d) -> None:
    """Keep `layer` out of every graph that `torch.compile` makes, so that `layer_gradient` can stop there; what is before it and after it
    is compiled. Copies of the layer keep it so."""
    layer.__class__ = _uncompiled_convolution()


@functools.cache
def _uncompiled_convolution() -> type[nn.Conv2d]:
    # Made on demand: the decorator imports the compiler.
    class UncompiledConv2d(nn.Conv2d):
        forward = torch.compiler.disable(nn.Conv2d.forward)

    return UncompiledConv2d


def summed_over_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor summed over all processes, in one exchange."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    return [part.view_as(tensor) for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
