"""A coupling flow over latent maps, shared by the flow posterior and the flow prior.

It is our own because the libraries at hand do not fit a latent map: zuko conditions vectors with MLPs, and normflows' image blocks take no
context and normalise activations by the first batch's statistics, which would differ between processes and after a resume.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

LARGEST_LOG_SCALE = 2.0
"""A coupling's log scale stays within +- this, smoothly: eight of them can still scale a value by exp(8) either way."""


class CouplingFlow(nn.Module):
    """An invertible map of (B, c, h, w), the identity at its start; log-determinants in nats, (B,).

    Each coupling (RealNVP, Dinh et al. 2017, eqs. 7 and 8) keeps half of the values and scales and shifts the others by what a small
    convolutional network makes of the first half and of the context. The halves alternate: sites of a checkerboard, then channels.

    Args:
        channels: c.
        couplings: how many; even, so that every value is changed.
        width: channels within a coupling's network.
        context: channels of the context map, 0 for none.
    """

    def __init__(self, channels: int, *, couplings: int, width: int, context: int = 0) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(_Conditioner(channels, context, width) for _ in range(couplings))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y = f(x) and ln |det dy/dx|."""
        log_det = x.new_zeros(len(x))
        for i, conditioner in enumerate(self.couplings):
            kept = _kept(i, x)
            log_scale, shift = conditioner(x, kept, context)
            x = x * log_scale.exp() + shift
            log_det = log_det + log_scale.flatten(1).sum(1)
        return x, log_det

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x with f(x) = y, and ln |det dx/dy|."""
        log_det = y.new_zeros(len(y))
        for i, conditioner in reversed(list(enumerate(self.couplings))):
            kept = _kept(i, y)
            log_scale, shift = conditioner(y, kept, context)
            y = (y - shift) * (-log_scale).exp()
            log_det = log_det - log_scale.flatten(1).sum(1)
        return y, log_det


class _Conditioner(nn.Module):
    """Log scale and shift of the values that are not kept, zero for those that are; zero everywhere at the start."""

    def __init__(self, channels: int, context: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + context, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 1)
        self.last = nn.Conv2d(width, 2 * channels, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, kept: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        seen = x * kept if context is None else torch.cat([x * kept, context], dim=1)
        raw, shift = self.last(silu(self.second(silu(self.first(seen))))).chunk(2, dim=1)  # (B, c, h, w) each
        log_scale = LARGEST_LOG_SCALE * torch.tanh(raw / LARGEST_LOG_SCALE)
        return log_scale * (1 - kept), shift * (1 - kept)


def _kept(index: int, x: Tensor) -> Tensor:
    """1 where coupling `index` keeps a value: by site (even, odd), then by channel (even, odd), and so on."""
    _, c, h, w = x.shape
    rows, columns = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    by_site = (rows[:, None] + columns)[None].expand(c, h, w)
    by_channel = torch.arange(c, device=x.device)[:, None, None].expand(c, h, w)
    return (((by_site if index % 4 < 2 else by_channel) + index) % 2).to(x)
