"""`inspect_data`: its statistics are those of the whole, and its settings train."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

from autoencoder.data import inspection
from autoencoder.data.inspection import Band, inspect
from autoencoder.data.sources import open_train_and_validation
from autoencoder.data_config import DataConfig
from autoencoder.inspect_data import InspectConfig, main
from diffusion.command import main as firststage
from tests.source_files import FILES, tar

RNG = np.random.default_rng(0)


def fill(folder: Path, images: list[np.ndarray], mark: str | None = None) -> str:
    folder.mkdir(exist_ok=True)
    for k, values in enumerate(images):
        if values.dtype == np.uint8:
            Image.fromarray(values).save(folder / f"{k}.png")
        elif mark is not None:
            tag = [(42113, "s", 0, mark, True)]
            tifffile.imwrite(folder / f"{k}.tif", values, photometric="minisblack", planarconfig="contig", extratags=tag)
        else:
            np.save(folder / f"{k}.npy", values)
    return str(folder)


def suggested(source: str, tmp_path: Path, *argv: str) -> dict[str, Any]:
    out = tmp_path / "suggested.yaml"
    assert main(["--source", source, "--out", str(out), *argv]) == 0
    content: dict[str, Any] = yaml.safe_load(out.read_text())
    return content


def data_of(settings: dict[str, Any]) -> DataConfig:
    return DataConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings["data"].items()})


def test_running_statistics_are_those_of_all_values_at_once() -> None:
    parts = [RNG.normal(1e4, 3 + k, 50 + 7 * k) for k in range(5)]
    band, whole = Band(), np.concatenate(parts)
    for part in parts:
        band.add(part, part)
    assert band.count == len(whole)
    assert (band.low, band.high) == (whole.min(), whole.max())
    assert band.mean == pytest.approx(whole.mean(), rel=1e-12)
    assert band.std == pytest.approx(whole.std(), rel=1e-10)
    assert band.percentiles((5, 90)) == pytest.approx(np.percentile(whole, (5, 90)).tolist(), rel=1e-12)


def test_percentiles_of_a_sample_are_near_those_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fill(tmp_path / "x", [RNG.normal(k, 10, (200, 150, 2)).astype(np.float32) for k in range(4)])
    exact = inspect(InspectConfig(source=source)).kinds[0]
    monkeypatch.setattr(inspection, "KEPT", 4 * 2 * 5000)
    sampled = inspect(InspectConfig(source=source)).kinds[0]
    assert exact.whole and not sampled.whole
    for one, two in zip(exact.bands, sampled.bands, strict=True):
        assert sum(len(kept) for kept in two.kept) == 20_000
        # The standard error of a quantile at rank 0.1 of 20,000 draws is some 0.1 here.
        assert two.percentiles((10, 90)) == pytest.approx(one.percentiles((10, 90)), abs=0.5)
        assert (two.low, two.high, two.std) == (one.low, one.high, one.std)


def test_what_is_missing_is_left_out_of_the_statistics_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = RNG.integers(100, 3000, (30, 40, 3)).astype(np.int16)
    values[:3] = -9999
    values[5, 5, 1] = -9999
    source = fill(tmp_path / "x", [values, values], mark="-9999")
    settings = suggested(source, tmp_path)
    assert settings["data"]["nodata"] == "file"
    kept = values[(values != -9999).all(2)]
    low, high = (np.percentile(kept, q, axis=0) for q in (0.1, 99.9))
    assert (settings["data"]["low"], settings["data"]["high"]) == (np.floor(low.min()), np.ceil(high.max()))
    shown = capsys.readouterr().out
    assert f"{1 - len(kept) / 1200:.2%} of pixels, in 2 images; marked by -9999 in 2 images" in shown
    train, validation = open_train_and_validation(data_of(settings))
    assert validation.read(0).valid.sum() == train.read(0).valid.sum() == len(kept)  # type: ignore[union-attr]
    # The same files without their tag: the value has to be given.
    bare = fill(tmp_path / "y", [values, values])
    assert suggested(bare, tmp_path, "--nodata", "-9999")["data"] == settings["data"] | {"source": bare, "nodata": -9999}


def test_ranges_follow_type_and_use(tmp_path: Path) -> None:
    def images(low: int, high: int, dtype: type, bands: int = 3) -> list[np.ndarray]:
        return [RNG.integers(low, high, (24, 24, bands)).astype(dtype) for _ in range(3)]

    eight = suggested(fill(tmp_path / "8", images(0, 256, np.uint8)), tmp_path)
    assert eight == {"data": {"source": str(tmp_path / "8"), "channels": 3}}
    full = suggested(fill(tmp_path / "16", images(0, 65536, np.uint16, 13)), tmp_path)
    assert full["data"] == {"source": str(tmp_path / "16"), "channels": 13, "preview": [0, 1, 2]}
    assert full["objective"] == {"likelihood": {"levels": 65536}}
    part = suggested(fill(tmp_path / "12", images(50, 4096, np.uint16, 4)), tmp_path, "--percentiles", "0,100")
    assert (part["data"]["low"], part["data"]["high"]) == (50, 4095)
    assert part["objective"]["likelihood"]["levels"] == 4046
    each = suggested(str(tmp_path / "12"), tmp_path, "--range", "each", "--bands", "2,0")
    assert each["data"]["bands"] == [2, 0] and len(each["data"]["low"]) == len(each["data"]["high"]) == each["data"]["channels"] == 2
    assert "objective" not in each
    floats = suggested(fill(tmp_path / "f", [v.astype(np.float32) / 7 for v in images(0, 700, np.int32)]), tmp_path)
    assert 0 <= floats["data"]["low"][0] < 1 and 99 < floats["data"]["high"][2] <= 100
    constant = suggested(fill(tmp_path / "c", images(5, 6, np.uint16)), tmp_path)
    assert (constant["data"]["low"], constant["data"]["high"]) == (5, 6)


def test_the_file_is_a_configuration_that_train_autoencoder_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = fill(tmp_path / "x", [RNG.normal(0, 1, (20, 20, 5)) for _ in range(3)])
    out = tmp_path / "found.yaml"
    assert firststage(["inspect-data", "--source", source, "--out", str(out)]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        firststage(["train_autoencoder", "--config", str(out), "--out", "x", "--print_config"])
    assert ended.value.code == 0
    read = yaml.safe_load(capsys.readouterr().out)["data"]
    given = yaml.safe_load(out.read_text())["data"]
    assert {key: read[key] for key in given} == given
    assert open_train_and_validation(data_of({"data": given}))[0].read(0).pixels.dtype == np.float32


def test_bad_and_unlike_images_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = fill(tmp_path / "x", [RNG.integers(0, 60000, (20, 20, 13)).astype(np.uint16) for _ in range(4)])
    (tmp_path / "x" / "broken.png").write_bytes(b"no image")
    np.save(tmp_path / "x" / "other.npy", np.zeros((20, 20, 4), np.uint16))
    assert main(["--source", source]) == 0
    shown = capsys.readouterr().out
    assert "6 images, 6 of them read" in shown
    assert "bad images: 1\n  broken.png: not an image of a known format" in shown
    assert "images   4 of 13 bands of uint16; besides 1 of 4 bands of uint16" in shown
    assert "# images that do not fit these settings, and will count as bad: 1 of 4 bands of uint16" in shown


def test_colour_is_told_from_bands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey, colour, clear = ([RNG.integers(0, 256, (20, 20, *shape), dtype=np.uint8)] for shape in ((), (3,), (4,)))
    assert suggested(fill(tmp_path / "mixed", [*2 * grey, *colour]), tmp_path)["data"]["channels"] == 3
    assert suggested(fill(tmp_path / "clear", clear), tmp_path)["data"]["channels"] == 4
    assert "the last band is opacity; data.channels=3 lays images over white" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--source", "{tmp}"], "source: got '{tmp}'; the folder holds no images"),
        (["--source", "demo", "--images", "0"], "images: got 0; give at least 1"),
        (["--source", "demo", "--percentiles", "90,10"], "percentiles: got (90.0, 10.0); give two from 0 to 100"),
        (["--source", "demo", "--out", "{tmp}/no/x.yaml"], "out: got '{tmp}/no/x.yaml'; the folder {tmp}/no does not exist"),
        (["--source", "demo", "--bands", "7"], "none of 6 images can be read: astronaut (it has bands 0 to 2, so none numbered 7)"),
        (["--source", "{tmp}/x", "--range", "full"], "range: got 'full'; float32 values have no range of their own; give common or each"),
        (["--source", "{tmp}/x", "--nodata", "3"], "every pixel that was read is missing"),
    ],
)
def test_what_cannot_be_inspected_is_one_message(argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "{tmp}/x" in argv:
        fill(tmp_path / "x", [np.full((5, 5, 2), 3, np.float32)])
    assert main([word.format(tmp=tmp_path) for word in argv]) == 2
    error = capsys.readouterr().err
    assert message.format(tmp=tmp_path) in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_range_is_said_with_what_it_is_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """13 bands of 16 bits, each wider than the one before but for the last, the narrowest."""
    wide = np.arange(1001)[:, None, None] * np.array([*range(1, 13), 0.5])
    source = fill(tmp_path / "x", [wide.astype(np.uint16).repeat(3, 1)])
    assert main(["--source", source, "--percentiles=0,90"]) == 0
    said = capsys.readouterr().out
    assert "sizes    3 x 1001 pixels each\n" in said
    assert "# one range for all bands, 0 to 10800: from the lowest 0 % value in the table to the highest 90 % value\n" in said
    assert "# of no band do more than 0% of the values lie below it and 10% above; they are clipped\n" in said
    assert "# band 12 takes up least of it, 4%; --range each gives every band its own\n" in said
    assert main(["--source", source, "--range=each", "--bands=12,3"]) == 0
    assert "# each band has its own range: 0.1% of its values lie below low and 0.1% above high" in capsys.readouterr().out
    assert main(["--source", source, "--range=common", "--bands=12,3"]) == 0
    assert "# band 12 takes up least of it, 12%" in capsys.readouterr().out
    assert main(["--source", source, "--bands=3"]) == 0
    assert "# 0.1% of values lie below low and 0.1% above high, and are clipped\n" in capsys.readouterr().out


def test_a_setting_that_is_missing_has_the_name_that_it_has_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tar").write_bytes(tar([("0.png", FILES[0]), ("0.mask.png", FILES[1])]))
    assert main(["--source", str(tmp_path / "a.tar")]) == 2
    assert capsys.readouterr().err.startswith("error: image_column: not given; columns that can hold images: png, mask.png")
