"""The sampler of rows: permutations, processes without duplicates, one integer of state, blocks; and the file alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from autoencoder.data.order import sample_index
from autoencoder.latents import sampler
from autoencoder.latents.sampler import RowSampler

KINDS = pytest.mark.parametrize("blocks", [{}, {"block_rows": 4, "pool_rows": 12}, {"block_rows": 5, "pool_rows": 23}])


class Numbers(Dataset[torch.Tensor]):
    """Its rows are their own numbers."""

    def __len__(self) -> int:
        return 103

    def __getitem__(self, row: list[int]) -> torch.Tensor:
        return torch.tensor(row)


@KINDS
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_epoch_has_each_row_once_over_all_processes(world: int, blocks: dict[str, int]) -> None:
    samplers = [RowSampler(103, seed=5, batch_size=8, rank=rank, world=world, **blocks) for rank in range(world)]  # type: ignore[arg-type]
    steps = [np.sort(np.concatenate(parts)) for _ in range(8) for parts in zip(*samplers, strict=True)]
    assert all(len(step) == 8 for step in steps)
    assert len(steps) == -(-8 * 103 // 8)
    rows = RowSampler(103, seed=5, batch_size=8, **blocks).order(0, 8 * 103)  # type: ignore[arg-type]
    for epoch in rows.reshape(8, 103):
        assert sorted(epoch) == list(range(103))
    assert len({epoch.tobytes() for epoch in rows.reshape(8, 103)}) == 8
    for number, step in enumerate(steps):
        np.testing.assert_array_equal(step, np.sort(rows[number * 8 : number * 8 + 8]))


def test_the_order_is_that_of_images_in_training() -> None:
    rows = RowSampler(29, seed=3, batch_size=1).order(0, 90)
    assert rows.tolist() == [sample_index(3, 29, position) for position in range(90)]


@KINDS
def test_an_order_does_not_depend_on_how_it_is_asked_for(blocks: dict[str, int]) -> None:
    whole = RowSampler(103, seed=0, batch_size=1, **blocks).order(0, 500)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    asked = RowSampler(103, seed=0, batch_size=1, **blocks)  # type: ignore[arg-type]
    for _ in range(50):
        first = int(rng.integers(400))
        last = first + int(rng.integers(1, 100))
        np.testing.assert_array_equal(asked.order(first, last), whole[first:last])


def test_batches_ascend() -> None:
    for batch in RowSampler(103, seed=0, batch_size=16, world=2, rank=1):
        assert batch == sorted(batch)
        assert len(batch) == 8


@pytest.mark.parametrize("world", [1, 2])
def test_one_integer_goes_on_anywhere_with_any_number_of_processes(world: int) -> None:
    whole = iter(RowSampler(40, seed=1, batch_size=4))
    begun = RowSampler(40, seed=1, batch_size=4)
    for _, batch in zip(range(7), begun, strict=False):
        assert batch == next(whole)
    state = begun.state_dict()
    assert state == {"rows_seen": 28}
    resumed = [RowSampler(40, seed=1, batch_size=4, rank=rank, world=world) for rank in range(world)]
    for one in resumed:
        one.load_state_dict(state)
        assert len(one) == 3
    assert [sorted(row for part in parts for row in part) for parts in zip(*resumed, strict=True)] == list(whole)
    assert len(resumed[0]) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_a_loader_reads_ahead_are_not_counted(workers: int) -> None:
    numbers = Numbers()
    one = RowSampler(numbers, seed=0, batch_size=10)
    loader = DataLoader(numbers, sampler=one, batch_size=None, num_workers=workers)  # type: ignore[arg-type]
    assert len(loader) == 11
    seen = []
    for batch in one.counted(loader):
        seen.append(batch.tolist())
        assert one.rows_seen == 10 * len(seen)
        if len(seen) == 4:
            break
    rest = RowSampler(numbers, seed=0, batch_size=10, rows_seen=one.state_dict()["rows_seen"])
    again = DataLoader(numbers, sampler=rest, batch_size=None, num_workers=workers)  # type: ignore[arg-type]
    assert seen + [batch.tolist() for batch in rest.counted(again)] == list(RowSampler(numbers, seed=0, batch_size=10))
    assert rest.rows_seen == 110


def test_a_pool_holds_few_blocks_drawn_at_random() -> None:
    rows = RowSampler(1000, seed=2, batch_size=1, block_rows=10, pool_rows=200).order(0, 1000)
    pools = rows.reshape(5, 200)
    for pool in pools:
        blocks = np.unique(pool // 10)
        assert len(blocks) == 20
        assert (np.diff(blocks) > 1).any()
        assert (np.diff(pool) != 1).any()
    assert pools[0].std() > 150


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch_size": 104}, "batch_size: got 104; give 1 to 103"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": 8, "world": 3}, "batch_size: got 8 over 3 processes; give a multiple"),
        ({"batch_size": 8, "world": 2, "rank": 2}, "rank: got 2; give 0 to 1"),
        ({"batch_size": 8, "rows_seen": -1}, "rows_seen: got -1"),
        ({"batch_size": 8, "seed": -1}, "seed: got -1; give an integer from 0"),
        ({"batch_size": 8, "block_rows": 9, "pool_rows": 8}, "block_rows: got 9; give 1 to pool_rows"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(given: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RowSampler(103, **{"seed": 0, **given})  # type: ignore[arg-type]


def test_the_file_needs_numpy_alone(tmp_path: Path) -> None:
    (tmp_path / "sampler.py").write_text(Path(sampler.__file__).read_text())
    code = f"import sys; sys.modules['torch'] = sys.modules['autoencoder'] = None; sys.path.insert(0, {str(tmp_path)!r}); import sampler; "
    code += "print(next(iter(sampler.RowSampler(103, seed=0, batch_size=5))))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(next(iter(RowSampler(103, seed=0, batch_size=5))))
