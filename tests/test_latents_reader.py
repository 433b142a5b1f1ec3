"""The reader: what it gives, alone and in our code, and what it refuses."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.utils.data import DataLoader

from autoencoder import encode
from autoencoder.latents import plan, reader
from autoencoder.latents.check import check_latents
from autoencoder.latents.opened import open_latents
from autoencoder.latents.reader import Latents, LatentsError, manifest_digest
from autoencoder.runtime.errors import ConfigError
from tests.encode_children import photos, small_model
from tests.small_latents import add_shard

NAMES = [f"{kind}/{k}.png" for kind in ("ape", "bee") for k in range(5)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 rows in shards of 6, 6, 6 and 2, without those of image 3 (rows 6 and 7)."""
    folder = tmp_path_factory.mktemp("reader")
    small_model(folder / "vae")
    photos(folder / "photos", NAMES)
    (folder / "photos" / "ape" / "3.png").write_bytes(b"no image")
    argv = ["--model", str(folder / "vae"), "--data.source", str(folder / "photos"), "--data.workers=0", "--mirrors", "--shard_rows=6"]
    assert encode.main([*argv, "--out", str(folder / "latents")]) == 0
    return folder / "latents"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "latents"))


def stored(folder: Path, name: str) -> np.ndarray:
    return np.concatenate([load_file(file)[name] for file in sorted(folder.glob("data-*.safetensors"))])


def test_rows_come_in_the_order_that_was_asked_for_whatever_their_shards(made: Path) -> None:
    latents = Latents(made)
    assert len(latents) == 18
    wanted = [17, 0, 5, 5, 11, 4, 10, 17, 6]
    rows = latents.gather(wanted)
    for name in ("mean", "logvar", "label", "id"):
        np.testing.assert_array_equal(getattr(rows, name), stored(made, name)[wanted])
    assert (rows.mean.dtype, rows.label.dtype, rows.id.dtype) == (np.float32, np.int64, np.int64)
    np.testing.assert_array_equal(latents.ids, [r for r in range(20) if r not in (6, 7)])
    np.testing.assert_array_equal(latents.labels_of(), [0] * 8 + [1] * 10)
    assert latents.gather([]).mean.shape == (0, 4, 8, 8)
    for outside in (-1, 18):
        with pytest.raises(IndexError, match=f"row {outside} of 18"):
            latents.gather([3, outside])
    assert sum(1 for _ in latents) == 18  # type: ignore[misc]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataloader_takes_it_and_a_pickled_copy_opens_the_files_again(made: Path, workers: int) -> None:
    latents = Latents(made)
    sent = pickle.dumps(latents)
    assert len(sent) < 1000
    batch = latents[[17, 3]]
    np.testing.assert_array_equal(batch["id"], [19, 3])
    np.testing.assert_array_equal(batch["mean"][1], latents[3]["mean"])
    loader = DataLoader(pickle.loads(sent), batch_size=7, num_workers=workers)
    batches = list(loader)
    assert [len(batch["id"]) for batch in batches] == [7, 7, 4]
    for name in ("mean", "logvar", "label", "id"):
        np.testing.assert_array_equal(torch.cat([batch[name] for batch in batches]).numpy(), stored(made, name))


ALONE = """
import sys
for name in ("autoencoder", "diffusion", "safetensors", "diffusers", "datasets", "pyarrow", "PIL"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import numpy
from latents_reader import Latents
latents = Latents(sys.argv[2])
rows = latents.gather(range(len(latents)))
numpy.savez(sys.argv[3], std=latents.std, **{name: getattr(rows, name) for name in ("mean", "logvar", "label", "id")})
"""


