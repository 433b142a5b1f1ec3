"""A run's folder: the table of `--out`, the lock, checkpoints that count."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from autoencoder.runtime.config import CheckpointConfig, LogConfig, TrainConfig
from autoencoder.runtime.errors import UsageError
from autoencoder.runtime.own_class import OwnClass
from autoencoder.runtime.run_folder import RunFolder

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Data:
    resolution: int = 32
    workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Config:
    out: str = "run"
    data: Data = field(default_factory=Data)
    own: OwnClass = field(default_factory=OwnClass)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(images="20k"))
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: str = "auto"


def start(path: Path, config: Any, resume: Literal["auto", "never"] = "auto") -> RunFolder:
    """Open, log a line and let go again, as a run that ends does."""
    run = RunFolder.open(path, config, resume=resume)
    (run.path / "metrics.jsonl").touch()
    run.close()
    return run


def refusal(path: Path, config: Any, resume: Literal["auto", "never"] = "auto") -> str:
    with pytest.raises(UsageError) as error:
        start(path, config, resume)
    return str(error.value)


def test_a_new_and_an_empty_folder_start(tmp_path: Path) -> None:
    run = start(tmp_path / "a" / "b", Config(), resume="never")
    assert run.notes == []
    assert not run.finished
    assert run.newest_checkpoint() is None
    written = yaml.safe_load((run.path / "config.yaml").read_text())
    assert written["train"]["images"] == "20k"
    assert written["log"]["trackers"] == ["tensorboard"]
    (tmp_path / "c").mkdir()
    start(tmp_path / "c", Config(), resume="never")


def test_the_same_configuration_goes_on_in_silence(tmp_path: Path) -> None:
    start(tmp_path, Config())
    same = Config(out="elsewhere", resume="auto", train=TrainConfig(images=20_000))
    assert start(tmp_path, same).notes == []


@pytest.mark.parametrize(
    ("changed", "note"),
    [
        (Config(log=LogConfig(every_images=7)), "log.every_images: '2k' -> 7"),
        (Config(checkpoint=CheckpointConfig(keep=5)), "checkpoint.keep: 2 -> 5"),
        (Config(data=Data(workers=3)), "data.workers: None -> 3"),
        (Config(train=TrainConfig(images="20k", max_hours=1.0)), "train.max_hours: None -> 1.0"),
        (Config(train=TrainConfig(images="30k")), "train.images: '20k' -> '30k', a longer run; "),
    ],
)
def test_what_may_change_is_noted_once(tmp_path: Path, changed: Config, note: str) -> None:
    start(tmp_path, Config())
    notes = start(tmp_path, changed).notes
    assert len(notes) == 1
    assert notes[0].startswith(note)
    assert start(tmp_path, changed).notes == []


def test_any_other_change_is_refused_with_old_and_new_value(tmp_path: Path) -> None:
    start(tmp_path, Config())
    before = (tmp_path / "config.yaml").read_text()
    message = refusal(tmp_path, Config(data=Data(resolution=64), train=TrainConfig(images="20k", seed=3), log=LogConfig(grid_images=4)))
    assert "  data.resolution: 32 -> 64\n" in message
    assert "  train.seed: 0 -> 3\n" in message
    assert "log.grid_images" not in message
    assert (tmp_path / "config.yaml").read_text() == before
    start(tmp_path, Config())


def test_a_start_that_failed_before_its_first_line_may_be_mended(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, Config(), resume="auto").close()
    run = start(tmp_path, Config(data=Data(resolution=64)))
    assert run.notes == []
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["resolution"] == 64
    assert "data.resolution: 64 -> 32" in refusal(tmp_path, Config())


def test_a_shorter_run_is_refused(tmp_path: Path) -> None:
    start(tmp_path, Config())
    assert "train.images: '20k' -> 19999" in refusal(tmp_path, Config(train=TrainConfig(images=19_999)))


def test_settings_that_the_old_configuration_does_not_know_stand_at_their_defaults(tmp_path: Path) -> None:
    start(tmp_path, Config())
    old = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del old["train"]["seed"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert "train.seed: 0 -> 1" in refusal(tmp_path, Config(train=TrainConfig(images="20k", seed=1)))
    assert start(tmp_path, Config()).notes == []
    old["train"]["dropped"] = 7
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert "train.dropped: 7 -> None" in refusal(tmp_path, Config())


def test_an_argument_that_was_left_out_is_neither_null_nor_its_new_value(tmp_path: Path) -> None:
    def own(**arguments: Any) -> Config:
        return Config(own=OwnClass(class_path="a.B", init_args=arguments))

    start(tmp_path, own(alpha=0.5, images=5))
    assert "  own.init_args.alpha: 0.5 -> 0.01\n" in refusal(tmp_path, own(alpha=0.01, images=5))
    assert "  own.init_args.images: 5 -> not given\n" in refusal(tmp_path, own(alpha=0.5))
    assert "  own.init_args.beta: not given -> None\n" in refusal(tmp_path, own(alpha=0.5, images=5, beta=None))
    assert start(tmp_path, own(alpha=0.5, images=5)).notes == []


def test_resume_never_refuses_a_used_folder(tmp_path: Path) -> None:
    start(tmp_path, Config())
    message = refusal(tmp_path, Config(), resume="never")
    assert message.startswith(f"out: got {str(tmp_path)!r}; a used folder")


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert "no run" in refusal(tmp_path, Config())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]
    assert "a file" in refusal(tmp_path / "thesis.tex", Config())
    assert "cannot be made or read (Not a directory)" in refusal(tmp_path / "thesis.tex" / "run", Config())
    assert "give a folder" in refusal(Path(), Config())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    # Not by permissions: they do not stop root.
    monkeypatch.setattr("autoencoder.runtime.lock.os.open", denied)
    expected = f"out: got {str(tmp_path)!r}; cannot be written (Permission denied); give a folder that can be written"
    assert refusal(tmp_path, Config()) == expected


def test_the_newest_complete_checkpoint_counts(tmp_path: Path) -> None:
    run = start(tmp_path, Config())
    for step, complete in ((5, True), (99_999_999, True), (100_000_000, True), (100_000_005, False)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        if complete:
            (folder / "complete").touch()
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest.name == "step-100000000"


def test_a_run_is_finished_for_its_length_and_not_for_a_longer_one(tmp_path: Path) -> None:
    run = start(tmp_path, Config())
    run.finish({"step": 313, "images": 20_000})
    assert start(tmp_path, Config()).finished
    longer = replace(Config(), train=TrainConfig(images=20_001))
    assert not start(tmp_path, longer).finished


HOLDER = """
import multiprocessing, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_run_folder import Config, RunFolder
run = RunFolder.open(Path({path!r}), Config(), resume="auto")
context = multiprocessing.get_context("fork")
started = context.Event()
def live():
    started.set()
    time.sleep(60)
worker = context.Process(target=live)
worker.start()
started.wait()
print(worker.pid, flush=True)
time.sleep(60)
"""


def test_one_process_holds_the_folder_until_it_dies_even_if_its_workers_live_on(tmp_path: Path) -> None:
    script = HOLDER.format(root=str(ROOT), path=str(tmp_path))
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        assert f"in use by process {holder.pid} on " in refusal(tmp_path, Config())
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(worker, 0)
        start(tmp_path, Config())
    finally:
        holder.kill()
        os.kill(worker, signal.SIGKILL)


def test_one_process_cannot_open_a_folder_twice_and_closing_frees_it(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path, Config(), resume="auto")
    assert f"in use by process {os.getpid()}" in refusal(tmp_path, Config())
    run.close()
    run.close()
    start(tmp_path, Config())


def test_a_refused_start_frees_the_folder(tmp_path: Path) -> None:
    start(tmp_path, Config())
    refusal(tmp_path, Config(data=Data(resolution=64)))
    start(tmp_path, Config())
