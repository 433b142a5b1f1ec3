"""The training loop. It does not know which stage it trains: a task computes named terms, the loop runs."""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from autoencoder.runtime import checkpoint as checkpoints
from autoencoder.runtime.alarms import AlarmNews
from autoencoder.runtime.averages import Averages
from autoencoder.runtime.config import CheckpointConfig, LogConfig, OptimizerConfig, TrainConfig, count
from autoencoder.runtime.console import Console
from autoencoder.runtime.device import fast_bf16
from autoencoder.runtime.gradient_norms import term_gradient_norms
from autoencoder.runtime.meters import LossScale, Meters
from autoencoder.runtime.nonfinite import Culprit, find_culprit
from autoencoder.runtime.optim import build_optimizers, learning_rate_factor
from autoencoder.runtime.recovery import Recovery
from autoencoder.runtime.signals import StopRequest
from autoencoder.runtime.tracking import MetricsFile, Trackers
from autoencoder.runtime.versions import versions


class TrainingBatch(Protocol):
    """One process's microbatch: `weight` is (B,), 1 for an image and 0 for padding."""

    weight: Tensor

    def to(self, device: torch.device) -> "TrainingBatch": ...


class LossTerms(Protocol):
    """`loss` and each of `named`: (B,), logged. `statistics`: (B, ...), for the task's controllers alone.

    `parts`: (B,) with gradients, the weighted terms that the loss is the sum of.
    """

    loss: Tensor
    named: dict[str, Tensor]
    statistics: dict[str, Tensor]

    @property
    def parts(self) -> dict[str, Tensor]: ...


M = TypeVar("M", bound=nn.Module)


