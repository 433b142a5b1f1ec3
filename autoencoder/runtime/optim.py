"""Optimisers that keep their state by parameter name and skip a step on a device-side flag."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from autoencoder.runtime.config import OptimizerConfig, count


def learning_rate_factor(config: OptimizerConfig, images: int, total: int) -> float:
    """Share of the peak learning rate after `images` of `total` images: linear warm-up, then the schedule."""
    warmup = count(config.warmup_images, "warmup_images")
    if images < warmup:
        return (images + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (images - warmup) / max(1, total - warmup))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.final_lr + (1 - config.final_lr) * fall


# The quintic iteration's coefficients (Jordan et al. 2024): steep at zero, singular values end within [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, *, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest semi-orthogonal matrices to (N, rows, columns), approximately, by Newton-Schulz iteration in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised (Jordan et al. 2024), on weights of two or more dimensions flattened to (out, rest).

    torch.optim.Muon takes matrices only; this one takes convolution kernels as they are, and iterates all kernels of
    one shape as a batch. `found_inf`, a device-side scalar, leaves weights and momentum as they were where it is 1.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.flatten(1).shape].append(parameter)
            for shape, parameters in shapes.items():
                self._step(shape, parameters, group)

    def _step(self, shape: torch.Size, parameters: list[nn.Parameter], group: dict[str, float]) -> None:
        momentum = group["momentum"]
        buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
        gradient = torch.stack([p.grad.flatten(1) for p in parameters])  # type: ignore[union-attr]  # (N, out, rest)
        previous = torch.stack([b.flatten(1) for b in buffers])
        average = previous.lerp(gradient, 1 - momentum)
        # An update of unit spectral norm; tall matrices are raised to keep its size per output (Jordan et al. 2024).
        update = orthogonalize(gradient.lerp(average, momentum), dtype=self.dtype) * math.sqrt(max(1.0, shape[0] / shape[1]))
        keep: float | Tensor = 1.0
        if self.found_inf is not None:
            skip = self.found_inf > 0
            average, update = torch.where(skip, previous, average), update.masked_fill(skip, 0.0)
            keep = 1 - self.found_inf
        for i, (parameter, buffer) in enumerate(zip(parameters, buffers, strict=True)):
            buffer.copy_(average[i].view_as(buffer))
            if group["weight_decay"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"] * keep)
            parameter.add_(update[i].view_as(parameter), alpha=-group["lr"])


class Optimizers:
    """The optimisers of one network: parameters by name, one learning-rate schedule, one skip flag."""

    def __init__(self, parts: dict[str, torch.optim.Optimizer], names: dict[Tensor, str]) -> None:
        self.parts, self.names = parts, names
        self.peaks = {id(g): g["lr"] for part in parts.values() for g in part.param_groups}

    def zero_grad(self) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is optimised."""
        return [p for part in self.parts.values() for g in part.param_groups for p in g["params"]]

    def step(self, factor: float, found_inf: Tensor) -> None:
        """One update at `factor` of the peak learning rates; none where the device-side `found_inf` is 1."""
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"] = self.peaks[id(group)] * factor
            part.found_inf = found_inf  # type: ignore[attr-defined]
            part.step()

    def tensors(self) -> dict[str, Tensor]:
        """The whole state as tensors named `part/parameter/slot`."""
        return {
            f"{key}/{self.names[parameter]}/{slot}": value
            for key, part in self.parts.items()
            for parameter, slots in part.state.items()
            for slot, value in slots.items()
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave, for the same parameters; nothing else stays."""
        for optimizer in self.parts.values():
            optimizer.state.clear()
        by_name = {name: parameter for parameter, name in self.names.items()}
        for key, value in tensors.items():
            part, name, slot = key.split("/")
            parameter = by_name[name]
            # What goes with each weight lies as the weights do: AdamW's fused kernel walks through both alike. It wants its step count in
            # fp32 on the parameter's device.
            alike = value.shape == parameter.shape
            kept = torch.empty_like(parameter, dtype=value.dtype).copy_(value) if alike else value.to(parameter.device)
            self.parts[part].state[parameter][slot] = kept


def build_optimizers(
    module: nn.Module, config: OptimizerConfig, *, edges: tuple[str, ...] = (), muon_dtype: torch.dtype = torch.float32
) -> Optimizers:
    """The configured optimisers for what trains in `module`.

    With `muon`, weights of two and more dimensions go to Muon but for those under a name that starts with one of
    `edges` (first and last layers, whose rows and columns are not features); the rest goes to AdamW. Weight decay
    acts on weights of two and more dimensions only.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    muon = {n: p for n, p in named.items() if config.name == "muon" and p.ndim >= 2 and not n.startswith(edges)}
    rest = {n: p for n, p in named.items() if n not in muon}
    groups = [
        {"params": [p for p in rest.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    parts: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)
    }
    if muon:
        parts["muon"] = Muon(
            muon.values(), lr=config.muon_lr, momentum=config.muon_momentum, weight_decay=config.weight_decay, dtype=muon_dtype
        )
    return Optimizers(parts, {p: n for n, p in named.items()})
