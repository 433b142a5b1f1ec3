"""`--append`: images that came later, under the same recipe, with numbers that go on."""

import json
import os
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file

from autoencoder import encode
from autoencoder.latents import shards
from autoencoder.latents.plan import Plan
from autoencoder.latents.reader import Latents
from tests.encode_children import files, finish, photos, small_model, start

OLD = [f"{kind}/{k}.png" for kind in ("bee", "cat") for k in range(3)]
NEW = ["ant/5.png", "bee/1x.png", "cat/0.5.png", "cat/9.png", "ant/6.png"]
OTHER = ["ant/a.png", "bee/b.png", "cat/c.png", "dog/d.png", "dog/e.png"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`old` photos and their latents `begun`; `grown`, with the new ones among them; `other` photos."""
    folder = tmp_path_factory.mktemp("append")
    small_model(folder / "vae")
    photos(folder / "old", OLD)
    photos(folder / "grown", OLD)
    photos(folder / "grown", NEW, seed=1)
    photos(folder / "other", OTHER, seed=2)
    photos(folder / "plain", ["a.png", "b.png"], seed=2)
    assert encode.main(arguments(folder, "old", folder / "begun")) == 0
    return folder


def arguments(setting: Path, source: str | Path, out: Path, *more: str) -> list[str]:
    given = [f"--model={setting / 'vae'}", f"--data.source={setting / source}", "--data.workers=0", "--precision=fp32"]
    return [*given, "--mirrors", "--shard_rows=4", "--batch_size=3", f"--out={out}", *more]


@pytest.fixture
def growing(setting: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A folder of photos that has been encoded, and has then grown; its latents."""
    shutil.copytree(setting / "old", tmp_path / "photos")
    assert encode.main(arguments(setting, tmp_path / "photos", tmp_path / "latents")) == 0
    shutil.copytree(setting / "grown", tmp_path / "photos", dirs_exist_ok=True)
    return tmp_path / "photos", tmp_path / "latents"


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    capsys.readouterr()
    assert encode.main(argv) == 2
    return capsys.readouterr().err


def rows_by_name(folder: Path) -> dict[str, list[tuple[bytes, str]]]:
    """Each image's latents, and its class by name."""
    latents, rows = Latents(folder), {}
    read = latents.gather(range(len(latents)))
    assert read.logvar is not None and latents.labels is not None
    tables = [pyarrow.parquet.read_table(path) for path in sorted(folder.glob("data-*.parquet"))]
    names = [name for table in tables for name in table["name"].to_pylist()]
    assert [row for table in tables for row in table["row"].to_pylist()] == read.id.tolist() == list(range(len(latents)))
    for name, mean, logvar, label in zip(names, read.mean, read.logvar, read.label, strict=True):
        rows.setdefault(name, []).append((mean.tobytes() + logvar.tobytes(), latents.labels[label]))
    return rows


def test_of_a_folder_that_has_grown_the_new_images_are_added(
    setting: Path, growing: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = growing
    before, old = files(out), Latents(out).manifest
    argv = arguments(setting, source, out)
    assert "--append adds the 5 images that are not there yet" in refused(capsys, argv)
    assert files(out) == before
    assert encode.main([*argv, "--append"]) == 0
    assert "plan: 22 rows (6 images and 5 images of " in capsys.readouterr().out
    after, manifest = files(out), Latents(out).manifest
    assert {name: after[name] for name in before if name not in ("plan.json", "manifest.json")} == {
        name: content for name, content in before.items() if name not in ("plan.json", "manifest.json")
    }
    assert manifest["shards"][:3] == old["shards"]
    assert [(s["first_image"], s["images"], s["first_shard"], s["shards"]) for s in manifest["segments"]] == [(0, 6, 0, 3), (6, 5, 3, 3)]
    assert manifest["recipe_hash"] == old["recipe_hash"] and manifest["rows_hash"] != old["rows_hash"]
    # Old classes keep their numbers, though the class that came is the first by name.
    assert (old["labels"], manifest["labels"]) == (["bee", "cat"], ["bee", "cat", "ant"])
    rows = rows_by_name(out)
    assert list(rows) == [*OLD, "ant/5.png", "ant/6.png", "bee/1x.png", "cat/0.5.png", "cat/9.png"]
    assert all(label == name[:3] for name, views in rows.items() for _, label in views)
    assert pyarrow.parquet.read_table(out / "data-00003.parquet")["image"].to_pylist() == [6, 6, 7, 7]
    assert encode.main(argv) == 0
    assert encode.main([*argv, "--append"]) == 0
    assert capsys.readouterr().out.endswith("nothing to append (22 rows); nothing to do\n")
    assert files(out) == after
    fresh = setting / "at once"
    if not fresh.exists():
        assert encode.main(arguments(setting, "grown", fresh)) == 0
    at_once = rows_by_name(fresh)
    for name, views in rows.items():
        # Other microbatches, so other last bits.
        for (content, _), (expected, _) in zip(views, at_once[name], strict=True):
            np.testing.assert_allclose(np.frombuffer(content, np.float32), np.frombuffer(expected, np.float32), atol=2e-6)


def test_statistics_are_those_of_a_float64_pass_over_all_shards(setting: Path, growing: tuple[Path, Path]) -> None:
    source, out = growing
    assert encode.main(arguments(setting, source, out, "--append")) == 0
    assert encode.main(arguments(setting, "other", out, "--append")) == 0
    stored = [load_file(file) for file in sorted(out.glob("data-*.safetensors"))]
    mean = np.concatenate([tensors["mean"] for tensors in stored]).astype(np.float64)
    posterior = np.exp(np.concatenate([tensors["logvar"] for tensors in stored]).astype(np.float64)).mean((0, 2, 3))
    told = Latents(out).manifest["statistics"]
    assert told["values"] == mean[:, 0].size == (6 + 5 + 5) * 2 * 64
    np.testing.assert_allclose(told["mean"], mean.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(told["std"], np.sqrt(mean.var((0, 2, 3)) + posterior), rtol=1e-6)


def test_another_source_is_added_whole_with_its_classes_by_name(setting: Path, tmp_path: Path) -> None:
    shutil.copytree(setting / "begun", tmp_path / "out")
    assert encode.main(arguments(setting, "other", tmp_path / "out", "--append")) == 0
    rows = rows_by_name(tmp_path / "out")
    assert list(rows) == [*OLD, *OTHER]
    assert all(label == name[:3] for name, views in rows.items() for _, label in views)
    assert [segment["source"]["name"] for segment in Latents(tmp_path / "out").manifest["segments"]] == [
        str(setting / "old"), str(setting / "other")
    ]  # fmt: skip
    before = files(tmp_path / "out")
    for source in ("old", "other"):
        assert encode.main(arguments(setting, source, tmp_path / "out")) == 0
        assert encode.main(arguments(setting, source, tmp_path / "out", "--append")) == 0
    assert files(tmp_path / "out") == before


def test_a_folder_that_has_moved_and_grown_is_known_again(setting: Path, tmp_path: Path) -> None:
    shutil.copytree(setting / "begun", tmp_path / "out")
    assert encode.main(arguments(setting, "grown", tmp_path / "out", "--append")) == 0
    assert [segment["images"] for segment in Latents(tmp_path / "out").manifest["segments"]] == [6, 5]


def test_killed_before_each_rename_an_append_goes_on_and_the_old_rows_stay_readable(setting: Path, growing: tuple[Path, Path]) -> None:
    source, out = growing
    argv = arguments(setting, source, out, "--append")
    kept = out.with_name("kept")
    shutil.copytree(out, kept)
    assert encode.main(argv) == 0
    expected, old = files(out), Latents(kept).gather(range(12))
    # Listing, index, plan, three shards of three files each, manifest.
    for rename in range(13):
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        assert finish(start(argv, kill_at=rename)) == -signal.SIGKILL
        np.testing.assert_array_equal(Latents(out).gather(range(12)).mean, old.mean)
        assert len(Latents(out)) == 12
        # With the flag or without: what has been planned goes on.
        assert encode.main(argv if rename % 2 == 0 or rename < 3 else argv[:-1]) == 0
        assert files(out) == expected


def test_workers_append_together(setting: Path, growing: tuple[Path, Path]) -> None:
    source, out = growing
    argv = arguments(setting, source, out, "--append")
    shutil.copytree(out, out.with_name("alone"))
    assert encode.main(arguments(setting, source, out.with_name("alone"), "--append")) == 0
    processes = [start([*argv, f"--worker={i}", "--workers=2"]) for i in (0, 1)]
    assert [finish(process) for process in processes] == [0, 0]
    assert files(out) == files(out.with_name("alone"))


def test_what_a_planned_append_says_to_run_next_makes_it(
    setting: Path, growing: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown, latents = growing
    settings = tmp_path / "append.yaml"
    settings.write_text("append: true\nonly: plan\n")
    for more in (["--only", "plan", "--append"], ["--config", str(settings)], ["--append", "true", "--only=plan"]):
        assert encode.main([*arguments(setting, grown, latents), *more]) == 0
        said = capsys.readouterr().out
        told = [shlex.split(line)[2:] for line in said.splitlines() if line.startswith("  firststage encode_dataset ")]
        assert not {"--append", "true", "plan", "--only=plan"} & {word for command in told for word in command}
    assert [encode.main(command) for command in told] == [0, 0]
    assert "to be encoded" not in capsys.readouterr().out
    assert len(Latents(latents)) == json.loads((latents / "plan.json").read_text())["rows"]


def test_shards_of_earlier_images_are_mended_from_their_source(
    setting: Path, growing: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = growing
    argv = arguments(setting, source, out)
    assert encode.main([*argv, "--append"]) == 0
    assert encode.main(arguments(setting, "other", out, "--append")) == 0
    expected = files(out)
    for number in (1, 3, 6):
        (out / f"data-{number:05d}.json").unlink()
    message = refused(capsys, [*argv, "--append"])
    assert f"shard 6 of 9 (data.source {setting / 'other'}) is not done; run encode_dataset for it, with these images" in message
    assert "shard 6 of 9" in refused(capsys, argv)
    assert sorted(path.name for path in out.glob("data-*.json")) == [f"data-{n:05d}.json" for n in (0, 1, 2, 3, 4, 5, 7, 8)]
    assert encode.main(arguments(setting, "other", out)) == 0
    assert files(out) == expected


def test_what_cannot_be_appended_is_refused(setting: Path, growing: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, out = growing
    before, argv = files(out), [*arguments(setting, source, out), "--append"]
    message = refused(capsys, [*argv, "--seed=1", "--dtype=fp16"])
    assert "\n  dtype: 'fp32' -> 'fp16'\n" in message and "\n  seed: 0 -> 1\n" in message
    assert "labels: ['bee', 'cat'] -> None" in refused(capsys, arguments(setting, "plain", out, "--append"))
    photo = source / "bee" / "2.png"
    photo.write_bytes(photo.read_bytes() + b"more")
    assert "1 image has another size than when planned: bee/2.png; put the files back" in refused(capsys, argv)
    assert "source: 1 of another size (bee/2.png)" in refused(capsys, argv[:-1])
    assert files(out) == before


def test_images_without_lasting_names_are_not_told_from_each_other(
    setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    def table(names: list[str]) -> None:
        rows = {"image": [(setting / "grown" / name).read_bytes() for name in names]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "x.parquet")

    argv = arguments(setting, tmp_path / "x.parquet", tmp_path / "out")
    table(OLD)
    assert encode.main(argv) == 0
    table([*OLD, *NEW])
    assert "give the added ones alone as a source of their own" in refused(capsys, [*argv, "--append"])
    os.rename(tmp_path / "x.parquet", tmp_path / "y.parquet")
    table(NEW)
    assert encode.main([*argv, f"--data.source={tmp_path / 'x.parquet'}", "--append"]) == 2
    os.rename(tmp_path / "x.parquet", tmp_path / "z.parquet")
    assert encode.main([*argv, f"--data.source={tmp_path / 'z.parquet'}", "--append"]) == 0
    assert Latents(tmp_path / "out").manifest["segments"][1]["source"]["images"] == len(NEW)


def test_a_wrong_append_without_shards_is_replaced(setting: Path, growing: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    source, out = growing
    shutil.copytree(out, out.with_name("alone"))
    assert encode.main(arguments(setting, source, out.with_name("alone"), "--append")) == 0
    manifest = (out / "manifest.json").read_bytes()
    assert encode.main(arguments(setting, "other", out, "--append", "--only=plan")) == 0
    # Without the flag it is not taken back.
    assert "shards 3-5 of 6" in refused(capsys, arguments(setting, "old", out))
    assert (out / "manifest.json").read_bytes() == manifest
    assert encode.main(arguments(setting, source, out, "--append")) == 0
    assert "replaces what " in capsys.readouterr().err
    assert files(out) == files(out.with_name("alone"))


def test_more_images_that_come_during_an_append_are_for_the_next(
    setting: Path, growing: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = growing
    argv = [*arguments(setting, source, out), "--append"]
    assert finish(start(argv, kill_at=7)) == -signal.SIGKILL
    photos(source, ["bee/77.png", "dog/1.png"], seed=3)
    assert encode.main(argv) == 0
    assert "note: 2 more images of " in capsys.readouterr().err
    assert len(Latents(out)) == 22
    assert encode.main(argv) == 0
    assert len(Latents(out)) == 26
    assert json.loads((out / "manifest.json").read_text())["labels"] == ["bee", "cat", "ant", "dog"]


def test_without_the_names_of_the_old_images_nothing_is_appended(
    growing: tuple[Path, Path], setting: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos_there, latents = growing
    (latents / "images-00000.parquet").write_bytes(b"")
    said = refused(capsys, arguments(setting, photos_there, latents, "--append"))
    assert "images-00000.parquet cannot be read" in said and "would be added again" in said
    assert len(Latents(latents)) == 2 * len(OLD)


def test_images_that_are_taken_for_others_by_names_and_sizes_are_told(
    setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for day in ("monday", "tuesday"):
        (tmp_path / day).mkdir()
        for k in range(2):
            np.save(tmp_path / day / f"{k}.npy", np.full((20, 20, 3), 10 * k + len(day), np.uint8))
    assert encode.main(arguments(setting, tmp_path / "monday", tmp_path / "latents")) == 0
    assert "note:" not in capsys.readouterr().err
    assert encode.main(arguments(setting, tmp_path / "tuesday", tmp_path / "latents", "--append")) == 0
    said = capsys.readouterr()
    assert f"tuesday has images with the names and sizes of {tmp_path / 'monday'} and is taken for it" in said.err
    assert "nothing to append" in said.out


def test_a_worker_of_the_plan_before_an_append_leaves_the_longer_manifest(
    setting: Path, growing: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos_there, latents = growing
    again, read = [0], shards.read_records

    def appended_meanwhile(folder: Path, plan: Plan, *place: Any) -> dict[int, Any]:
        records = read(folder, plan, *place)
        again[0] += 1
        if again[0] == 1:
            assert encode.main(arguments(setting, photos_there, latents, "--append", "--worker=0", "--workers=1")) == 0
        return records

    monkeypatch.setattr(shards, "read_records", appended_meanwhile)
    assert encode.main(["--model=none", f"--out={latents}", "--only=finalize"]) == 0
    assert len(Latents(latents)) == 2 * len(OLD) + 2 * len(NEW)
