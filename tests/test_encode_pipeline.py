"""How `encode_dataset` reads, encodes and writes at the same time: order, bytes, errors, and where the time went."""

import errno
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from autoencoder import encode
from autoencoder.data.batch import Example, stack
from autoencoder.latents import progress, shards
from autoencoder.latents.lanes import SMALL_BYTES, Lanes
from autoencoder.latents.network import Encoder
from autoencoder.latents.pipeline import Speed
from autoencoder.latents.plan import Plan
from autoencoder.latents.progress import Progress, Stopwatch
from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.pretrained import load
from tests.encode_children import files, photos, small_model

CPU = torch.device("cpu")
RECIPE = {
    "precision": "fp32", "moments": False, "pixels": PixelRecipe().to_json(), "data": {"resolution": 16}, "batch_size": 1, "dtype": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    small_model(folder / "vae")
    photos(folder / "photos", [f"{k}.png" for k in range(13)])
    return folder


def arguments(setting: Path, out: Path, *more: str) -> list[str]:
    base = ["--data.workers=0", "--precision=fp32", "--batch_size=2", "--shard_rows=4", f"--out={out}"]
    return [f"--model={setting / 'vae'}", f"--data.source={setting / 'photos'}", *base, *more]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_files_are_the_same_however_many_microbatches_are_encoded_at_once(setting: Path, tmp_path: Path) -> None:
    for threads, workers in ((1, 0), (3, 0), (3, 2)):
        torch.set_num_threads(threads)
        assert encode.main(arguments(setting, tmp_path / f"{threads}-{workers}", f"--data.workers={workers}")) == 0
        assert torch.get_num_threads() == threads
    assert files(tmp_path / "1-0") == files(tmp_path / "3-0") == files(tmp_path / "3-2")


@pytest.mark.usefixtures("threads")
def test_small_microbatches_take_a_thread_each_and_large_ones_share_all() -> None:
    torch.set_num_threads(4)
    assert Lanes.of(CPU, width=32, side=64, batch_size=64) == Lanes(4, 1)
    assert Lanes.of(CPU, width=128, side=256, batch_size=SMALL_BYTES // (4 * 128 * 256**2)) == Lanes(4, 1)
    assert Lanes.of(CPU, width=128, side=256, batch_size=SMALL_BYTES // (4 * 128 * 256**2) + 1) == Lanes(1, 4)
    torch.set_num_threads(1)
    assert Lanes.of(CPU, width=32, side=64, batch_size=64) == Lanes(1, 1)


@pytest.mark.usefixtures("threads")
def test_values_come_in_order_each_lane_keeps_its_threads_and_little_is_taken_ahead() -> None:
    torch.set_num_threads(2)
    taken = itertools.count()
    seen, busy, most = set(), set(), []

    def square(number: int) -> int:
        seen.add((threading.get_ident(), torch.get_num_threads()))
        busy.add(number)
        most.append(len(busy))
        time.sleep(0.02 if number % 3 == 0 else 0.001)
        busy.discard(number)
        return number**2

    with Lanes(3, 1).in_order(square, (next(taken) for _ in range(20))) as found:
        for place, (item, value) in enumerate(found):
            assert (item, value) == (place, place**2)
            assert next(taken) - place <= 6
            taken = itertools.count(min(place + 6, 20))
    assert len({thread for thread, _ in seen}) == 3
    assert {count for _, count in seen} == {1}
    assert 2 <= max(most) <= 3
    assert threading.get_ident() not in {thread for thread, _ in seen}
    assert torch.get_num_threads() == 2


def test_a_disk_that_is_full_ends_with_2_and_its_own_words_and_the_next_run_goes_on(
    setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode.main(arguments(setting, tmp_path / "whole")) == 0
    write, where = shards.put, list[int]()

    def full(path: Path, beside: Path) -> None:
        where.append(threading.get_ident())
        if path.name == "data-00002.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, beside)

    monkeypatch.setattr(shards, "put", full)
    capsys.readouterr()
    assert encode.main(arguments(setting, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert "data-00002.safetensors cannot be written (No space left on device); make room" in said
    assert "Traceback" not in said
    assert threading.get_ident() not in where
    assert sorted(path.name for path in (tmp_path / "out").glob("data-*.json")) == ["data-00000.json", "data-00001.json"]
    monkeypatch.undo()
    assert encode.main(arguments(setting, tmp_path / "out")) == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_an_error_in_encoding_leaves_the_shard_that_is_being_written_whole(
    setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoencoder.latents import pipeline

    begun, write, gather, calls = threading.Event(), shards.write, pipeline._gather, itertools.count()

    def slow(*given: object) -> object:
        begun.set()
        time.sleep(0.3)
        return write(*given)  # type: ignore[arg-type]

    def failing(*given: object) -> object:
        if next(calls) == 1:
            begun.wait()
            raise RuntimeError("in the second shard")
        return gather(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "write", slow)
    monkeypatch.setattr(pipeline, "_gather", failing)
    with pytest.raises(RuntimeError, match="in the second shard"):
        encode.main(arguments(setting, tmp_path))
    assert [path.name for path in tmp_path.glob("data-*.json")] == ["data-00000.json"]
    assert not list(tmp_path.glob(".data-*"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("lane", "writer"))]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_stage_within_another_takes_its_time_away_from_it(clock: Clock) -> None:
    watch = Stopwatch("encoding")

    def slow() -> Iterator[str]:
        for seconds in (3.0, 4.0):
            clock.now += seconds
            with watch.stage("writing"):
                clock.now += 1.0
            yield "item"

    for _ in watch.each("reading", slow()):
        clock.now += 5.0
    clock.now += 1.0
    assert watch.shares() == {"encoding": 11 / 20, "reading": 7 / 20, "writing": 2 / 20}


def test_lines_say_rate_time_left_and_the_limit(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    watch = Stopwatch("encoding")
    shown = Progress(1000, 100, watch=watch)
    with watch.stage("reading"):
        clock.now += 15.0
    clock.now += 5.0
    shown.advance(400)
    clock.now += 20.0
    shown.advance(500)
    shown.close(True)
    assert capsys.readouterr().err.splitlines() == [
        "encoded 500 / 1,000 rows  20.0 rows/s  0m25s left  limit: reading (75% of the time)",
        "encoded 1,000 / 1,000 rows  22.5 rows/s",
        "time: 62% encoding, 38% reading",
    ]


def test_processes_read_where_one_thread_would_not_keep_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoencoder.latents.pipeline.spare_cores", lambda: 7)
    assert Speed(reading=1.0, encoding=2.1, shared=0.5).workers == 0
    assert Speed(reading=1.0, encoding=1.9, shared=0.5).workers == 7
    assert Speed(reading=1.0, encoding=2.1, shared=0.5).a_row(0) == 2.6
    assert Speed(reading=8.0, encoding=1.0, shared=0.0).a_row(4) == 2.0


ALLOCATING = """
import resource, sys, torch
from autoencoder.runtime.memory import keep_freed
if sys.argv[1] == "kept":
    keep_freed()
for _ in range(24):
    torch.ones(10 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(10 * 2**20)
sys.exit((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() // (40 * 2**20))
"""
"""Exit code: how many feature maps' worth of page faults eight of 40 MiB cost, once the heap has grown to what it needs for them: it takes
some ten of them, as an aligned block seldom fits where the last one was."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone is told")
def test_memory_that_is_kept_is_not_mapped_again() -> None:
    # In interpreters of their own: what other tests have left in a fork's heap decides where large blocks come to lie.
    cost = {way: subprocess.run([sys.executable, "-c", ALLOCATING, way], check=False).returncode for way in ("kept", "usual")}
    assert cost == {"kept": 0, "usual": 8}


def test_what_is_waited_for_is_the_work_of_the_workers_own_gpu(setting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[object] = []

    class Event:
        def record(self, stream: object = "of the first GPU") -> None:
            recorded.append(stream)

        def synchronize(self) -> None:
            pass

    empty, batch = torch.empty, stack([Example(np.zeros((16, 16, 3), np.uint8), np.empty(0, np.float32), 0, "", 0, 0)], [], PixelRecipe())
    plan = Plan.of(RECIPE, shapes=((4, 8, 8),), labels=None, decoder_hash="")
    encoder = Encoder(load(str(setting / "vae")), plan, CPU)
    expected = encoder(batch)["mean"]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"of {device}")
    monkeypatch.setattr(torch, "empty", lambda shape, pin_memory: empty(shape))
    encoder.on_cpu = False
    with encoder.lanes.in_order(encoder, [batch]) as encoded:
        assert [np.array_equal(moments["mean"], expected) for _, moments in encoded] == [True]
    assert recorded == ["of cpu"]
