"""Steps timed in processes of their own, which take turns, so that other load meets all of them alike. Measures nothing itself."""

import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import frame

Step = Callable[[], None]
SIDE, COPIED = 2048, 2**26
"""Of the matrices of the matrix product, and bytes of the copy, that bound what a machine can do."""


class Worker:
    """A process that holds what `factory(*given)` makes, a step, and runs it when asked.

    The factory is a function of a module, as it goes to the process by name.
    """

    def __init__(self, factory: Callable[..., Step], *given: Any, threads: int) -> None:
        # For its imports.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(frame.ROOT), str(frame.ROOT / "benchmarks")])
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(factory, given, threads, theirs), daemon=True)
        self._process.start()
        # With no other end of the line here, a process that fails is noticed.
        theirs.close()
        self.gigaflops: float = self._line.recv()
        """Of one step, as `torch.utils.flop_counter` has it."""

    def time(self, steps: int) -> tuple[float, float]:
        """Wall-clock and CPU seconds of a step, a mean over `steps`."""
        self._line.send(steps)
        wall, cpu = self._line.recv()
        return float(wall), float(cpu)

    def close(self) -> float:
        """End the process; the most memory that it held, MiB: of the device, or of the process where that is the processor."""
        self._line.send(0)
        most = float(self._line.recv())
        self._process.join()
        return most


def _serve(factory: Callable[..., Step], given: Sequence[Any], threads: int, line: Connection) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(threads)
    step = factory(*given)
    step()
    with FlopCounterMode(display=False) as counted:
        step()
    line.send(counted.get_total_flops() / 1e9)
    while steps := line.recv():
        _settle()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        _settle()
        line.send(((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps))
    cuda = torch.cuda.is_available()
    line.send(torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def _settle() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def product(precision: str) -> Step:
    """The matrix product of two matrices of `SIDE`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=getattr(torch, precision)) for _ in range(2))

    def step() -> None:
        torch.mm(a, b)

    return step


def copy() -> Step:
    """A copy of `COPIED` bytes."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.empty(COPIED // 4, device=device) for _ in range(2))

    def step() -> None:
        b.copy_(a)

    return step


def rounds(workers: dict[str, Worker], *, number: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each in turn, `number` times."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    for _ in range(number):
        for name, worker in workers.items():
            seconds[name].append(worker.time(steps))
    return seconds


def ratio(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]], unit: int) -> float:
    """The median over rounds of `one` over `other`; unit 0: of wall-clock, 1: of CPU seconds."""
    return round(statistics.median(a[unit] / b[unit] for a, b in zip(one, other, strict=True)), 3)


def milliseconds(seconds: Sequence[tuple[float, float]], unit: int) -> float:
    """The median over rounds."""
    return round(1000 * statistics.median(both[unit] for both in seconds), 2)
