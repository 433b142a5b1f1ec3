"""The order of images in a run."""

import pytest

from autoencoder.data.order import sample_index


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
