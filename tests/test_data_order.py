"""The order of images in a run."""

import zlib

import numpy as np
import pytest

from autoencoder.data.order import Blocks, sample_index


@pytest.mark.parametrize("images", [1, 7, 100])
def test_every_epoch_has_every_image_once(images: int) -> None:
    for epoch in range(4):
        assert sorted(sample_index(3, images, epoch * images + place) for place in range(images)) == list(range(images))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(sample_index(seed, 50, epoch * 50 + place) for place in range(50)) for seed in (0, 1, 2**63 - 1) for epoch in range(3)]
    assert len(set(orders)) == len(orders)
    assert tuple(range(50)) not in orders


def test_the_order_is_open_at_any_position() -> None:
    forward = [sample_index(0, 13, position) for position in range(60)]
    assert [sample_index(0, 13, position) for position in reversed(range(60))] == forward[::-1]


UNEVEN = Blocks(np.array([0, 3, 4, 11, 13, 20, 21]), 26, together=2)
EVEN = Blocks(np.arange(0, 96, 8), 96, together=4)


@pytest.mark.parametrize("blocks", [UNEVEN, EVEN, Blocks(np.array([0]), 9, 1), Blocks(np.arange(5), 5, together=99)])
def test_every_epoch_of_a_source_in_blocks_has_every_image_once(blocks: Blocks) -> None:
    images = blocks.images
    for epoch in range(5):
        assert sorted(sample_index(3, images, epoch * images + place, blocks) for place in range(images)) == list(range(images))


def test_the_order_in_blocks_is_open_at_any_position_and_a_function_of_seed_and_blocks_alone() -> None:
    forward = [sample_index(0, 26, position, UNEVEN) for position in range(150)]
    alike = Blocks(UNEVEN.starts.copy(), 26, together=2)
    jumps = np.random.default_rng(0).permutation(150).tolist()
    assert [sample_index(0, 26, position, alike) for position in jumps] == [forward[position] for position in jumps]
    epochs = [tuple(sample_index(seed, 26, epoch * 26 + place, UNEVEN) for place in range(26)) for seed in (0, 1) for epoch in range(3)]
    assert len(set(epochs)) == 6


def test_a_process_that_keeps_as_many_blocks_as_a_window_has_reads_each_once_an_epoch() -> None:
    for epoch in range(3):
        order = [sample_index(1, 96, epoch * 96 + place, EVEN) // 8 for place in range(96)]
        windows = [set(order[start : start + 32]) for start in range(0, 96, 32)]
        assert [len(window) for window in windows] == [4, 4, 4]
        assert set.union(*windows) == set(range(12))
        # Within a window they are mixed: of a run of one block after the other there would be 3 changes.
        assert all(np.count_nonzero(np.diff(order[start : start + 32])) > 16 for start in range(0, 96, 32))


def test_images_are_uniform_within_windows_and_blocks_over_epochs() -> None:
    """Each image is as often as any other at the head of an epoch: chi-squared over 24 images and 6,000 epochs, 5 standard deviations."""
    blocks = Blocks(np.arange(0, 24, 4), 24, together=2)
    counts = np.bincount([sample_index(9, 24, epoch * 24, blocks) for epoch in range(6000)], minlength=24)
    statistic = float(((counts - 250) ** 2 / 250).sum())
    assert abs(statistic - 23) < 5 * (2 * 23) ** 0.5


def test_chosen_images_of_blocks_are_in_what_is_left_of_them() -> None:
    chosen = np.array([0, 2, 3, 12, 14, 19, 25])
    left = UNEVEN.of(chosen)
    assert left is not None
    assert (left.starts.tolist(), left.images, left.together) == ([0, 2, 3, 4, 6], 7, 2)
    assert UNEVEN.of(chosen[::-1]) is None


def test_without_blocks_the_order_is_a_philox_permutation_of_each_epoch() -> None:
    philox = np.random.Philox(key=np.array([5, zlib.crc32(b"order")], np.uint64), counter=np.array([0, 0, 2, 0], np.uint64))
    assert [sample_index(5, 11, 22 + place) for place in range(11)] == np.random.Generator(philox).permutation(11).tolist()
