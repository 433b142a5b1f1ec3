"""The report of autoencoder runs: reading of runs, and the page that a browser gets."""

import base64
import fcntl
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from autoencoder.report.command import main
from autoencoder.report.figures import differing
from autoencoder.report.page import render
from autoencoder.report.runs import read_runs
from autoencoder.runtime.errors import UsageError
from tests.report_pages import BRIEF, CONFIG, EVALUATION, HOSTILE, LINES, TRAIN, VALIDATION, Page, make_run, page_of

# Reading runs


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "images": 576, "ph')
    (read,) = read_runs([run])
    assert [line["step"] for line in read.lines] == [line["step"] for line in LINES]


def test_a_broken_line_inside_names_file_and_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UsageError, match=r"metrics\.jsonl, line 2"):
        read_runs([run])


def test_values_that_were_not_finite_are_gaps_and_are_told(tmp_path: Path) -> None:
    bad = TRAIN[3] | {"loss": None, "nonfinite": ["loss"]}
    run = make_run(tmp_path / "run", lines=[*TRAIN[:3], bad, *TRAIN[4:]])
    _, values = read_runs([run])[0].series("train", "loss")
    assert [i for i, v in enumerate(values) if math.isnan(v)] == [3]
    assert "1 line of the log with values that were not finite, first at 256 images (loss)" in page_of(run).text


def test_training_time_is_images_over_throughput(tmp_path: Path) -> None:
    (run,) = read_runs([make_run(tmp_path / "run")])
    assert run.seconds == pytest.approx(512 / 32)


def test_status(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert read_runs([run])[0].status == "stopped"
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_runs([run])[0].status == "running"
    assert read_runs([run])[0].status == "stopped"
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    assert read_runs([run])[0].status == "finished"
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"train": {"images": "1k"}}))
    assert read_runs([run])[0].status == "stopped"


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a/autoencoder", "b/autoencoder")]
    assert [run.name for run in read_runs([*runs, runs[0]])] == ["a/autoencoder", "b/autoencoder"]


# The page


