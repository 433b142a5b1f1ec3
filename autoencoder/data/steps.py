"""Which images of a run each step, process and microbatch sees; shared by both stages."""

import math
from dataclasses import dataclass


def part(whole: range, index: int, parts: int) -> range:
    """Part `index` of `whole` cut into `parts` as evenly as possible."""
    return whole[len(whole) * index // parts : len(whole) * (index + 1) // parts]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Positions of a run of `images`: step s sees s * batch_size up to (s + 1) * batch_size, the last step what is left.

    They are split over `world` processes and each share into microbatches, contiguously and as evenly as possible; all processes
    have the same number of microbatches, some of which may be empty.
    """

    images: int
    batch_size: int
    microbatch: int | None
    rank: int
    world: int

    def __len__(self) -> int:
        return math.ceil(self.images / self.batch_size)

    def microbatches(self, step: int) -> int:
        """Microbatches of a process in `step`."""
        largest_share = math.ceil(self._size(step) / self.world)
        return math.ceil(largest_share / self.microbatch) if self.microbatch else 1

    def numbers(self, first_step: int) -> range:
        """Numbers of the microbatches from `first_step` to the end; only the last step may have fewer of them than the others."""
        first = first_step * self.microbatches(0)
        return range(first, first + sum(self.microbatches(step) for step in range(first_step, len(self))))

    def positions(self, number: int) -> range:
        """Positions of this process's microbatch of that number."""
        step, index = divmod(number, self.microbatches(0))
        share = part(range(step * self.batch_size, step * self.batch_size + self._size(step)), self.rank, self.world)
        return part(share, index, self.microbatches(step))

    def _size(self, step: int) -> int:
        return min(self.batch_size, self.images - step * self.batch_size)
