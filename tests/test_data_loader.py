"""Batches are a function of seed and position: of nothing else."""

import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from autoencoder.config import DataConfig
from autoencoder.data.loader import Batch, TrainLoader, ValidationSet
from autoencoder.data.order import sample_index
from autoencoder.data.pixels import to_images
from autoencoder.data.sources import BadImage, Record
from autoencoder.runtime.errors import UsageError

CONFIG = DataConfig(resolution=8, zoom=(0.7, 1.0))
LATENT = (2, 4, 4)


class Arrays:
    """Random images in memory, some of which cannot be read."""

    name, fingerprint, in_memory = "arrays", "0", True
    labels: list[str] | None = None

    def __init__(self, images: int = 11, bad: tuple[int, ...] = (), deep: tuple[int, ...] = ()) -> None:
        rng = np.random.default_rng(0)
        self.pixels = [rng.integers(0, 256, (12, 14, 3)).astype(np.uint16 if k in deep else np.uint8) for k in range(images)]
        self.bad = bad

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> Record:
        if index in self.bad:
            raise BadImage(f"image {index}", "broken")
        return Record(self.pixels[index], index % 3, f"image {index}")


def loader(source: Arrays, config: DataConfig = CONFIG, **changed: object) -> TrainLoader:
    arguments = {"seed": 5, "batch_size": 8, "microbatch": None, "images": 43, "first_step": 0, "rank": 0, "world": 1}
    return TrainLoader(source, config, latent_shape=LATENT, pin_memory=False, **(arguments | changed))  # type: ignore[arg-type]


def by_position(batches: list[Batch]) -> dict[int, tuple[bytes, bytes, str, int, int]]:
    """All that training sees of each image, by its place in the run; padding left out."""
    seen = {}
    for batch in batches:
        for row in range(len(batch.ids)):
            if batch.weight[row] > 0:
                assert int(batch.position[row]) not in seen
                tensors = batch.pixels[row].numpy().tobytes(), batch.noise[row].numpy().tobytes()
                seen[int(batch.position[row])] = (*tensors, batch.ids[row], int(batch.labels[row]), int(batch.photo[row]))
    return seen


def flat(train: TrainLoader) -> list[Batch]:
    return [batch for _, batches in train for batch in batches]


@pytest.mark.parametrize(
    ("workers", "batch_size", "microbatch", "world"),
    [(0, 8, 3, 1), (0, 8, None, 3), (0, 5, 1, 2), (0, 16, 3, 4), (0, 2, None, 3), (2, 8, 3, 2)],
)
def test_what_an_image_looks_like_does_not_depend_on_how_batches_are_cut(
    workers: int, batch_size: int, microbatch: int | None, world: int
) -> None:
    source = Arrays(bad=(4, 5))
    reference = by_position(flat(loader(source)))
    assert sorted(reference) == list(range(43))
    config = DataConfig(resolution=8, zoom=(0.7, 1.0), workers=workers)
    ranks = [loader(source, config, batch_size=batch_size, microbatch=microbatch, rank=rank, world=world) for rank in range(world)]
    assert by_position([batch for rank in ranks for batch in flat(rank)]) == reference


def test_a_run_can_be_taken_up_at_any_step() -> None:
    reference = list(loader(Arrays(), microbatch=3, rank=1, world=2))
    for first_step in range(7):
        resumed = list(loader(Arrays(), microbatch=3, rank=1, world=2, first_step=first_step))
        assert [step for step, _ in resumed] == list(range(first_step, 6))
        for (_, batches), (_, expected) in zip(resumed, reference[first_step:], strict=True):
            assert [by_position([batch]) for batch in batches] == [by_position([batch]) for batch in expected]


@pytest.mark.parametrize(("world", "microbatch"), [(1, None), (2, 3), (3, 2), (5, 1), (10, None)])
def test_steps_are_shared_evenly_and_the_last_one_holds_what_is_left(world: int, microbatch: int | None) -> None:
    ranks = [list(loader(Arrays(), microbatch=microbatch, rank=rank, world=world)) for rank in range(world)]
    for step in range(6):
        batches = [rank[step][1] for rank in ranks]
        assert len({len(share) for share in batches}) == 1
        positions = [[int(p) for batch in share for p in batch.position if p >= 0] for share in batches]
        assert [position for share in positions for position in share] == list(range(8 * step, min(8 * step + 8, 43)))
        assert max(map(len, positions)) - min(map(len, positions)) <= 1
        for batch in (batch for share in batches for batch in share):
            assert len(batch.ids) <= (microbatch or 8)
            assert torch.equal(batch.weight, (batch.position >= 0).float())
            assert len(batch.ids) == 1 or bool(batch.weight.all())


