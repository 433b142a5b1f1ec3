"""Loader processes: how many, and batches by number through them."""

import os
import signal
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from autoencoder.runtime.errors import UsageError

MOST_WORKERS = 8

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class ByNumber(Protocol[T_co]):
    """Batches by number, picklable."""

    def __getitem__(self, number: int) -> T_co: ...


def spare_cores() -> int:
    """The cores that a training process has beside itself, at least 1 and at most `MOST_WORKERS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MOST_WORKERS, max(1, cores // processes - 1))


def load(batches: ByNumber[T], numbers: range, workers: int, pin_memory: bool) -> Iterator[T]:
    """The batches of these numbers, in order, read ahead by `workers` processes (0: none)."""
    # With a generator of its own the loader leaves torch's global one alone.
    loader = DataLoader(
        _Guarded(batches),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        worker_init_fn=_begin,
    )
    for item in loader:
        if isinstance(item, UsageError):
            raise item
        yield item


class _Guarded(Dataset["T | UsageError"], Generic[T]):
    """Hands a UsageError over as an item: raised in a loader process it would reach the user wrapped in a traceback."""

    def __init__(self, batches: ByNumber[T]) -> None:
        self._batches = batches

    def __getitem__(self, number: int) -> "T | UsageError":
        try:
            return self._batches[number]
        except UsageError as error:
            return error


def _begin(_worker: int) -> None:
    """A signal to the process group is the training process's to answer: it needs its loader until the checkpoint is written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = _without_lost_connections


def _without_lost_connections(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A process that is killed takes its end of the connection along in the middle of a batch: it has said so itself, or cannot."""
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
