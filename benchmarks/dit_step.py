"""A training step of the diffusion stage against a plain loop over diffusers' DiTTransformer2DModel, and what reading latents is of it.

Same size of network, batch and precision (fp32), one thread. `plain` is the class as it comes (an embedder in each block), flow
matching and torch's AdamW, its latents in memory, in a process of its own. `ours` is a step of the training loop without a moving
average: batch from the store, network, loss, clipping, AdamW. `batch` is the part of it that makes the batch (reading, posterior draw,
times, noise), `reading` the part of that which reads. Rounds take turns; ratios are medians over rounds, of wall-clock and of CPU
seconds, which other load changes less. Writes benchmarks/results/dit-step-<device>.json.
"""

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frame
import turns
from encoding import save_network

CASES = {"tiny, 4x8x8 (the demo)": ("tiny", 8, 64, 6), "tiny, 4x32x32": ("tiny", 32, 8, 3), "S, 4x32x32": ("S", 32, 4, 1)}
"""Preset, side of the latents, batch, steps a round."""
PARTS = 20
"""Times that the short parts of a step are gone through in a round."""
CROPS = 100
"""Of each of the demo's six photos: the rows are read in random order, as they are in a run."""


def encode_demo(folder: Path, side: int) -> None:
    """Latents of 4 x side x side, of an autoencoder with random weights: what they are costs no time."""
    from autoencoder import encode

    save_network("tiny", folder / "vae", 2 * side, block_out_channels=(8, 8), norm_groups=4)
    data = ["--data.source=demo", f"--data.resolution={2 * side}", "--data.crop=random", f"--data.crops={CROPS}", "--data.workers=0"]
    with contextlib.redirect_stderr(io.StringIO()):
        if code := encode.main([f"--model={folder / 'vae'}", *data, f"--out={folder / 'latents'}"]):
            raise SystemExit(code)


def timed(body: Callable[[], None], times: int) -> tuple[float, float]:
    """Wall-clock and CPU seconds that `body` takes, a mean over `times` calls."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        body()
    return (time.perf_counter() - wall) / times, (time.process_time() - cpu) / times


def plain_step(preset: Any, side: int, batch: int) -> Callable[[], None]:
    """A step of the loop that people write."""
    import torch
    from torch.nn import functional

    from diffusion.config import DenoiserConfig
    from diffusion.denoiser import build, stock

    # The widths of ours, in the class as it comes: with its own start, and its own dropping of labels.
    shape = {key: value for key, value in stock(build(DenoiserConfig(preset=preset), (4, side, side))).config.items() if key[0] != "_"}
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(**shape).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0)
    latents, labels = torch.randn(batch, 4, side, side), torch.randint(0, 6, (batch,))

    def step() -> None:
        noise, t = torch.randn_like(latents), torch.sigmoid(torch.randn(batch))
        share = t.view(-1, 1, 1, 1)
        velocity = network((1 - share) * latents + share * noise, timestep=1000 * t, class_labels=labels).sample
        loss = functional.mse_loss(velocity, noise - latents)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


class Ours:
    """The training loop on the latents of a folder, a step at a time."""

    def __init__(self, scratch: Path, preset: Any, side: int, batch: int) -> None:
        from autoencoder.latents.opened import open_latents
        from autoencoder.pretrained import open_pretrained
        from autoencoder.runtime.config import TrainConfig
        from autoencoder.runtime.launch import build_accelerator
        from autoencoder.runtime.loop import Trainer
        from diffusion import data, space
        from diffusion.config import DenoiserConfig, LatentsConfig, TrainDiffusionConfig
        from diffusion.task import DiffusionTask
        from diffusion.training import build_module

        folder = scratch / str(side)
        config = TrainDiffusionConfig(
            latents=str(folder / "latents"),
            out=str(scratch / "run"),
            data=LatentsConfig(workers=0),
            denoiser=DenoiserConfig(preset=preset),
            train=TrainConfig(images="1M", batch_size=batch, precision="fp32", ema_halflife_images=None),
        )
        latents = open_latents(config.latents, "latents")
        rows, held_out = data.hold_out(latents, config.data.validation_rows)
        frozen = space.of_latents(latents, conditional=True)
        self._rows = data.TrainRows(latents, rows, frozen, config)
        validation = data.ValidationRows(latents, held_out, frozen, config)
        accelerator = build_accelerator(config.train)
        vae = open_pretrained(str(folder / "vae"), key="vae").vae
        task = DiffusionTask(config, build_module(config, frozen.shape), frozen, self._rows, validation, vae, accelerator, scratch)
        self._trainer = Trainer(
            task, accelerator=accelerator, folder=scratch, train=config.train, optimizer=config.optimizer, log=config.log,
            checkpoint=config.checkpoint, metrics=None, trackers=None,
        )  # fmt: skip
        self._steps, self._batch = itertools.count(), batch

    def step(self) -> None:
        """From the store to the weights."""
        number = next(self._steps)
        self._trainer._step(number, [self._rows.batch(self._positions(number))])

    def batch(self) -> None:
        """The part of a step that makes the batch."""
        self._rows.batch(self._positions(next(self._steps)))

    def reading(self) -> None:
        """The part of that which reads the rows."""
        from autoencoder.data.order import sample_index
        from diffusion.data import gather

        number = next(self._steps)
        gather(
            self._rows.latents,
            self._rows.rows[[sample_index(self._rows.seed, len(self._rows.rows), p) for p in self._positions(number)]],
        )

    def _positions(self, number: int) -> range:
        return range(number * self._batch, (number + 1) * self._batch)


def compare(scratch: Path, case: str, rounds: int) -> dict[str, Any]:
    """Figures of one case."""
    preset, side, batch, steps = CASES[case]
    worker = turns.Worker(plain_step, preset, side, batch, threads=1)
    ours = Ours(scratch, preset, side, batch)
    ours.step()
    seconds: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        seconds.setdefault("plain", []).append(worker.time(steps))
        for name, body, times in (("ours", ours.step, steps), ("batch", ours.batch, PARTS), ("reading", ours.reading, PARTS)):
            seconds.setdefault(name, []).append(timed(body, times))
        print(case, {name: [round(s, 5) for s in found[-1]] for name, found in seconds.items()}, flush=True)
    worker.close()

    def ratio(name: str, whole: str, unit: int) -> float:
        return round(statistics.median(one[unit] / other[unit] for one, other in zip(seconds[name], seconds[whole], strict=True)), 4)

    return {
        "rounds": rounds,
        "batch_size": batch,
        "steps_a_round": steps,
        "cpu_ms_a_step": {name: round(1000 * statistics.median(s[1] for s in found), 3) for name, found in seconds.items()},
        "ours_to_plain": {"wall": ratio("ours", "plain", 0), "cpu": ratio("ours", "plain", 1)},
        "share_of_a_step": {name: {"wall": ratio(name, "ours", 0), "cpu": ratio(name, "ours", 1)} for name in ("batch", "reading")},
    }


def main() -> None:
    """Measure and write the result."""
    parser = frame.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=CASES, help="one case")
    options: argparse.Namespace = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    device = frame.device_name(one_thread=True)
    file = frame.result_file("dit-step", device)
    result: dict[str, Any] = {**frame.made_with(device), "cases": {}}
    with tempfile.TemporaryDirectory() as name:
        for side in sorted({CASES[case][1] for case in CASES if options.only in (None, case)}):
            encode_demo(Path(name) / str(side), side)
        for case in [options.only] if options.only else CASES:
            result["cases"][case] = compare(Path(name), case, options.rounds)
            frame.write(file, result)
    frame.say_written(file)


if __name__ == "__main__":
    main()