class Task(Protocol[M]):
    """A stage, as the loop sees it; `M` is its network."""

    module: M
    edges: tuple[str, ...]
    """Prefixes of parameter names in first and last layers, which Muon leaves to AdamW."""
    moving: tuple[str, ...]
    """Settings among the scalars that move over the run, for the console."""

    def loader(self, first_step: int) -> Iterable[tuple[int, list[Any]]]:
        """This process's microbatches of each step from `first_step` on."""

    def losses(self, module: nn.Module, batch: Any, images: int, *, probe: bool = False) -> LossTerms:
        """Per-image loss and terms of a microbatch; `module` is the prepared network, `images` those seen before. A `probe` looks only: it
        moves nothing, exchanges nothing, and leaves its terms' graphs whole."""

    def standing(self, step: int, images: int) -> Iterable[nn.Parameter]:
        """Parameters that keep their values and their optimiser state in this step, before which `images` were seen."""

    def finish_gradients(self, images: int) -> dict[str, Tensor]:
        """Finish the gradients of parameters that the loop does not optimise, over the global `images` of the step; returns global figures
        to log, whose non-finite values void the step. Every process calls it."""

    def update(self, means: dict[str, Tensor], images: int, found_inf: Tensor, lr_factor: float) -> None:
        """Move controllers, once an optimiser step, by the global means over its `images`; not where `found_inf` is 1. `lr_factor` is the
        share of the peak learning rates that the step had."""

    def scalars(self, means: dict[str, float], images: int) -> dict[str, float]:
        """What a log line shows beside the means."""

    def measure(self, module: M) -> dict[str, float]:
        """Scalars on held-out data, the same in every process; every process calls it."""

    def held_out_loss(self, scalars: dict[str, float], images: int) -> float:
        """From what `measure` gave once `images` were seen, the figure by which moving averages are compared: the least is the best."""

    def validated(self, module: M, scalars: dict[str, float], step: int) -> None:
        """Take note of a validation with these scalars; writes pictures. Every process calls it."""

    def alarms(self) -> AlarmNews:
        """What is wrong, after `scalars` or `validated`: the same in every process."""

    def held(self) -> dict[str, checkpoints.HasTensors]:
        """Controllers and other state for the checkpoint."""

    def state(self) -> dict[str, Any]:
        """Host-side state for the checkpoint's `state.json`."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    images: int = 0


class Trainer(Generic[M]):
    """Trains a task's network: gradients of the global mean loss, whatever the processes and the accumulation."""

    def __init__(
        self,
        task: Task[M],
        *,
        accelerator: Accelerator,
        folder: Path,
        train: TrainConfig,
        optimizer: OptimizerConfig,
        log: LogConfig,
        checkpoint: CheckpointConfig,
        metrics: MetricsFile | None,
        trackers: Trackers | None,
        on_gradients: Callable[[int, nn.Module], None] | None = None,
    ) -> None:
        self.task, self.accelerator, self.folder = task, accelerator, folder
        self.train, self.optimizer, self.log, self.checkpoint = train, optimizer, log, checkpoint
        self.metrics, self.trackers, self.on_gradients = metrics, trackers, on_gradients
        self.total_images = count(train.images, "images")
        self.total_steps = -(-self.total_images // train.batch_size)
        self.progress = Progress()
        device = accelerator.device
        self.module: M = task.module.to(device)
        self.averages = Averages(self.module, train)
        muon_dtype = torch.bfloat16 if fast_bf16(device) else torch.float32
        self.optimizers = build_optimizers(self.module, optimizer, edges=task.edges, muon_dtype=muon_dtype)
        self.meters = Meters(device)
        self.loss_scale = LossScale(device, enabled=accelerator.mixed_precision == "fp16")
        self._term_norms: dict[str, Tensor] = {}
        self.prepared: nn.Module = accelerator.prepare(torch.compile(self.module) if train.compile else self.module)
        self.console = Console(self.total_images, shown=accelerator.is_main_process, bar=log.progress, moving=task.moving)
        self.recovery = Recovery(
            train,
            accelerator=accelerator,
            folder=folder,
            loss_scale=self.loss_scale,
            console=self.console,
            metrics=metrics,
            find=self._find,
        )

    def fit(self) -> str:
        """Train to the end or to a stop; returns `finished`, `out of time`, or the stopping signal's name."""
        started = last_saved = time.monotonic()
        with StopRequest() as stop, self.console:
            if self.train.on_nonfinite == "rollback" and self.progress.step == 0 and not self.recovery.rollbacks:
                # There may be something to go back to before the first checkpoint is due.
                self.save()
            while self.progress.step < self.total_steps:
                window = time.monotonic(), self.progress.images
                for step, batches in self.task.loader(self.progress.step):
                    before = self.progress.images
                    self._step(step, batches)
                    last = self.progress.step == self.total_steps
                    logging = last or self._due(self.log.every_images, before)
                    if logging:
                        window, nonfinite = self._log_line(window)
                        earlier = self.recovery.answer(nonfinite, self.progress.step) if nonfinite else None
                        if earlier is not None:
                            self.load(earlier)
                            break
                    if last or self._due(self.log.validate_every_images, before):
                        begun = time.monotonic()
                        self._validate()
                        window = window[0] + time.monotonic() - begun, window[1]
                    minutes = (time.monotonic() - last_saved) / 60
                    hours = (time.monotonic() - started) / 3600
                    reason = self._agree(
                        logging,
                        stop.name or ("out of time" if self.train.max_hours and hours >= self.train.max_hours else ""),
                        self.checkpoint.every_minutes is not None and minutes >= self.checkpoint.every_minutes,
                    )
                    if last or reason or self._due(self.checkpoint.every_images, before):
                        self.save()
                        last_saved = time.monotonic()
                    if reason not in ("", "checkpoint") and not last:
                        return reason
                    self.console.advance(self.progress.images)
        return "finished"

    def _step(self, step: int, batches: list[Any]) -> None:
        """One optimiser step over this process's microbatches."""
        images = self._images_of(step)
        if self.log.gradient_norms and self._logs(step):
            self._term_norms = self._measure_terms(batches, images)
        # Data-parallel wrappers average gradients over processes; the loss is the mean over the global batch.
        scale = self.accelerator.num_processes / images * self.loss_scale.value
        sums: dict[str, Tensor] = {}
        weights = torch.zeros((), device=self.accelerator.device)
        logged: list[str] = []
        for i, batch in enumerate(batches):
            batch = batch.to(self.accelerator.device)
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.prepared):
                with self.accelerator.autocast():
                    terms = self.task.losses(self.prepared, batch, self.progress.images)
                ((terms.loss * batch.weight).sum() * scale).backward()
            weights += batch.weight.sum()
            logged = ["loss", *terms.named]
            for name, value in {"loss": terms.loss.detach(), **terms.named, **terms.statistics}.items():
                part = (value * batch.weight.view(-1, *[1] * (value.ndim - 1))).sum(0)
                sums[name] = sums[name] + part if name in sums else part
        means = self._global_means(sums, weights)
        beside = self.task.finish_gradients(images)
        means |= beside
        parameters = self.optimizers.parameters()
        if self.loss_scale.enabled:
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], self.loss_scale.value)
        if self.on_gradients is not None:
            self.on_gradients(step, self.module)
        for parameter in self.task.standing(step, self.progress.images):
            parameter.grad = None
        means["gradient_norm"] = torch.nn.utils.clip_grad_norm_(parameters, self.optimizer.clip_norm or float("inf"))
        found_inf = self.meters.add({name: means[name] for name in (*logged, *beside, "gradient_norm")}, images)
        self.recovery.note(step, found_inf)

        factor = self._learning_rate_factor()
        self.optimizers.step(factor, found_inf)
        self.optimizers.zero_grad()
        self.loss_scale.update(found_inf)
        self.progress = Progress(step + 1, step * self.train.batch_size + images)
        self.averages.update(self.progress.images, images, found_inf)
        self.task.update(means, images, found_inf, factor)

    def _global_means(self, sums: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
        """Sums of any shapes to means over all processes' images of weight 1, whose number here is `weights`, in one exchange."""
        flat = torch.cat([*(value.flatten() for value in sums.values()), weights.view(1)])
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(flat)
        # An image of weight 0, such as a crop whose every pixel is missing, has no part in a mean.
        parts = (flat[:-1] / flat[-1].clamp(min=1)).split([value.numel() for value in sums.values()])
        return {name: part.view_as(sums[name]) for name, part in zip(sums, parts, strict=True)}

    def _images_of(self, step: int) -> int:
        """Images of a step, over all processes."""
        # By the step, as the loader has it: where a run was lengthened, the batch that its old end cut short is not filled up.
        return min(self.train.batch_size, self.total_images - step * self.train.batch_size)

    def _learning_rate_factor(self) -> float:
        """Share of the peak learning rates after the images seen so far."""
        return self.recovery.lr_factor * learning_rate_factor(self.optimizer, self.progress.images, self.total_images)

    def _due(self, every: int | str | None, before: int, after: int | None = None) -> bool:
        if every is None:
            return False
        interval = count(every, "every")
        return before // interval != (self.progress.images if after is None else after) // interval

    def _logs(self, step: int) -> bool:
        """Whether a log line follows a step that is about to be made."""
        after = step * self.train.batch_size + self._images_of(step)
        return step + 1 == self.total_steps or self._due(self.log.every_images, self.progress.images, after)

    def _measure_terms(self, batches: list[Any], images: int) -> dict[str, Tensor]:
        """Gradient norms of the loss's terms in a step that is about to be made."""
        return term_gradient_norms(
            [batch.to(self.accelerator.device) for batch in batches],
            lambda batch: self.task.losses(self.module, batch, self.progress.images, probe=True).parts,
            self.optimizers.parameters(),
            images=images,
            scale=self.loss_scale.value,
            autocast=self.accelerator.autocast,
        )

    def _log_line(self, window: tuple[float, int]) -> tuple[tuple[float, int], list[str]]:
        """Write the line; returns the beginning of the next window, and the names of what was not finite."""
        means, nonfinite = self.meters.read()
        nonfinite = self.recovery.unanswered(nonfinite)
        now = time.monotonic()
        scalars = {
            **means,
            **self.task.scalars(means, self.progress.images),
            **{f"gradient_norm_{name}": norm.item() for name, norm in self._term_norms.items()},
            "lr": self.optimizer.lr * self._learning_rate_factor(),
            "images_per_second": (self.progress.images - window[1]) / max(now - window[0], 1e-9),
        }
        if self.loss_scale.enabled:
            scalars["loss_scale"] = self.loss_scale.value.item()
        self._write("train", scalars, nonfinite)
        return (now, self.progress.images), nonfinite

    def _find(self, step: int) -> Culprit | None:
        """Make a step's forward and backward passes once more, and say where they leave the finite numbers."""
        _, batches = next(iter(self.task.loader(step)))

        def losses(batch: Any) -> LossTerms:
            with self.accelerator.autocast():
                return self.task.losses(self.module, batch, step * self.train.batch_size, probe=True)

        device, scale = self.accelerator.device, self.loss_scale.value / self._images_of(step)
        return find_culprit(self.module, [batch.to(device) for batch in batches], losses, scale=scale)

    def _validate(self) -> None:
        self.console.say(f"validating at {self.progress.images:,} images")
        scalars = self.averages.validate(self.task.measure, lambda found: self.task.held_out_loss(found, self.progress.images))
        self.task.validated(self.averages.module, scalars, self.progress.step)
        self._write("validation", scalars, [])
        self.module.train()

    def _write(self, phase: str, scalars: dict[str, float], nonfinite: list[str]) -> None:
        alarms = self.task.alarms()
        line = {"step": self.progress.step, "images": self.progress.images, "phase": phase, **scalars, **alarms.line()}
        if nonfinite:
            line["nonfinite"] = nonfinite
        if self.metrics is not None:
            self.metrics.append(line)
        if self.trackers is not None:
            self.trackers.log({f"{phase}/{k}": v for k, v in scalars.items()}, step=self.progress.step)
        self.console.line(phase, self.progress.images, scalars)
        for message in alarms.messages():
            self.console.say(message)

    def _agree(self, logging: bool, stop: str, checkpoint_due: bool) -> str:
        """A reason to write a checkpoint that all processes share: a stop's name, `checkpoint` or none.

        Several processes ask each other at logging steps only, where they wait for the device anyway.
        """
        reason = stop or ("checkpoint" if checkpoint_due else "")
        if self.accelerator.num_processes == 1:
            return reason
        if not logging:
            return ""
        reasons: list[str] = [""] * self.accelerator.num_processes
        torch.distributed.all_gather_object(reasons, reason)
        stops = [r for r in reasons if r not in ("", "checkpoint")]
        return stops[0] if stops else max(reasons)

    def _held(self) -> dict[str, checkpoints.HasTensors]:
        held: dict[str, checkpoints.HasTensors] = {
            "model": checkpoints.ModuleTensors(self.module),
            "optimizer": self.optimizers,
            "meters": self.meters,
            **self.task.held(),
            **self.averages.held(),
        }
        if self.loss_scale.enabled:
            held["loss_scale"] = self.loss_scale
        return held

    def save(self) -> None:
        """Write a checkpoint of this step; every process calls it, the main one writes."""
        if self.accelerator.is_main_process:
            state = {
                "step": self.progress.step,
                "images": self.progress.images,
                "meters": self.meters.names,
                **self.recovery.state(self.meters.pending()),
                **self.averages.report(),
                "task": self.task.state(),
                "threads": torch.get_num_threads(),
                "processes": self.accelerator.num_processes,
                "versions": versions(),
            }
            folder = self.folder / "checkpoints"
            checkpoints.save(folder / checkpoints.step_folder(self.progress.step), self._held(), state)
            checkpoints.prune(folder, self.checkpoint.keep)
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint; says what may change the bits."""
        state = checkpoints.load(folder, self._held())
        self.progress = Progress(state["step"], state["images"])
        self.meters.names = state["meters"]
        self.task.load_state(state["task"])
        self.averages.load_report(state)
        self.recovery.load_state(state, self.progress.step)
        for what, now in (
            ("threads", torch.get_num_threads()),
            ("processes", self.accelerator.num_processes),
            ("versions", versions()),
        ):
            if state[what] != now:
                self.console.say(f"warning: {what} were {state[what]} and are {now}: this run is no longer bitwise that of an unbroken one")
        self.console.say(f"going on from {folder.name} ({self.progress.images:,} images)")
