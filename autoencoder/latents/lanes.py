"""Microbatches side by side: how many go through the encoder at once, and on how many threads each.

Convolutions of a small microbatch leave threads waiting for each other at the end of every operation, the longer the more other work
(decoding, other users) the machine has. Microbatches that each stay on a thread of their own never wait. Large ones would take too much
memory side by side, and gain little.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

MOST_LANES = 16
SMALL_BYTES = 128 * 2**20
"""Of the first feature map of a microbatch in fp32; a lane takes about four times as much."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Lanes:
    """A function of network, microbatch, device and the threads that PyTorch may use: the last bits depend on `threads`."""

    count: int
    """Microbatches that are encoded at the same time."""
    threads: int
    """Threads of PyTorch's own within each."""

    @classmethod
    def of(cls, device: torch.device, *, width: int, side: int, batch_size: int) -> "Lanes":
        """For a network whose first feature map has `width` channels, and microbatches of `batch_size` crops of `side` pixels."""
        threads = torch.get_num_threads()
        if device.type != "cpu":
            # The second has its results checked and its next batch handed over while the first computes.
            return cls(2, threads)
        count = min(threads, MOST_LANES) if 4 * batch_size * side**2 * width <= SMALL_BYTES else 1
        return cls(count, threads // count)

    @contextmanager
    def in_order(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[Iterator[tuple[T, R]]]:
        """Each item with the function's value, in order; values of the next items are computed meanwhile.

        Items are taken in the calling thread. While this is open PyTorch uses `threads` threads in all of them.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            pool = ThreadPoolExecutor(self.count, thread_name_prefix="lane")
            try:
                yield self._ahead(pool, function, items)
            finally:
                pool.shutdown(cancel_futures=True)
        finally:
            torch.set_num_threads(before)

    def _ahead(self, pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
        waiting: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) == 2 * self.count:
                first, value = waiting.popleft()
                yield first, value.result()
        for first, value in waiting:
            yield first, value.result()
