"""Images from a class of the user's own: how they are taken, what is refused, and the commands that take them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image
from safetensors.numpy import load_file

from autoencoder import encode, evaluate, inspect_data, train
from autoencoder.data.bands import DecodeError
from autoencoder.data.decode import bands_of, take_image
from autoencoder.data.own import OwnSource
from autoencoder.data.sources import BadImage, open_evaluation, open_images, open_train_and_validation
from autoencoder.data_config import DataConfig
from autoencoder.pixel_recipe import recipe_of
from autoencoder.runtime.errors import ConfigError
from autoencoder.runtime.own_class import OwnClass
from tests.children import SMALL
from tests.own_classes import Photos
from tests.test_data_bands import deep_png

SHORT = [*SMALL, "--train.images=32", "--log.validate_every_images=32"]
OWN = ["--data.own=tests.own_classes.Photos", "--data.own.init_args.side=32"]


pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def config(name: str = "Photos", settings: dict[str, Any] | None = None, **arguments: Any) -> DataConfig:
    return DataConfig(own=OwnClass(class_path=f"tests.own_classes.{name}", init_args=arguments), resolution=16, **(settings or {}))


def opened(**arguments: Any) -> Any:
    return open_images(config(**arguments), split="train")


def test_arrays_and_pil_images_are_taken_as_files_of_them_would_be() -> None:
    pixels = Photos()[5]
    for form in ("array", "pil"):
        record = opened(form=form).read(5)
        assert np.array_equal(record.pixels, pixels) and record.pixels.dtype == np.uint8
        assert (record.label, record.id, record.valid) == (-1, "5", None)
    grey = opened(form="grey").read(5).pixels
    assert np.array_equal(grey, np.repeat(np.asarray(pixels)[:, :, :1], 3, axis=2))
    luma = opened(form="pil", settings={"channels": 1}).read(5).pixels
    assert np.array_equal(luma[:, :, 0], np.asarray(Image.fromarray(np.asarray(pixels)).convert("L")))
    ranged = opened(form="float", settings={"low": 0.0, "high": 1.0}).read(5).pixels
    assert ranged.dtype == np.float32 and np.array_equal(ranged, np.asarray(pixels, np.float32) / 255)
    chosen = opened(form="bands", settings={"bands": (3, 1, 5)}).read(5).pixels
    assert np.array_equal(chosen, np.asarray(pixels)[:, :, [0, 1, 2]])


def test_labels_names_and_fingerprint_are_the_objects_own_where_it_has_them() -> None:
    labelled = opened(form="labelled")
    assert labelled.labels == ["even", "odd"] and [labelled.read(i).label for i in range(3)] == [0, 1, 0]
    assert labelled.in_memory and not opened().in_memory
    named = opened(form="named")
    assert named.fingerprint == "of mine" and named.read(3).id == "photo/3.png" and named.name == "tests.own_classes.Photos"
    prints = [opened(**arguments).fingerprint for arguments in ({}, {}, {"count": 13}, {"side": 25})]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_a_class_of_several_names_has_them_joined() -> None:
    assert opened(form="synonyms").labels == ["even, pair", "odd"]


@pytest.mark.parametrize("suffix", ["tif", "png"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_whose_deeper_colours_pillow_drops_is_no_image(suffix: str, channels: int, tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 2**16, (5, 6, 3), dtype=np.uint16)
    recipe, file = recipe_of(DataConfig(channels=channels)), tmp_path / f"deep.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(file, deep, photometric="rgb")
    else:
        file.write_bytes(deep_png(deep, np.arange(5) % 5))
    for take in (bands_of, lambda image: take_image(image, recipe)):
        with (
            Image.open(file) as image,
            pytest.raises(DecodeError, match=r"^Pillow keeps 8 of the 16 bits of .*; give an array"),
        ):
            take(image)
    # Eight bits, and one band of sixteen, are kept.
    Image.fromarray((deep >> 8).astype(np.uint8)).save(file)
    with Image.open(file) as image:
        assert np.array_equal(bands_of(image).values, deep >> 8) and take_image(image, recipe).pixels.dtype == np.uint8
    Image.fromarray(deep[:, :, 0]).save(file)
    with Image.open(file) as image:
        assert np.array_equal(bands_of(image).values[:, :, 0], deep[:, :, 0])


def test_where_no_image_can_be_read_the_class_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Opening looks at six.
    argv = [*SHORT, *OWN, "--data.own.init_args.fails_after=6", "--data.workers=0", "--data.max_bad=2", "--out", str(tmp_path / "run")]
    assert train.main(argv) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: data.own.class_path: tests.own_classes.Photos: none of 3 images in a row (data.max_bad=2) can be read: ")
    assert said.endswith("; mend what its __getitem__ gives")
    argv = ["--own=tests.own_classes.Photos", "--own.init_args.fails_after=3", "--out", str(tmp_path / "data.yaml")]
    assert inspect_data.main(argv) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: own.class_path: ") and said.endswith("; mend what its __getitem__ gives")


def test_what_reading_raises_makes_a_bad_image_with_the_reason() -> None:
    source = opened(broken=4)
    with pytest.raises(BadImage) as error:
        source.read(4)
    assert error.value.id == "4" and error.value.reason.startswith("OSError: no photo 4 (own_classes.py, line ")
    for form, reason in (("tensor", r"Tensor; give a NumPy .* image\.permute"), ("dictionary", "a dict; give"), ("text", "label is a str")):
        bad = OwnSource(config().own, config(), "data.own")
        bad._images.form = form
        with pytest.raises(BadImage, match=reason):
            bad.read(0)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Uncounted", {}, r"^data\.own\.class_path: got 'tests\.own_classes\.Uncounted'; its objects have no __len__"),
        ("Photos", {"count": 0}, r"^data\.own\.class_path: .*Photos\(count=0\) has no images"),
        ("Photos", {"count": -1}, r"^data\.own\.class_path: .* its __len__ raised ValueError"),
        ("Photos", {"form": "raises"}, r"^data\.own\.class_path: .* none of 3 images can be had: 0 \(OSError: no photo 0"),
        ("Photos", {"form": "tensor"}, r"none of 3 images can be had: 0, \d+, \d+ \(a Tensor; give a NumPy array"),
        (
            "Photos",
            {"form": "channels first"},
            r"0, \d+, \d+ \(an array of shape \(3, \d+, \d+\), whose channels stand first",
        ),
        ("Photos", {"form": "misnamed"}, r"its `ids` are 1 of 12 images"),
        ("Photos", {"form": "labels"}, r"its `classes` are no list of names"),
        ("Photos", {"form": "float"}, r"^data\.low: .*; tests\.own_classes\.Photos: 0 does not fit: .* give data\.low and data\.high"),
        ("Photos", {"form": "bands"}, r"^data\.channels: got 3; .* it has 6 bands"),
        ("Photos", {"count": 1}, r"^data\.own\.class_path: .* a single image and none to validate on"),
    ],
)
def test_objects_that_are_no_source_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_train_and_validation(config(name, **arguments))


def test_validation_images_are_held_out_or_come_from_a_class_or_a_source_of_their_own() -> None:
    training, validation = open_train_and_validation(config(count=40, settings={"validation_images": 3}))
    assert (len(training), len(validation)) == (37, 3)
    read = {source.read(i).id for source in (training, validation) for i in range(len(source))}
    assert read == {str(i) for i in range(40)}
    other = OwnClass(class_path="tests.own_classes.Photos", init_args={"form": "named", "count": 5})
    training, validation = open_train_and_validation(config(settings={"validation_own": other}))
    assert len(training) == 12 and [validation.read(i).id for i in range(2)] == ["photo/0.png", "photo/1.png"]
    training, validation = open_train_and_validation(DataConfig(source="demo", validation_own=other))
    assert training.name == "demo (train)" and len(validation) == 5
    training, validation = open_train_and_validation(config(settings={"validation_source": "demo"}))
    assert validation.name == "demo (validation)"
    assert len(open_evaluation(config(), split=None, images=7)) == 7


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        (train, ["--data.source=photos"], "data.source: got 'photos'; tests.own_classes.Photos takes its place"),
        (train, ["--data.split=test"], "data.split: got 'test'; tests.own_classes.Photos takes its place"),
        (train, ["--data.label_column=x"], "data.label_column: got 'x'; tests.own_classes.Photos takes its place"),
        (train, ["--data.own.init_args.form=float"], "data.low: not given; tests.own_classes.Photos: 0 does not fit"),
        (
            train,
            ["--data.validation_own=no_such_module.Photos"],
            "data.validation_own.class_path: got 'no_such_module.Photos'; there is no",
        ),
        (evaluate, ["--model=runs", "--data.split=test"], "data.split: got 'test'; tests.own_classes.Photos takes its place"),
        (encode, ["--model=runs", "--data.source=demo"], "data.source: got 'demo'; tests.own_classes.Photos takes its place"),
    ],
)
def test_settings_of_other_sources_are_refused(
    command: Any, argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = SHORT if command is train else []
    assert command.main([*more, *OWN, *argv, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and said.count("\n") == 1


def test_it_goes_through_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, form = tmp_path / "run", "--data.own.init_args.form=labelled"
    assert inspect_data.main(["--own=tests.own_classes.Photos", "--own.init_args.form=labelled", "--out", str(tmp_path / "data.yaml")]) == 0
    assert "source   tests.own_classes.Photos: 12 images, 12 of them read" in capsys.readouterr().out
    suggested = yaml.safe_load((tmp_path / "data.yaml").read_text())["data"]
    assert suggested == {"own": {"class_path": "tests.own_classes.Photos", "init_args": {"form": "labelled"}}, "channels": 3}
    argv = [*SHORT, "--config", str(tmp_path / "data.yaml"), "--data.own.init_args.broken=7", "--out", str(run)]
    assert train.main(argv) == 0
    assert json.loads((run / "bad_images.jsonl").read_text())["reason"].startswith("OSError: no photo 7")
    told = json.loads((run / "evaluation.json").read_text())["provenance"]["data"]
    assert told["source"] == "tests.own_classes.Photos"

    assert evaluate.main(["--model", str(run), *OWN, form, "--data.images=4", "--out", str(tmp_path / "f.json")]) == 0
    told = json.loads((tmp_path / "f.json").read_text())["provenance"]["data"]
    assert told["source"] == "tests.own_classes.Photos" and told["images"] == 4
    # Without images of their own an evaluation's are the run's.
    assert evaluate.main(["--model", str(run), "--out", str(tmp_path / "f.json")]) == 0
    assert json.loads((tmp_path / "f.json").read_text())["provenance"]["data"]["images"] == 1

    latents = tmp_path / "latents"
    assert encode.main(["--model", str(run), *OWN, form, "--data.own.init_args.broken=2", "--out", str(latents)]) == 0
    manifest = json.loads((latents / "manifest.json").read_text())
    arguments = {"side": 32, "form": "labelled", "broken": 2}
    source = manifest["segments"][0]["source"]
    assert source["own"] == {"class_path": "tests.own_classes.Photos", "init_args": arguments}
    assert source["name"] == "tests.own_classes.Photos" and manifest["labels"] == ["even", "odd"]
    assert [bad["image"] for bad in manifest["bad"]] == [2]
    assert load_file(latents / "data-00000.safetensors")["label"].tolist() == [i % 2 for i in range(12) if i != 2]
    refused = [
        (["form=outside"], "image 1 has label 1, but there are 1 classes; mend its labels"),
        (["broken=2"], "tests.own_classes.Photos: 1 images cannot be read, data.max_bad is 0: 2 (OSError: no photo 2"),
        (["fails_after=6"], "none of the images of tests.own_classes.Photos can be read; mend what its __getitem__ gives"),
    ]
    for number, (given, message) in enumerate(refused):
        more = [f"--data.own.init_args.{argument}" for argument in given] + (["--data.max_bad=0"] if "broken=2" in given else [])
        argv = ["--model", str(run), *OWN, *more, "--data.workers=0", "--out", str(tmp_path / f"refused-{number}")]
        assert encode.main(argv) == 2
        assert f"error: data.own.class_path: {message}" in capsys.readouterr().err
    # Other arguments are other images.
    assert encode.main(["--model", str(run), *OWN, form, "--out", str(latents)]) == 2
    assert "source.fingerprint" in capsys.readouterr().err


def test_loader_processes_have_it_too(tmp_path: Path) -> None:
    argv = [*SHORT, *OWN, "--train.images=16"]
    for workers in (0, 1):
        assert train.main([*argv, f"--data.workers={workers}", "--out", str(tmp_path / str(workers))]) == 0
    one, other = (load_file(tmp_path / str(w) / "checkpoints" / "step-00000002" / "model.safetensors") for w in (0, 1))
    assert all(np.array_equal(one[name], other[name]) for name in one)
