"""Aspect-ratio buckets and the shards of a plan that has them, against brute force."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoencoder.latents import assigned
from autoencoder.latents.assigned import Assigned, file_name, nearest
from autoencoder.latents.buckets import Size, automatic, sizes_of
from autoencoder.latents.config import EncodeDataConfig
from autoencoder.latents.microbatches import Microbatches
from autoencoder.latents.plan import Plan
from autoencoder.runtime.errors import ConfigError

SDXL = {
    (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024),
}  # fmt: skip
"""Short and long sides of its table whose ratio is at most 2 (Podell et al. 2023, app. I)."""


@pytest.mark.parametrize(("resolution", "step", "ratio"), [(64, 16, 2.0), (256, 64, 2.0), (512, 64, 4.0), (96, 8, 1.5), (1024, 64, 2.0)])
def test_automatic_buckets_are_all_sizes_that_a_step_more_takes_beyond_the_area(resolution: int, step: int, ratio: float) -> None:
    area, sides = resolution**2, range(step, 4 * resolution + 1, step)
    expected = {
        (h, w)
        for h in sides
        for w in sides
        if h * w <= area and max(h, w) <= ratio * min(h, w) and (h * (w + step) > area or (h + step) * w > area)
    }
    found = automatic(resolution, step, ratio)
    assert len(found) == len(set(found)) and set(found) == expected
    assert (resolution, resolution) in found and {(w, h) for h, w in found} == set(found)
    assert [w / h for h, w in found] == sorted(w / h for h, w in found)
    assert max(h * w for h, w in found) == area
    assert min((h + step) * (w + step) for h, w in found) > area


def test_those_of_sdxl_are_among_its_table() -> None:
    found = {(min(size), max(size)) for size in automatic(1024, 64, 2.0)}
    assert found <= SDXL
    assert {(768, 1344), (832, 1216), (896, 1152), (1024, 1024)} <= found


@pytest.mark.parametrize(("resolution", "step"), [(1024, 64), (512, 64), (256, 32), (512, 8)])
def test_between_the_extremes_every_ratio_has_a_bucket_nearby(resolution: int, step: int) -> None:
    buckets = automatic(resolution, step, 3.0)
    short = min(min(size) for size in buckets)
    # From a width w to the next the height falls from at most R² / w to at least R² / (w + s) - s; half of the way in logarithms.
    bound = (1 + step / short) / math.sqrt(1 - step / short)
    widest = max(w / h for h, w in buckets)
    images = [(10**6, round(10**6 * ratio)) for ratio in np.geomspace(1 / widest, widest, 997)]
    for (height, width), number in zip(images, nearest(images, buckets).tolist(), strict=True):
        h, w = buckets[number]
        factor = Fraction(width * h, height * w)
        assert max(factor, 1 / factor) <= bound


def brute_force(image: Size, buckets: list[Size]) -> int:
    """In rational numbers."""

    def key(k: int) -> tuple[Fraction, int, int]:
        ratio = Fraction(image[1] * buckets[k][0], image[0] * buckets[k][1])
        return max(ratio, 1 / ratio), -buckets[k][0] * buckets[k][1], k

    return min(range(len(buckets)), key=key)


def test_the_nearest_bucket_is_that_of_the_nearest_logarithm_of_the_ratio() -> None:
    rng = np.random.default_rng(0)
    buckets: list[Size] = [(48, 64), (64, 48), (96, 128), (64, 64), (32, 96), (96, 32), (128, 128)]
    images: list[Size] = [(h, w) for h, w in rng.integers(1, 200, (500, 2)).tolist()]
    # Ties: between 3:4 and 4:3 without a square, of one ratio and two areas, and the same ratio twice.
    for some in (buckets, buckets[:3], buckets[:2], [(64, 64), (64, 64)], automatic(512, 64, 4.0)):
        assert nearest(images, some).tolist() == [brute_force(image, some) for image in images]
    logarithms = [min(abs(math.log(w / h) - math.log(b[1] / b[0])) for b in buckets) for h, w in images]
    chosen = [buckets[k] for k in nearest(images, buckets)]
    found = [abs(math.log(w / h) - math.log(b[1] / b[0])) for (h, w), b in zip(images, chosen, strict=True)]
    np.testing.assert_allclose(found, logarithms, atol=1e-12)
    assert nearest([(50, 50), (50, 50)], [(48, 64), (96, 72)]).tolist() == [1, 1]
    assert nearest([None, (10, 90), None], buckets).tolist() == [0, 4, 0]


def test_images_in_a_bucket_are_found_by_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assigned, "_BLOCK", 7)
    rng = np.random.default_rng(1)
    for images in (1, 6, 7, 8, 100):
        numbers = np.stack([rng.choice(4, images, p=[0.7, 0.05, 0.25, 0.0]), rng.integers(0, 2, images)]).astype(np.uint8)
        of = Assigned(numbers)
        for resolution in range(2):
            for bucket in np.unique(numbers[resolution]).tolist():
                expected = np.flatnonzero(numbers[resolution] == bucket)
                for _ in range(40):
                    first, last = sorted(rng.integers(0, len(expected) + 1, 2).tolist())
                    assert of.images(resolution, bucket, first, last).tolist() == expected[first:last].tolist()


def test_an_image_takes_a_byte_a_resolution_and_the_file_is_known_by_its_digest(tmp_path: Path) -> None:
    numbers = np.zeros((2, 1000), np.uint8)
    of, file = Assigned(numbers), tmp_path / file_name(3)
    file.write_bytes(of.to_bytes())
    told = of.told([[(8, 8), (8, 16)], [(8, 8)]])
    assert told["images"] == [[1000, 0], [1000]]
    assert len(of.to_bytes()) < 2200
    assert np.array_equal(np.load(file), numbers)
    assert Assigned.read(file, str(told["sha256"])).bucket(1, 999) == 0
    file.write_bytes(of.to_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"buckets-00003.npy has been edited"):
        Assigned.read(file, str(told["sha256"]))


def plan_of(counts: list[int], sizes: list[list[Size]], *, crops: int, mirrors: bool, shard_rows: int) -> tuple[Plan, list[np.ndarray]]:
    """A plan of segments of so many images, in random buckets."""
    rng = np.random.default_rng(2)
    recipe: dict[str, Any] = {
        "data": {"crops": crops, "resolution": 32}, "mirrors": mirrors, "shard_rows": shard_rows, "batch_size": 3, "moments": True,
        "dtype": "fp32", "sizes": sizes,
    }  # fmt: skip
    shapes = tuple((4, h // 2, w // 2) for each in sizes for h, w in each)
    plan, numbers = Plan.of(json.loads(json.dumps(recipe)), shapes=shapes, labels=None, decoder_hash=""), []
    for k, images in enumerate(counts):
        numbers.append(np.stack([rng.integers(0, len(each), images) for each in sizes]).astype(np.uint8))
        buckets = Assigned(numbers[-1]) if plan.bucketed else None
        plan = plan.plus({"name": str(k), "fingerprint": str(k), "images": images}, None, {}, buckets)
    return plan, numbers


@pytest.mark.parametrize(
    "sizes",
    [
        [[(24, 40), (32, 32), (40, 24)]],
        [[(16, 16)], [(32, 32)]],
        [[(16, 16), (8, 32)], [(32, 32)], [(24, 40), (40, 24)]],
        [[(24, 40)]],
    ],
)
@pytest.mark.parametrize(("crops", "mirrors"), [(1, False), (3, True)])
def test_shards_hold_each_row_once_ascending_of_one_segment_and_one_size(sizes: list[list[Size]], crops: int, mirrors: bool) -> None:
    plan, numbers = plan_of([11, 1, 7], sizes, crops=crops, mirrors=mirrors, shard_rows=5)
    each = crops * (2 if mirrors else 1)
    views = each * len(sizes)
    assert (plan.views, plan.rows, plan.images) == (views, 19 * views, 19)
    shards, firsts = [list(plan.shard(n)) for n in range(plan.shards)], [0, 11, 12, 19]
    assert sorted(row for rows in shards for row in rows) == list(range(plan.rows))
    for n, rows in enumerate(shards):
        assert rows == sorted(rows) and 1 <= len(rows) <= 5 and plan.rows_in(n) == len(rows)
        assert [row for some in plan.microbatches(n) for row in some] == rows
        segment = plan.segments.index(plan.segment_of(n))
        for row in rows:
            image, resolution = row // views, row % views // each
            assert firsts[segment] <= image < firsts[segment + 1]
            size = sizes[resolution][int(numbers[segment][resolution, image - firsts[segment]])]
            assert plan.size_of_row(row) == size == plan.size_of(n)
            assert plan.shape_of(n) == (4, size[0] // 2, size[1] // 2)
        assert plan.bytes_of(n) == len(rows) * (2 * 4 * math.prod(plan.shape_of(n)) + 16)
    # Within a segment sizes come one after the other, and each but its last shard is full.
    for segment in plan.segments:
        order = [(plan.size_of(n), plan.rows_in(n)) for n in segment.numbers]
        assert all(rows == 5 or k + 1 == len(order) or order[k + 1][0] != size for k, (size, rows) in enumerate(order))
    wanted = list(range(1, plan.shards, 2))
    lazy = Microbatches(plan, wanted)
    assert [list(rows) for rows in lazy] == [list(rows) for n in wanted for rows in plan.microbatches(n)]
    assert list(lazy[len(lazy) - 1]) == list(plan.microbatches(wanted[-1])[-1])


def test_a_plan_comes_back_from_its_files(tmp_path: Path) -> None:
    plan, _ = plan_of([11, 4], [[(24, 40), (32, 32), (40, 24)], [(16, 16)]], crops=1, mirrors=False, shard_rows=5)
    for k, of in enumerate(plan.assigned):
        assert of is not None
        (tmp_path / file_name(k)).write_bytes(of.to_bytes())
    again = Plan.from_json(json.loads(json.dumps(plan.to_json()))).with_buckets(tmp_path)
    assert again == plan and again.to_json() == plan.to_json()
    assert [list(again.shard(n)) for n in range(again.shards)] == [list(plan.shard(n)) for n in range(plan.shards)]
    shorter = plan.without_last()
    assert [list(shorter.shard(n)) for n in range(shorter.shards)] == [list(plan.shard(n)) for n in range(shorter.shards)]


def settings(**data: Any) -> EncodeDataConfig:
    return EncodeDataConfig(source="x", **data)


def test_sizes_are_those_of_each_resolution() -> None:
    assert sizes_of(settings(resolution=32), 32, 8) is None
    assert sizes_of(settings(resolutions=[32, 16]), 0, 8) == [[(32, 32)], [(16, 16)]]
    assert sizes_of(settings(buckets=["40x24", "16x16"]), 0, 8) == [[(24, 40), (16, 16)]]
    assert sizes_of(settings(buckets="auto", bucket_step=8), 32, 8) == [automatic(32, 8, 2.0)]
    both = settings(buckets="auto", bucket_step=16, bucket_ratio=3.0, resolutions=[64, 96])
    assert sizes_of(both, 0, 8) == [automatic(64, 16, 3.0), automatic(96, 16, 3.0)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"buckets": []}, "buckets: got []; give at least one WxH"),
        ({"buckets": ["32x"]}, "buckets: got ['32x']; give WxH in pixels"),
        ({"buckets": ["32x4"]}, "buckets: got ['32x4']; give WxH in pixels"),
        ({"buckets": ["32x16", "32x16"]}, "give each size once"),
        ({"buckets": ["32x16"], "resolution": 16}, "resolution: got 16; data.buckets lists the sizes"),
        ({"buckets": ["32x16"], "resolutions": [16]}, "resolutions: got [16]; data.buckets lists the sizes"),
        ({"buckets": ["32x16"], "bucket_step": 16}, "bucket_step: got 16; only data.buckets=auto has steps"),
        ({"bucket_ratio": 3.0}, "bucket_ratio: got 3.0; only data.buckets=auto takes it"),
        ({"buckets": "auto", "bucket_ratio": 0.5}, "bucket_ratio: got 0.5; give at least 1"),
        ({"buckets": "auto", "bucket_step": 4}, "bucket_step: got 4; give at least 8 pixels"),
        ({"resolutions": []}, "resolutions: got []; give sides of at least 8 pixels"),
        ({"resolutions": [16, 16]}, "resolutions: got [16, 16]; give each side once"),
        ({"resolutions": [16], "resolution": 16}, "resolution: got 16; data.resolutions has them all"),
        ({"resolutions": [16], "resize": 16}, "resize: got 16; data.buckets and data.resolutions scale each image"),
        ({"resolutions": [16], "crops": 2, "crop": "random"}, "crops: got 2; data.buckets and data.resolutions scale each image"),
        ({"buckets": "auto", "zoom": (0.5, 1.0), "crop": "random"}, "zoom: got (0.5, 1.0); data.buckets and data.resolutions scale"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        settings(**given)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"buckets": ["40x20"]}, "data.buckets: got ['40x20']; give sides that are multiples of 8, the network's"),
        ({"resolutions": [16, 20]}, "data.resolutions: got [16, 20]; give multiples of 8, the network's"),
        ({"buckets": "auto", "bucket_step": 12}, "data.bucket_step: got 12; give one of the multiples of 8, the network's"),
        ({"buckets": "auto", "bucket_step": 16, "resolution": 40}, "data.resolution: got 40; give multiples of data.bucket_step=16"),
    ],
)
def test_sizes_that_the_network_or_the_step_does_not_divide_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        sizes_of(settings(**given), given.get("resolution", 0), 8)
    assert said in str(refused.value)