def test_shapes_and_dtypes() -> None:
    batch = flat(loader(Arrays()))[0]
    assert (batch.pixels.shape, batch.pixels.dtype) == ((8, 3, 8, 8), torch.uint8)
    assert batch.pixels.is_contiguous()
    assert (batch.noise.shape, batch.noise.dtype) == ((8, *LATENT), torch.float32)
    assert {batch.labels.dtype, batch.position.dtype, batch.photo.dtype} == {torch.int64}
    assert batch.labels.tolist() == [photo % 3 for photo in batch.photo.tolist()]
    moved = batch.to("meta")
    assert moved.pixels.device.type == moved.weight.device.type == "meta"
    assert moved.ids == batch.ids


def test_seeds_and_epochs_bring_other_crops_and_noise() -> None:
    one, other = by_position(flat(loader(Arrays(1)))), by_position(flat(loader(Arrays(1), seed=6)))
    assert len({pixels for pixels, *_ in [*one.values(), *other.values()]}) > 43
    assert len({noise for _, noise, *_ in [*one.values(), *other.values()]}) == 86


def test_noise_is_standard_normal() -> None:
    noise = torch.cat([batch.noise for batch in flat(loader(Arrays(), images=2000, batch_size=500))]).double()
    count = noise.numel()
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((noise**4).mean() - 3) < 5 * (96 / count) ** 0.5


def test_a_bad_image_is_replaced_by_the_next_readable_one_and_reported() -> None:
    source = Arrays(bad=(4, 5, 10))
    batches = flat(loader(source))
    photos = {position: photo for position, (*_, photo) in by_position(batches).items()}
    wanted = {position: sample_index(5, 11, position) for position in range(43)}
    assert photos == {position: {4: 6, 5: 6, 10: 0}.get(index, index) for position, index in wanted.items()}
    expected_reports = [report for index in wanted.values() for report in {4: [4, 5], 5: [5], 10: [10]}.get(index, [])]
    assert [report for batch in batches for report in batch.bad] == [(f"image {index}", "broken") for index in expected_reports]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_without_a_readable_image_ends_the_run_with_one_message(workers: int) -> None:
    config = DataConfig(resolution=8, workers=workers)
    with pytest.raises(UsageError, match=r"^data.source: arrays: none of its images can be read: image \d \(broken\); ") as caught:
        flat(loader(Arrays(3, bad=(0, 1, 2)), config))
    assert "Traceback" not in str(caught.value)


def test_the_search_for_a_readable_image_ends_with_the_tolerance() -> None:
    source = Arrays(11, bad=tuple(range(10)))
    with pytest.raises(UsageError, match=r"none of 3 images in a row \(data.max_bad=2\) can be read"):
        flat(loader(source, DataConfig(resolution=8, max_bad=2)))
    assert set(flat(loader(source, DataConfig(resolution=8, max_bad=10)))[0].ids) == {"image 10"}


@pytest.mark.parametrize("workers", [0, 1])
def test_eight_and_sixteen_bit_images_share_a_batch(workers: int) -> None:
    config = DataConfig(resolution=8, zoom=(0.7, 1.0), workers=workers)
    alike, mixed = flat(loader(Arrays()))[0], flat(loader(Arrays(deep=(3,)), config))[0]
    shallow = mixed.photo != 3
    assert mixed.pixels.dtype == torch.uint16
    assert 0 < shallow.sum() < 8
    assert torch.equal(to_images(mixed.pixels)[shallow], to_images(alike.pixels)[shallow])


