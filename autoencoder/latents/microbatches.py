"""The microbatches of several shards by number. Torch-free."""

import bisect
from collections.abc import Sequence
from itertools import accumulate

from autoencoder.latents.plan import Plan


class Microbatches(Sequence[Sequence[int]]):
    """The rows of the microbatches of some shards, one after the other, made when they are asked for."""

    def __init__(self, plan: Plan, shards: Sequence[int]) -> None:
        self._plan, self._shards = plan, shards
        self._ends = list(accumulate(-(-plan.rows_in(n) // int(plan.recipe["batch_size"])) for n in shards))
        self._last: tuple[int, list[Sequence[int]]] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> Sequence[int]:  # type: ignore[override]
        place = bisect.bisect_right(self._ends, number)
        shard = self._shards[place]
        if self._last is None or self._last[0] != shard:
            self._last = shard, self._plan.microbatches(shard)
        return self._last[1][number - (self._ends[place - 1] if place else 0)]