def test_the_file_works_alone(made: Path, tmp_path: Path) -> None:
    shutil.copy(reader.__file__, tmp_path / "latents_reader.py")
    command = [sys.executable, "-I", "-c", ALONE, str(tmp_path), str(made), str(tmp_path / "out.npz")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as found:
        for name in ("mean", "logvar", "label", "id"):
            np.testing.assert_array_equal(found[name], stored(made, name))
        np.testing.assert_array_equal(found["std"], Latents(made).std)


def test_the_reader_and_the_plan_speak_of_one_format() -> None:
    assert (reader.FORMAT, reader.VERSION) == (plan.FORMAT, plan.VERSION)


def rewrite(folder: Path, shard: int, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """Replace a shard by another, with a manifest that fits it."""
    file = folder / f"data-{shard:05d}.safetensors"
    save_file(change(load_file(file)), file)
    edit(folder, lambda manifest: manifest["shards"][shard].update(bytes=file.stat().st_size, rows=len(load_file(file)["id"])))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as a program would that knows the format."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))


def put(tensors: dict[str, np.ndarray], name: str, place: tuple[int, ...], value: float) -> dict[str, np.ndarray]:
    tensors[name][place] = value
    return tensors


def overwrite(folder: Path, content: bytes) -> None:
    """Another content for the second shard, with a manifest that has its size."""
    (folder / "data-00001.safetensors").write_bytes(content)
    edit(folder, lambda manifest: manifest["shards"][1].update(bytes=len(content)))


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "data-00002.safetensors").unlink(), r"data-00002.safetensors: cannot be read \(No such file"),
        (lambda f: truncate(f / "data-00002.safetensors", 3000), r"data-00002.safetensors: 3000 bytes, the manifest says \d+; copy it"),
        (lambda f: truncate(f / "data-00001.safetensors", 0), "data-00001.safetensors: 0 bytes, the manifest says"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json, so not finished; run the same encode_dataset command again"),
        (lambda f: truncate(f / "manifest.json", 100), r"manifest.json: cannot be read .*; run encode_dataset again"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json: not the manifest of latents"),
        (lambda f: edit(f, lambda m: m.update(version=1)), "manifest.json: version 1, this reader knows 2"),
        (
            lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace('"rows": 18', '"rows": 19')),
            r"manifest.json: edited since it was written .*; run encode_dataset again",
        ),
    ],
)
def test_what_is_damaged_is_refused_on_opening(copy: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(copy)
    with pytest.raises(LatentsError, match=said):
        Latents(copy)
    with pytest.raises(ConfigError, match="latents: got "):
        open_latents(str(copy), "latents")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: overwrite(f, b"\x50" + bytes(19)), "data-00001.safetensors: 20 bytes, shorter than its header"),
        (lambda f: overwrite(f, b""), "data-00001.safetensors: 0 bytes, shorter than its header"),
        (lambda f: overwrite(f, b"\x04" + bytes(7) + b"nope"), "data-00001.safetensors: not a safetensors"),
        (lambda f: overwrite(f, b"\x07" + bytes(7) + b'{"a":1}'), "data-00001.safetensors: not a safetensors"),
        (
            lambda f: rewrite(f, 2, lambda t: {**t, "mean": t["mean"][:, :, :4], "logvar": t["logvar"][:, :, :4]}),
            r"data-00002.safetensors: mean: \(6, 4, 4, 8\), the manifest says \(6, 4, 8, 8\)",
        ),
        (lambda f: rewrite(f, 1, lambda t: {k: v for k, v in t.items() if k != "logvar"}), "00001.safetensors: logvar: no such tensor"),
        (lambda f: rewrite(f, 0, lambda t: {k: v for k, v in t.items() if k != "mean"}), "00000.safetensors: mean: no such tensor"),
        (lambda f: rewrite(f, 1, lambda t: {**t, "label": t["label"][:-1]}), r"label: \(3,\), the manifest says \(4,\)"),
        (
            lambda f: rewrite(f, 2, lambda t: put(t, "label", (3,), 2)),
            "data-00002.safetensors: row 3 has label 2, but the table has 2 classes",
        ),
        (lambda f: rewrite(f, 0, lambda t: put(t, "label", (5,), -2)), "data-00000.safetensors: row 5 has label -2"),
        (
            lambda f: rewrite(f, 0, lambda t: {**t, "mean": t["mean"].astype(np.float64)}),
            "data-00000.safetensors: mean has dtype F64; this reader knows F32, F16, I64",
        ),
    ],
)
def test_a_damaged_shard_is_refused_when_it_is_first_read_and_by_our_commands_at_once(
    copy: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(copy)
    latents = Latents(copy)
    with pytest.raises(LatentsError, match=said):
        latents.gather(range(18))
    with pytest.raises(LatentsError, match=said):
        latents.check()
    with pytest.raises(ConfigError, match=f"latents: got .*{said}"):
        open_latents(str(copy), "latents")


@pytest.mark.parametrize(("name", "value"), [("mean", np.nan), ("mean", np.inf), ("logvar", np.nan)])
def test_a_value_that_is_not_finite_is_named_when_it_is_read(copy: Path, name: str, value: float) -> None:
    rewrite(copy, 2, lambda tensors: put(tensors, name, (3, 1, 2, 5), value))
    latents = Latents(copy)
    latents.gather([0, 9, 17])
    with pytest.raises(LatentsError, match=f"data-00002.safetensors: {name} of row 3 is not finite"):
        latents.gather([0, 13, 11, 17])


def test_a_finite_row_whose_sum_overflows_is_read(copy: Path) -> None:
    rewrite(copy, 2, lambda tensors: put(tensors, "mean", (3,), 3e38))
    assert Latents(copy).gather([13]).mean.min() == np.float32(3e38)


def test_no_file_stays_open_however_many_shards_are_mapped(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc to count open files in")
    before = len(os.listdir("/proc/self/fd"))
    latents = Latents(copy)
    latents.gather(range(18))
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.setattr(reader, "MOST_MAPPED", 2)
    few = Latents(copy)
    np.testing.assert_array_equal(few.gather(range(18)).mean, latents.gather(range(18)).mean)
    assert len(few._opened) == 2


def test_memory_of_a_batch_is_used_again_only_when_nobody_holds_any_of_it(made: Path) -> None:
    latents = Latents(made)
    held, kept = [], {}
    for number in range(12):
        rows = latents.gather([number, number + 1, number + 2])
        view = [rows.mean[1:, 0], rows.logvar, torch.from_numpy(rows.mean)[2], rows.mean.reshape(-1)[5:9]][number % 4]
        held.append(view)
        kept[number] = np.array(view)
        del rows, view
        if number % 3 == 2:
            held[number - 1] = None
        for n, value in enumerate(held):
            if value is not None:
                np.testing.assert_array_equal(np.asarray(value), kept[n])
    del held
    addresses = {latents.gather([3, 4, 5]).mean.ctypes.data for _ in range(5)}
    assert len(addresses) == 1


def test_what_is_mapped_cannot_be_written_into(made: Path) -> None:
    shard = reader.Shard(made / "data-00000.safetensors")
    shard.open()
    with pytest.raises(ValueError, match="read-only"):
        shard.tensors["mean"][0] = 0


@pytest.fixture
def two_shapes(copy: Path) -> Path:
    """The 18 rows and 5 of shape (4, 4, 16), whose ids lie before and after."""
    add_shard(copy, np.random.default_rng(0).standard_normal((5, 4, 4, 16)), id=np.array([6, 7, 20, 21, 22]), label=1)
    return copy


def test_rows_of_one_shape_are_numbered_on_their_own(two_shapes: Path) -> None:
    latents = Latents(two_shapes)
    assert (len(latents), latents.shapes) == (23, [(4, 8, 8), (4, 4, 16)])
    wide = latents.of_shape((4, 4, 16))
    wide = pickle.loads(pickle.dumps(wide))
    assert (len(wide), wide.shape, wide.ids.tolist()) == (5, (4, 4, 16), [6, 7, 20, 21, 22])
    np.testing.assert_array_equal(wide.gather([4, 0]).mean, latents.gather([22, 18]).mean)
    assert latents.of_shape([4, 8, 8]).ids.tolist() == [r for r in range(20) if r not in (6, 7)]
    np.testing.assert_array_equal(wide.std, latents.std)
    assert latents.ids.tolist()[-6:] == [19, 6, 7, 20, 21, 22]


def test_rows_of_differing_shapes_are_not_mixed(two_shapes: Path) -> None:
    latents = Latents(two_shapes)
    with pytest.raises(LatentsError, match=r"rows of shapes \(4, 8, 8\), \(4, 4, 16\) asked for at once; .* of_shape\(\(4, 8, 8\)\)"):
        latents.gather([17, 18])
    with pytest.raises(LatentsError, match=r"take those of one shape: of_shape\(\(4, 8, 8\)\)"):
        latents.shape  # noqa: B018
    with pytest.raises(LatentsError, match=r"no rows of shape \(4, 2, 2\); it has shapes \(4, 8, 8\), \(4, 4, 16\)"):
        latents.of_shape((4, 2, 2))


def test_labels_without_a_table_are_any_number_from_minus_one(copy: Path) -> None:
    edit(copy, lambda manifest: manifest.update(labels=None))
    rewrite(copy, 1, lambda tensors: put(put(tensors, "label", (0,), 1200), "label", (1,), -1))
    assert Latents(copy).labels_of()[6:8].tolist() == [1200, -1]


def test_what_is_no_finished_folder_of_latents_is_told_without_torch(copy: Path, tmp_path: Path) -> None:
    check_latents(str(copy), "latents")
    with pytest.raises(ConfigError, match="latents: got '/no/such'; no such folder"):
        check_latents("/no/such", "latents")
    with pytest.raises(ConfigError, match=r"no manifest.json in it, so no latents"):
        check_latents(str(tmp_path), "latents")
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"its manifest.json cannot be read"):
        check_latents(str(copy), "latents")
    (copy / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="not finished; run the same encode_dataset command again"):
        check_latents(str(copy), "latents")
    code = "import sys, autoencoder.latents.check, autoencoder.encode; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


def test_threads_that_ask_at_once_get_memory_of_their_own() -> None:
    memory, others = reader._Memory(), list[np.ndarray]()
    memory.lend((4,))

    def another_thread_asks() -> None:
        if not others:
            others.append(np.empty(0))
            others.append(memory.lend((4,)))

    memory._lent = [(kept, another_thread_asks) for kept, _ in memory._lent]  # type: ignore[misc]
    mine = memory.lend((4,))
    assert len(others) == 2 and not np.shares_memory(mine, others[1])