@pytest.mark.parametrize("workers", [0, 1])
def test_torch_s_own_random_state_is_left_alone(workers: int) -> None:
    before = torch.get_rng_state()
    flat(loader(Arrays(), DataConfig(resolution=8, workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_process_group_does_not_cost_the_loader_its_workers(sent: signal.Signals) -> None:
    steps = iter(loader(Arrays(), DataConfig(resolution=8, workers=1), images=160))
    next(steps)
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        os.kill(worker.pid, sent)
    assert [step for step, _ in steps] == list(range(1, 20))


def validation(source: Arrays, rank: int = 0, world: int = 1, batch_size: int = 4, grid: int = 2, workers: int = 0) -> ValidationSet:
    config = DataConfig(resolution=8, validation_grid=grid, workers=workers)
    return ValidationSet(source, config, seed=5, batch_size=batch_size, latent_shape=LATENT, rank=rank, world=world)


@pytest.mark.parametrize(("world", "batch_size", "workers"), [(1, 7, 0), (2, 4, 0), (3, 5, 2), (5, 1, 0)])
def test_validation_shows_the_same_crops_to_any_number_of_processes(world: int, batch_size: int, workers: int) -> None:
    whole = validation(Arrays(3))
    reference = by_position(list(whole))
    assert len(whole) == 12
    assert sorted(reference) == list(range(12))
    assert [reference[i][2] for i in range(5)] == ["image 0#0", "image 0#1", "image 0#2", "image 0#3", "image 1#0"]
    assert [reference[i][4] for i in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    shares = [list(validation(Arrays(3), rank, world, batch_size, workers=workers)) for rank in range(world)]
    assert by_position([batch for share in shares for batch in share]) == reference
    assert len({len(share) for share in shares}) == 1
    assert by_position(list(whole)) == reference


def test_processes_without_a_validation_crop_get_padding() -> None:
    shares = [list(validation(Arrays(2), rank, 3, grid=1)) for rank in range(3)]
    assert [len(share) for share in shares] == [1, 1, 1]
    assert sorted(float(share[0].weight.sum()) for share in shares) == [0, 1, 1]
    assert sorted(share[0].ids[0] for share in shares) == ["", "image 0", "image 1"]


def test_crops_of_a_bad_validation_image_weigh_nothing() -> None:
    batches = list(validation(Arrays(3, bad=(1,)), batch_size=6))
    assert torch.cat([batch.weight for batch in batches]).tolist() == [1] * 4 + [0] * 4 + [1] * 4
    assert {report for batch in batches for report in batch.bad} == {("image 1", "broken")}


class Masked(Arrays):
    """Float images of two bands, some of whose pixels are missing: of image 4 all, of image 5 none."""

    def read(self, index: int) -> Record:
        record = super().read(index)
        shape = record.pixels.shape[:2]
        valid = np.full(shape, index != 4) if index in (4, 5) else np.random.default_rng(index).random(shape) < 0.7
        return Record(record.pixels[:, :, :2].astype(np.float32) * valid[:, :, None], record.label, record.id, valid)


MASKED = DataConfig(resolution=8, channels=2, low=0, high=255, nodata="file")


@pytest.mark.parametrize("workers", [0, 2])
def test_masks_travel_with_their_crops_and_a_crop_without_a_valid_pixel_weighs_nothing(workers: int) -> None:
    whole, parts = (flat(loader(Masked(), replace(MASKED, workers=workers), microbatch=size)) for size in (None, 3))
    for batch in (*whole, *parts):
        assert batch.valid is not None and batch.valid.shape == (len(batch.ids), 1, 8, 8)
        assert batch.pixels.dtype == torch.float32
        assert torch.equal(batch.weight > 0, batch.valid.flatten(1).any(1))
        assert torch.equal(batch.weight > 0, batch.photo != 4)
        assert (batch.pixels * ~batch.valid == 0).all()
        assert batch.valid[batch.photo == 5].all()
    masks = [torch.cat([batch.valid[batch.position >= 0] for batch in cut if batch.valid is not None]) for cut in (whole, parts)]
    assert torch.equal(*masks)
    assert by_position(whole) == by_position(parts)


def test_padding_has_no_valid_pixel_and_masks_are_there_exactly_where_pixels_may_be_missing() -> None:
    rows = [validation_set.batch([0, 8, 9, 10]) for validation_set in (
        ValidationSet(Masked(bad=(9,)), MASKED, seed=5, batch_size=4, latent_shape=LATENT),
        ValidationSet(Arrays(bad=(9,)), replace(CONFIG, nodata=3), seed=5, batch_size=4, latent_shape=LATENT),
    )]  # fmt: skip
    for batch in rows:
        assert batch.valid is not None
        assert not batch.valid[2].any() and batch.valid[[0, 1, 3]].flatten(1).any(1).all()
        assert batch.weight.tolist() == [1, 1, 0, 1]
    assert ValidationSet(Arrays(), CONFIG, seed=5, batch_size=4, latent_shape=LATENT).batch([0]).valid is None


def test_values_of_a_stated_range_stay_what_they_are_when_depths_meet() -> None:
    ranged = replace(CONFIG, low=0, high=300, zoom=(1.0, 1.0))
    mixed, alike = flat(loader(Arrays(deep=(1, 4)), ranged)), flat(loader(Arrays(), ranged))
    for one, two in zip(mixed, alike, strict=True):
        assert torch.equal(one.pixels.to(torch.int32), two.pixels.to(torch.int32))
