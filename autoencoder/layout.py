"""Channels last, for training on processors in bf16: convolutions are a fifth quicker there, and GroupNorm gets a backward pass to match.

torch's own GroupNorm takes twenty times as long for its gradient in this layout as in the other, and loses more than convolutions gain.
The one here works on rows of channels, in the precision of its input, with SiLU in the same node of the graph: what it keeps for the
backward pass is its input alone. It stands in for torch's only where a gradient in bf16 is asked for; everywhere else, in validation,
export and other precisions, the same modules do what stock code does.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

import autoencoder.runtime.torchvision_operators  # noqa: F401  (before diffusers)

from diffusers.models.resnet import ResnetBlock2D  # isort: skip

LAST = torch.channels_last


def helps(device: torch.device, precision: str, *, compiled: bool) -> bool:
    """Whether training on this device in this precision is quicker so; `torch.compile` lays out by itself."""
    return device.type == "cpu" and precision == "bf16" and not compiled


def to_channels_last(network: nn.Module) -> None:
    """Lay the weights of `network` out so, in place, and have its norms and residual blocks use it. Names and values stay."""
    network.to(memory_format=LAST)  # type: ignore[call-overload]
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = GroupNorm
        elif type(module) is ResnetBlock2D and _is_plain(module):
            module.__class__ = ResnetBlock


def to_stock_layout(network: nn.Module) -> None:
    """Lay the weights of `network` out as stock code has them, in place."""
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool = False) -> Tensor:
    """GroupNorm, then SiLU if asked, of x (B, C, H, W) channels last, whose precision the result has; `weight` and `bias` are (C,) fp32.

    Mean and variance are as exact as torch's. Of the gradient, sums over sites are rounded to the precision of x, as those of a
    convolution's weights under autocast are. Differentiable once.
    """
    result: Tensor = _GroupNorm.apply(x, weight, bias, groups, eps, silu)
    return result


class GroupNorm(nn.GroupNorm):
    """torch's, quicker where a gradient in bf16 is asked for."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W), of the same shape."""
        if not _wanted(input):
            return super().forward(input)
        return group_norm(input, self.weight, self.bias, self.num_groups, self.eps)


class ResnetBlock(ResnetBlock2D):
    """diffusers' residual block of an autoencoder: norms and SiLUs as one, and no division by 1."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """(B, C, H, W) to (B, C', H, W); `temb` is None in an autoencoder."""
        if temb is not None or not _wanted(input_tensor):
            stock: Tensor = super().forward(input_tensor, temb, *args, **kwargs)
            return stock
        hidden = self.conv1(_normed(self.norm1, input_tensor))
        hidden = self.conv2(self.dropout(_normed(self.norm2, hidden)))
        skip = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        result: Tensor = skip + hidden
        return result


def _is_plain(block: ResnetBlock2D) -> bool:
    """Whether the block is one of an autoencoder: norm, SiLU, convolution, twice, and a sum."""
    return (
        block.upsample is None
        and block.downsample is None
        and block.time_emb_proj is None
        and block.time_embedding_norm != "scale_shift"
        and block.output_scale_factor == 1
        and isinstance(block.nonlinearity, nn.SiLU)
        and all(isinstance(norm, nn.GroupNorm) and norm.affine for norm in (block.norm1, block.norm2))
    )


def _wanted(x: Tensor) -> bool:
    return x.dim() == 4 and x.dtype == torch.bfloat16 and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _normed(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=True)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        x = x.contiguous(memory_format=LAST)
        batch, channels, height, width = x.shape
        normed, mean, rstd = torch.native_group_norm(x, weight, bias, batch, channels, height * width, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.silu = silu  # type: ignore[attr-defined]
        return functional.silu(normed) if silu else normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        batch, channels, height, width = x.shape
        groups, values = mean.shape[1], channels // mean.shape[1] * height * width
        mean, rstd = mean.to(weight.dtype), rstd.to(weight.dtype)

        def by_channel(of_groups: Tensor) -> Tensor:
            """(B, groups) to (B, C)."""
            return of_groups.repeat_interleave(channels // groups, 1)

        def factor(of_channels: Tensor) -> Tensor:
            """(B, C), to go with rows."""
            return of_channels.to(x.dtype).unsqueeze(1)

        def over_sites(of_rows: Tensor) -> Tensor:
            """Sums (B, C) of rows (B, H W, C)."""
            if x.dtype == torch.bfloat16:
                # torch's sum would first write all of it in fp32; the product adds up in fp32 and rounds at the end.
                return torch.matmul(of_rows.new_ones(1, height * width), of_rows).squeeze(1).to(weight.dtype)
            return of_rows.sum(1).to(weight.dtype)

        rows, given = (t.contiguous(memory_format=LAST).permute(0, 2, 3, 1).flatten(1, 2) for t in (x, gradient.to(x.dtype)))
        # y = slope x + offset, of which SiLU follows.
        slope = by_channel(rstd) * weight
        if ctx.silu:
            normed = torch.addcmul(factor(bias - by_channel(mean) * slope), rows, factor(slope))
            given = torch.ops.aten.silu_backward(given, normed)
        of_bias = over_sites(given)
        of_weight = (over_sites(given * rows) - by_channel(mean) * of_bias) * by_channel(rstd)
        # dx = slope g - (sum g w + x^ sum g w x^) rstd / values, both sums over the group, x^ the normalised x.
        along = (of_weight * weight).view(batch, groups, -1).sum(2) * rstd.square() / values
        level = (of_bias * weight).view(batch, groups, -1).sum(2) * rstd / values - along * mean
        result = torch.addcmul(factor(by_channel(-level)), rows, factor(by_channel(-along))).addcmul_(given, factor(slope))
        return result.unflatten(1, (height, width)).permute(0, 3, 1, 2), of_weight.sum(0), of_bias.sum(0), None, None, None