def test_headlines_are_those_of_the_last_validation_until_there_is_an_evaluation(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    shown = {"PSNR": "psnr_db", "KL": "kl_nats", "Negative log-likelihood": "nll_nats", "ELBO": "elbo_nats", "SSIM": "ssim"}
    for label, key in shown.items():
        assert float(page.tiles[label].replace(",", "").replace("−", "-")) == pytest.approx(VALIDATION[-1][key], abs=0.005)
    assert page.tiles["Images seen"] == "512"
    assert "validation at 512" in page.text
    assert "No final evaluation yet" in page.text
    assert "KL by channel" not in page.text


def test_the_evaluation_is_shown_with_intervals_channels_photos_and_provenance(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", evaluation=EVALUATION, pictures=True))
    assert page.tiles["PSNR"] == f"{26.125:.2f}"
    assert page.tiles["KL"] == "1,401.5"
    assert "SSIM" not in page.tiles
    assert "95%: 24.50 to 27.75" in page.text
    assert "KL by channel nats an image; filled: active (1 of 2)" in page.text
    assert any("0: 1,400.2, 1: 1.2 (inactive)" in alt for alt in page.all("div", "aria-label"))
    assert "coffee 25.50 400.5" in page.text
    assert "rocket 26.75 380.0" in page.text
    assert "data.fingerprint 77ab" in page.text
    assert "lpips null" in page.text


def test_charts_tell_the_log_s_last_values(tmp_path: Path) -> None:
    alts = page_of(make_run(tmp_path / "run")).all("div", "aria-label")
    assert "Negative log-likelihood over images seen, nats an image: train ends at −800.0; validation ends at −778.0" in alts
    assert "KL over images seen, nats an image: train ends at 80.0; validation ends at 76.0" in alts
    assert "Loss over images seen: train ends at −760.0" in alts
    assert "Perceptual distance over images seen: train ends at 0.0625" in alts
    assert "PSNR against KL over the run, ring at its end: validation ends at 22.67 at 76.0" in alts


def test_pictures_are_the_run_s_own_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", pictures=True)
    page = page_of(run)
    embedded = [base64.b64decode(uri.removeprefix("data:image/png;base64,")) for uri in page.all("img", "src")]
    names = ("step-00000004.png", "step-00000008.png", "photo-coffee.png")
    assert embedded == [(run / "images" / name).read_bytes() for name in names]
    assert all(page.all("img", "alt"))
    assert "512 images 22.67 dB, 76.0 nats" in page.text


def test_the_page_asks_for_nothing_and_stays_small(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", lines=BRIEF, evaluation=EVALUATION)
    (run / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8)
    for name in (*(f"step-{s:08d}" for s in range(1, 12)), "photo-a", "photo-b", "photo-c", "photo-d"):
        Image.fromarray(noise).save(run / "images" / f"{name}.png", compress_level=1)
    html = render(read_runs([run]))
    assert len(html.encode()) < 2_000_000
    assert html.startswith("<!DOCTYPE html>")
    page = Page(html)
    assert not {"script", "iframe", "object"} & {tag for tag, _ in page.elements}
    sources = page.all("img", "src")
    assert len(sources) == 9 + 3
    for uri in sources:
        assert uri.startswith("data:image/jpeg;base64,")
        Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).load()
    assert page.text.count("Compressed as JPEG") == 2
    for tag in {tag for tag, _ in page.elements}:
        assert all(reference.startswith(("#", "data:")) for name in ("href", "xlink:href", "src") for reference in page.all(tag, name))
    assert "url(" not in html.replace("url(#", "")
    assert "@import" not in html
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_hostile_strings_are_text(tmp_path: Path) -> None:
    evaluation = EVALUATION | {"photos": [{"id": HOSTILE, "psnr_db": 1.0}], "provenance": {HOSTILE: HOSTILE}}
    run = make_run(tmp_path / HOSTILE.replace("/", ""), lines=BRIEF, evaluation=evaluation, config={"note": HOSTILE}, pictures=True)
    (run / "images" / "photo-coffee.png").rename(run / "images" / f"photo-{HOSTILE}.png")
    (run / "bad_images.jsonl").write_text(json.dumps({"id": HOSTILE, "reason": HOSTILE}) + "\n")
    other = make_run(tmp_path / "other", lines=BRIEF)
    for folders in ([run], [run, other]):
        page = page_of(*folders)
        assert page.text.count(HOSTILE) >= 6
        assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
        assert all(uri.startswith("data:image/") for uri in page.all("img", "src"))


def test_bad_images_are_counted_and_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", lines=BRIEF)
    assert "Every image could be read" in page_of(run).text
    (run / "bad_images.jsonl").write_text('{"id": "a/b.jpg", "reason": "truncated"}\n{"id": "c.png", "reason": "no picture"}\n')
    assert "2 images that could not be read Image Reason a/b.jpg truncated c.png no picture" in page_of(run).text


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    page = page_of(run)
    assert "Nothing logged yet" in page.text
    assert page.tiles == {"Images seen": "0", "Training time": "0 s"}


def test_several_runs_are_compared(tmp_path: Path) -> None:
    shorter = [line for line in LINES if line["step"] <= 4]
    a = make_run(tmp_path / "a", evaluation=EVALUATION, pictures=True)
    b = make_run(tmp_path / "b", lines=shorter, config={"out": "elsewhere", "train": {"images": 256, "seed": 0}, "extra": True})
    runs = read_runs([a, b])
    assert differing(runs) == [("train.images", ["512", "256"]), ("extra", ["—", "true"])]
    page = Page(render(runs))
    assert "PSNR dB 26.12 95%: 24.50 to 27.75 21.33 validation at 256" in page.text
    alts = page.all("div", "aria-label")
    assert "KL over images seen, nats an image: a ends at 76.0 (train 80.0); b ends at 38.0 (train 40.0)" in alts
    assert "not in the same nats" not in page.text


def test_runs_with_other_measures_are_flagged(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", lines=BRIEF)
    b = make_run(tmp_path / "b", lines=BRIEF, config={"data": {"source": "demo", "resolution": 64}})
    text = page_of(a, b).text
    flag = "NLL and ELBO of these runs are not in the same nats: they differ in data.resolution."
    # With the headlines, and again where charts overlay the two.
    assert text.count(flag) == 2
    assert flag in text.partition("Evidence lower bound")[2]
    assert "priors" not in text


def test_a_rate_to_another_prior_is_flagged(tmp_path: Path) -> None:
    families = [{"data": {"source": "demo"}, "experimental": {"prior": prior}} for prior in ("standard_normal", "mixture")]
    a, b = (make_run(tmp_path / name, lines=BRIEF, config=config) for name, config in zip("ab", families, strict=True))
    text = page_of(a, b).text
    assert "KL of these runs is to different priors: they differ in experimental.prior." in text
    assert "not in the same nats" not in text


def test_a_scale_fitted_at_the_end_is_told_below_the_charts(tmp_path: Path) -> None:
    evaluation = EVALUATION | {"metrics": EVALUATION["metrics"] | {"nll_nats": {"mean": -700.0}}}
    analytic: dict[str, Any] = {"objective": {"likelihood": {"scale": "analytic"}}}
    said = "scale was fitted once more at the end of the run"
    assert said in page_of(make_run(tmp_path / "a", config=analytic, evaluation=evaluation)).text
    assert said not in page_of(make_run(tmp_path / "b", config=analytic)).text
    assert said not in page_of(make_run(tmp_path / "c", evaluation=evaluation)).text


# The command


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    a, b, out = make_run(tmp_path / "a", lines=BRIEF), make_run(tmp_path / "b", lines=BRIEF), tmp_path / "report.html"
    assert main([str(a), str(b), "--out", str(out)]) == 0
    assert "2 runs" in Page(out.read_text()).text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "report.html"]


@pytest.mark.parametrize(
    ("runs", "out", "told"),
    [
        (["missing"], "report.html", "missing: no such folder"),
        (["empty"], "report.html", "empty: holds no metrics.jsonl"),
        (["good"], "nowhere/report.html", "does not exist"),
        (["good"], "empty", "that is a folder"),
        ([], "report.html", "runs"),
        (["broken"], "report.html", "not a PNG picture"),
    ],
)
def test_bad_input_is_told_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: list[str], out: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    make_run(tmp_path / "good")
    (make_run(tmp_path / "broken", pictures=True) / "images" / "photo-coffee.png").write_bytes(b"GIF89a")
    assert main([*runs, "--out", out]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert told in message
    assert message.count("\n") == 1
    assert not Path("report.html").exists()
