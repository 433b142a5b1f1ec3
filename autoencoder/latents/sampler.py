"""The order in which a run reads rows of latents: this one file and numpy are enough. Copy it beside `reader.py`.

    sampler = RowSampler(len(latents), seed=0, batch_size=256, rank=rank, world=world)
    loader = DataLoader(latents, sampler=sampler, batch_size=None, num_workers=4)
    for batch in sampler.counted(loader):
        ...
        torch.save({..., "sampler": sampler.state_dict()}, ...)  # one integer

What is read at a position of the run is a function of the seed and of the position, whatever the number of processes.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class RowSampler:
    """Batches of row numbers, each ascending, for one of `world` processes: a DataLoader's `batch_sampler`, or its `sampler` with
    `batch_size=None`, which is quicker.

    The run is an endless stream of positions, and every n of them, an epoch, are a permutation of the n rows. A step takes `batch_size`
    positions, and each process an equal part of them: no row comes twice within an epoch, in one process or in several. Where n is no
    multiple of `batch_size`, the last batch of an epoch takes its other rows from the beginning of the next, so that no row is left
    out and all batches are whole. Iterating gives the batches up to the end of the epoch, and the next time those of the next.

    `rows_seen` is all the state there is: positions that all processes together have behind them. It may be given to a run with
    another `world`. Where a DataLoader has workers, which read ahead, go through `counted`.
    """

    def __init__(
        self,
        rows: int | Sized,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        rows_seen: int = 0,
        block_rows: int | None = None,
        pool_rows: int = 2**16,
    ) -> None:
        """Of `rows` rows (or of an object that has as many), `batch_size` a step over all processes.

        `block_rows` shuffles data sets that do not fit into memory: blocks of so many rows in a row are drawn in a random order and come
        together in pools of `pool_rows`, within which rows are permuted. Reads then stay within one pool at a time.

        Raises ValueError for numbers that do not go together.
        """
        self.rows = rows if isinstance(rows, int) else len(rows)
        self.seed, self.batch_size, self.rank, self.world = seed, batch_size, rank, world
        self.rows_seen, self.block_rows, self.pool_rows = rows_seen, block_rows, pool_rows
        self._kept: dict[tuple[str, int, int], np.ndarray] = {}
        if not 1 <= batch_size <= self.rows:
            raise ValueError(f"batch_size: got {batch_size}; give 1 to {self.rows}, the number of rows")
        if world < 1 or batch_size % world:
            raise ValueError(f"batch_size: got {batch_size} over {world} processes; give a multiple of their number")
        if not 0 <= rank < world:
            raise ValueError(f"rank: got {rank}; give 0 to {world - 1}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed: got {seed}; give an integer from 0 to 2**63 - 1")
        if rows_seen < 0:
            raise ValueError(f"rows_seen: got {rows_seen}; give 0 or more")
        if block_rows is not None and not 1 <= block_rows <= pool_rows:
            raise ValueError(f"block_rows: got {block_rows}; give 1 to pool_rows ({pool_rows}), or None")

    def __len__(self) -> int:
        """Batches up to the end of the epoch."""
        return -(-(self.rows - self.rows_seen % self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        first = self.rows_seen
        # Not from `rows_seen` itself, which `counted` sets back while a loader reads ahead.
        for position in range(first, first + len(self) * self.batch_size, self.batch_size):
            self.rows_seen = position + self.batch_size
            yield self.batch(position).tolist()

    def batch(self, position: int) -> np.ndarray:
        """This process's rows of the step that begins at `position`, ascending; (batch_size / world,) int64."""
        share = self.batch_size // self.world
        first = position + self.rank * share
        return np.sort(self.order(first, first + share))

    def order(self, first: int, last: int) -> np.ndarray:
        """The rows at the positions from `first` to `last`, without it."""
        parts = []
        while first < last:
            epoch, place = divmod(first, self.rows)
            taken = min(last - first, self.rows - place)
            parts.append(self._within(epoch, place, place + taken))
            first += taken
        return np.concatenate(parts)

    def counted(self, loader: Iterable[T]) -> Iterator[T]:
        """The batches of a loader that has this sampler; `rows_seen` counts those that were handed on, not those that it read ahead."""
        seen = self.rows_seen
        for batch in loader:
            seen += self.batch_size
            self.rows_seen = seen
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The one integer."""
        return {"rows_seen": self.rows_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another sampler of the same rows, seed and blocks stood."""
        self.rows_seen = int(state["rows_seen"])

    def _within(self, epoch: int, first: int, last: int) -> np.ndarray:
        """The rows at some places of an epoch."""
        if self.block_rows is None:
            return self._keep("order", epoch, 0, lambda: self._generator("order", epoch, 0).permutation(self.rows))[first:last]
        blocks = self._keep("block order", epoch, 0, lambda: self._generator("block order", epoch, 0).permutation(self._blocks))
        starts = self._pool_starts(blocks)
        parts = []
        while first < last:
            pool = int(np.searchsorted(starts, first, side="right")) - 1
            rows = self._keep("pool order", epoch, pool, lambda pool=pool: self._pool(blocks, epoch, pool))  # type: ignore[misc]
            parts.append(rows[first - starts[pool] : last - starts[pool]])
            first += len(parts[-1])
        return np.concatenate(parts)

    @property
    def _blocks(self) -> int:
        return -(-self.rows // (self.block_rows or self.rows))

    @property
    def _blocks_a_pool(self) -> int:
        return self.pool_rows // (self.block_rows or self.rows)

    def _pool_starts(self, blocks: np.ndarray) -> np.ndarray:
        """The places where pools begin, the end last. One block is short, wherever it comes."""
        block = self.block_rows or self.rows
        whole = np.arange(0, self._blocks, self._blocks_a_pool) * block
        short = int(np.flatnonzero(blocks == self._blocks - 1)[0])
        whole[whole > short * block] -= self._blocks * block - self.rows
        return np.append(whole, self.rows)

    def _pool(self, blocks: np.ndarray, epoch: int, number: int) -> np.ndarray:
        """The rows of a pool in their order."""
        block = self.block_rows or self.rows
        chosen = blocks[number * self._blocks_a_pool : (number + 1) * self._blocks_a_pool]
        rows = (chosen[:, None] * block + np.arange(block)).reshape(-1)
        return self._generator("pool order", epoch, number).permutation(rows[rows < self.rows])

    def _keep(self, name: str, epoch: int, number: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What `make` gives, kept for a while: a batch may reach over the end of an epoch or of a pool."""
        key = (name, epoch, number)
        if key not in self._kept:
            for old in [k for k in self._kept if k[0] == name][:-1]:
                del self._kept[old]
            self._kept[key] = make()
        return self._kept[key]

    def _generator(self, stream: str, epoch: int, number: int) -> np.random.Generator:
        """A generator for one position of one named stream (Philox, Salmon et al. 2011: counter-based)."""
        key = np.array([self.seed, zlib.crc32(stream.encode())], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, number, epoch, 0], dtype=np.uint64)))
