"""The command `sample`: which images, under which names; what it refuses is in test_sample_refusals.py."""

import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import sample
from diffusion.config import ProcessConfig
from tests.pipelines import CLASSES, SIDE, edit, parts, write_ungated

ROOT = Path(__file__).parents[1]
QUICK = ["--steps", "3", "--guidance", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, as far as this command looks at one: six classes, colour."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text("out: here\n")
    write_ungated(parts(), folder / "pipeline")
    return folder


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of grey images without classes."""
    return write_ungated(parts(None, channels=1, quant_conv=False), tmp_path_factory.mktemp("grey") / "pipeline")


@pytest.fixture(scope="module")
def drawn(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen images, all at once."""
    out = tmp_path_factory.mktemp("drawn") / "out"
    assert draw(run, out, "--images", "13") == 0
    return out


def draw(pipeline: Path, out: Path, *more: str) -> int:
    return sample.main(["--pipeline", str(pipeline), "--out", str(out), *QUICK, *more])


def picture(out: Path, number: int) -> np.ndarray:
    with Image.open(out / f"{number:06d}.png") as image:
        return np.asarray(image).astype(int)


def pictures(out: Path, number: int) -> np.ndarray:
    return np.stack([picture(out, n) for n in range(number)])


def state(out: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob("0*.png")}


def test_it_writes_pngs_and_a_grid_of_them(drawn: Path) -> None:
    assert sorted(path.name for path in drawn.iterdir()) == [*(f"{n:06d}.png" for n in range(13)), "grid.png", "samples.json"]
    images = pictures(drawn, 13)
    assert images.shape == (13, SIDE, SIDE, 3)
    assert len({image.tobytes() for image in images}) == 13
    grid = np.asarray(Image.open(drawn / "grid.png")).astype(int)
    factor = 128 // SIDE
    # Two rows of at most 8, one pixel between the images, all magnified.
    assert grid.shape == ((2 * SIDE + 1) * factor, (8 * SIDE + 7) * factor, 3)
    small = grid[::factor, ::factor]
    np.testing.assert_array_equal(grid, small.repeat(factor, 0).repeat(factor, 1))
    for n in range(13):
        top, left = n // 8 * (SIDE + 1), n % 8 * (SIDE + 1)
        np.testing.assert_array_equal(small[top : top + SIDE, left : left + SIDE], images[n])


@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_an_image_is_the_same_whatever_the_batch_size(run: Path, drawn: Path, tmp_path: Path, batch_size: int) -> None:
    assert draw(run, tmp_path / "out", "--images", "13", "--batch_size", str(batch_size)) == 0
    difference = np.abs(pictures(tmp_path / "out", 13) - pictures(drawn, 13))
    # Matrix products of other sizes round otherwise: about 1e-6 of an image's range, which now and then is over a rounding edge.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_an_image_is_the_same_however_many_are_drawn_and_those_that_are_there_are_kept(run: Path, drawn: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert draw(run, out, "--images", "4") == 0
    first = state(out)
    assert draw(run, out, "--images", "13") == 0
    after = state(out)
    assert len(after) == 13
    assert {name: after[name] for name in first} == first
    assert np.abs(pictures(out, 13) - pictures(drawn, 13)).max() <= 1
    (out / "000002.png").unlink()
    assert draw(run, out, "--images", "13") == 0
    again = state(out)
    assert {name: again[name] for name in again if name != "000002.png"} == {n: v for n, v in after.items() if n != "000002.png"}
    assert np.abs(picture(out, 2) - picture(drawn, 2)).max() <= 1


def test_with_nothing_left_to_draw_only_the_grid_is_made_anew(
    run: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(drawn, tmp_path / "out")
    before = state(tmp_path / "out")
    assert draw(run, tmp_path / "out", "--images", "6", "--columns", "3") == 0
    assert capsys.readouterr().err == f"6 images in {tmp_path / 'out'} (0 new); grid.png shows 6\n"
    assert state(tmp_path / "out") == before
    assert Image.open(tmp_path / "out" / "grid.png").size == (50 * 8, 33 * 8)


def test_it_says_what_it_did_in_one_line(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert draw(run, tmp_path / "out", "--images", "2") == 0
    shown = capfd.readouterr()
    said = re.fullmatch(
        r"2 images in \S+ \(2 new, ([\d.]+) images/s; (\d+) network evaluations/s\); grid\.png shows 2\n", shown.out + shown.err
    )
    assert said, shown
    # Two images take more than a millisecond, and less than a minute.
    assert 1 / 30 < float(said[1]) < 2000
    # Guided, 2 x 2 evaluations an image and step, and decoding takes time, too.
    assert float(said[2]) > 12 * float(said[1]) * 0.9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--seed", "1"], "seed: 0 -> 1"),
        (["--steps", "4"], "steps: 3 -> 4"),
        (["--sampler", "euler"], "sampler: 'heun' -> 'euler'"),
        (["--guidance", "1"], "guidance: 2.0 -> 1"),
        (["--guidance_interval", "[0.2, 0.6]"], "guidance_interval: [0.0, 1.0] -> [0.2, 0.6]"),
        (["--time_shift", "2"], "time_shift: 1.0 -> 2.0"),
        (["--classes", "[zebra]"], "classes: None -> ['zebra']"),
        (["--precision", "bf16"], "precision: 'fp32' -> 'bf16'"),
    ],
)
def test_other_settings_are_refused_a_folder_that_has_images(
    run: Path, drawn: Path, capsys: pytest.CaptureFixture[str], change: list[str], said: str
) -> None:
    before = state(drawn)
    assert draw(run, drawn, "--images", "20", *change) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: out: got '{drawn}'; holds images of other settings")
    assert said in message
    assert "\n" not in message.strip()
    assert state(drawn) == before


def test_a_pipeline_is_known_by_its_weights_and_not_by_its_path(
    run: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(drawn, tmp_path / "out")
    shutil.copytree(run / "pipeline", tmp_path / "moved")
    assert draw(tmp_path / "moved", tmp_path / "out", "--images", "13") == 0
    made = parts()
    with torch.no_grad():
        made.dit.proj_out_2.bias[0] += 1e-3
    shutil.rmtree(tmp_path / "moved")
    write_ungated(made, tmp_path / "moved")
    capsys.readouterr()
    assert draw(tmp_path / "moved", tmp_path / "out", "--images", "14") == 2
    assert "weights: " in capsys.readouterr().err
    assert not (tmp_path / "out" / "000013.png").exists()


def test_classes_by_name_by_part_of_a_name_and_by_number(run: Path, drawn: Path, tmp_path: Path) -> None:
    # All classes in turn where none are asked for: image 7 is of class 1. "5" is the name of class 3.
    asked = {"[tabby]": 1, "['cat, tabby']": 1, "['1']": 1, "[1]": 1, "['5']": 3, "[5]": 5, "[naïve]": 4}
    for i, (classes, number) in enumerate(asked.items()):
        out = tmp_path / str(i)
        assert draw(run, out, "--images", "13", "--classes", classes) == 0
        for n in range(13):
            apart = np.abs(picture(out, n) - picture(drawn, n)).max()
            assert (apart <= 1) == (n % len(CLASSES) == number), (classes, n, apart)
    assert draw(run, tmp_path / "turn", "--images", "4", "--classes", "[zebra, '0']") == 0
    assert draw(run, tmp_path / "zebra", "--images", "4", "--classes", "[zebra]") == 0
    same = np.abs(pictures(tmp_path / "turn", 4) - pictures(tmp_path / "zebra", 4)).max((1, 2, 3)) <= 1
    assert same.tolist() == [True, False, True, False]


def test_classes_of_one_name_are_told_apart_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # ImageNet has two cranes; a stock pipeline's own table keeps the second alone.
    pipeline = write_ungated(parts(["crane", "drill", "crane, machine"]), tmp_path / "pipeline")
    assert draw(pipeline, tmp_path / "out", "--classes", "[crane]") == 2
    assert "the classes 0, 2 are called so; give one of these numbers" in capsys.readouterr().err
    assert draw(pipeline, tmp_path / "turn", "--images", "3") == 0
    assert draw(pipeline, tmp_path / "first", "--images", "3", "--classes", "['0']") == 0
    same = np.abs(pictures(tmp_path / "turn", 3) - pictures(tmp_path / "first", 3)).max((1, 2, 3)) <= 1
    assert same.tolist() == [True, False, False]


def test_an_unknown_class_is_refused_with_those_that_there_are(
    run: Path, grey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in ("'lynx'", "'6'", "6", "-1", "'Zebra'"):
        assert draw(run, tmp_path / "out", "--classes", f"[{wrong}]") == 2
        message = capsys.readouterr().err
        assert message.startswith(f"error: classes: got {wrong}; no such class; there are 0: heron, 1: cat, tabby")
        assert "5: zebra" in message
    assert draw(grey, tmp_path / "out", "--classes", "[heron]") == 2
    assert "this pipeline has no classes; leave it out" in capsys.readouterr().err
    assert draw(grey, tmp_path / "out", "--guidance_interval", "[0.2, 0.8]") == 2
    assert "this pipeline has no classes, so nothing is guided" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_grey_images_without_classes(grey: Path, tmp_path: Path) -> None:
    assert draw(grey, tmp_path / "out", "--images", "3") == 0
    for name in ("000000.png", "grid.png"):
        assert Image.open(tmp_path / "out" / name).mode == "L"
    # There is nothing to guide by.
    assert draw(grey, tmp_path / "unguided", "--images", "3", "--guidance", "1") == 0
    np.testing.assert_array_equal(pictures(tmp_path / "out", 3), pictures(tmp_path / "unguided", 3))


def test_more_steps_of_either_sampler_meet_in_the_limit(run: Path, tmp_path: Path) -> None:
    def drawn_by(sampler: str, steps: int) -> np.ndarray:
        out = tmp_path / f"{sampler}-{steps}"
        assert draw(run, out, "--images", "4", "--sampler", sampler, "--steps", str(steps)) == 0
        return pictures(out, 4)

    fine = drawn_by("heun", 64)
    coarse, better = (np.abs(drawn_by("euler", steps) - fine).mean() for steps in (4, 128))
    assert better < 1
    assert better < coarse / 8


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines of one network's weights: as a predictor of v, of noise, and of v by another table."""
    folder = tmp_path_factory.mktemp("tables")
    configs = {
        "v": ProcessConfig(name="vp"),
        "epsilon": ProcessConfig(name="vp", prediction="epsilon"),
        "cosine": ProcessConfig(name="vp", schedule="squaredcos_cap_v2"),
    }
    return {name: write_ungated(parts(process=config), folder / name) for name, config in configs.items()}


def test_a_pipelines_process_comes_from_its_scheduler(
    tables: dict[str, Path], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, pipeline in {**tables, "flow": run}.items():
        assert draw(pipeline, tmp_path / name, "--images", "3") == 0
    seen = {name: pictures(tmp_path / name, 3) for name in (*tables, "flow")}
    for one, other in itertools.combinations(seen.values(), 2):
        assert np.abs(one - other).mean() > 2
    # The same weights, and yet none continues another's folder.
    capsys.readouterr()
    for other in ("epsilon", "cosine"):
        assert draw(tables[other], tmp_path / "v", "--images", "4") == 2
        assert "weights: " in capsys.readouterr().err
    assert draw(tables["v"], tmp_path / "shifted", "--time_shift", "2") == 2
    assert "time_shift: got 2.0; a variance-preserving process has its noise levels in its table" in capsys.readouterr().err


def test_every_sampler_comes_to_the_same_images(tables: dict[str, Path], tmp_path: Path) -> None:
    def drawn_by(sampler: str, steps: int) -> np.ndarray:
        out = tmp_path / f"{sampler}-{steps}"
        assert draw(tables["v"], out, "--images", "4", "--guidance", "1", "--sampler", sampler, "--steps", str(steps)) == 0
        return pictures(out, 4)

    fine = drawn_by("heun", 100)
    for sampler in ("euler", "dpm++", "ddim"):
        coarse, better = (np.abs(drawn_by(sampler, steps) - fine).mean() for steps in (5, 200))
        assert better < 2, sampler
        assert better < coarse / 4, sampler


def test_a_pipelines_shift_is_kept_unless_another_is_asked_for(run: Path, drawn: Path, tmp_path: Path) -> None:
    shifted = write_ungated(parts(time_shift=3.0), tmp_path / "pipeline")
    assert draw(shifted, tmp_path / "its", "--images", "3") == 0
    assert draw(run, tmp_path / "asked", "--images", "3", "--time_shift", "3") == 0
    np.testing.assert_array_equal(pictures(tmp_path / "its", 3), pictures(tmp_path / "asked", 3))
    assert np.abs(pictures(tmp_path / "its", 3) - pictures(drawn, 3)).mean() > 1
    assert draw(shifted, tmp_path / "none", "--images", "3", "--time_shift", "1") == 0
    assert np.abs(pictures(tmp_path / "none", 3) - pictures(drawn, 3)).max() <= 1


def test_autocast_changes_little(run: Path, drawn: Path, tmp_path: Path) -> None:
    assert draw(run, tmp_path / "out", "--images", "6", "--precision", "bf16") == 0
    difference = np.abs(pictures(tmp_path / "out", 6) - pictures(drawn, 6))
    assert 0 < difference.mean() < 2


def test_a_pipeline_in_half_precision_is_sampled_in_single(run: Path, drawn: Path, tmp_path: Path) -> None:
    from diffusion.drawing import open_pipeline

    pipe, names = open_pipeline(str(run))
    assert names == dict(enumerate(CLASSES))
    pipe.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    edit("model_index.json", id2label=dict(enumerate(CLASSES)))(tmp_path / "half")
    half, _ = open_pipeline(str(tmp_path / "half"))
    assert {p.dtype for part in (half.transformer, half.vae) for p in part.parameters()} == {torch.float32}
    assert draw(tmp_path / "half", tmp_path / "out", "--images", "4") == 0
    assert 0 < np.abs(pictures(tmp_path / "out", 4) - pictures(drawn, 4)).mean() < 2
