"""The report of both stages on one page, and what it keeps to whatever is on it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from autoencoder.report.command import main
from autoencoder.report.gallery import budgets
from autoencoder.report.page import render
from autoencoder.report.runs import read_runs
from tests.report_pages import (
    BRIEF,
    DIFFUSION_EVALUATION,
    EVALUATION,
    HOSTILE,
    LATENTS,
    Page,
    make_diffusion_run,
    make_run,
    page_of,
)


def with_encoder(name: str) -> dict[str, Any]:
    """An autoencoder's evaluation that says which encoder it is of."""
    return EVALUATION | {"provenance": {"encoder_hash": name}}


def both(folder: Path, **diffusion: Any) -> tuple[Path, Path]:
    """A finished run of each stage in one folder."""
    autoencoder = make_run(folder / "autoencoder", evaluation=with_encoder("e1"), pictures=True)
    given = {"evaluation": DIFFUSION_EVALUATION, "pictures": True} | diffusion
    return autoencoder, make_diffusion_run(folder / "diffusion", **given)


# Both stages


def test_one_page_tells_both_stages_in_order(tmp_path: Path) -> None:
    autoencoder, diffusion = both(tmp_path / "demo")
    for folders in ([autoencoder, diffusion], [diffusion, autoencoder]):
        page = page_of(*folders)
        assert page.headings == [
            (1, "demo"),
            (2, "Headline figures"), (3, "Autoencoder"), (3, "finished"), (3, "Diffusion"), (3, "finished"),
            (2, "Autoencoder"), (3, "Held-out crops"), (3, "Whole held-out photos"), (3, "Evidence lower bound"),
            (3, "Auxiliary losses"), (3, "What is optimised"), (3, "Reconstruction"), (3, "Latents"), (3, "Under the hood"),
            (3, "Image by image"),
            (2, "Diffusion"), (3, "Samples over training"), (3, "Nearest training latents"), (3, "Fréchet distance"), (3, "Loss"),
            (3, "Under the hood"),
            (2, "Where this comes from"), (3, "Autoencoder"), (3, "Diffusion"),
        ]  # fmt: skip
        assert page.tiles["PSNR"] == "26.12"
        assert page.tiles["Fréchet distance"] == "3.125"
        assert "diffusion, trained on latents of autoencoder, last line of the log" in page.text


def test_stages_are_never_compared_with_each_other(tmp_path: Path) -> None:
    page = page_of(*both(tmp_path / "demo"))
    losses = [alt for alt in page.all("div", "aria-label") if alt.startswith("Loss over images seen")]
    assert losses == [
        "Loss over images seen: train ends at −760.0",
        "Loss over images seen: train ends at 0.1250; validation ends at 0.1875",
    ]
    assert "Configuration that differs" not in page.text
    assert ("table", {"class": "compare"}) not in page.elements

    more = make_diffusion_run(tmp_path / "demo" / "wider", config={"denoiser": {"preset": "S"}})
    page = page_of(*(tmp_path / "demo" / name for name in ("autoencoder", "diffusion", "wider")), more)
    assert page.text.count("Configuration that differs Key diffusion wider denoiser.preset tiny S") == 1
    assert "Loss over images seen: diffusion ends at 0.1875 (train 0.1250); wider ends at 0.1875 (train 0.1250)" in page.all(
        "div", "aria-label"
    )
    assert "Loss over images seen: train ends at −760.0" in page.all("div", "aria-label")
    assert page.headings[0] == (1, "3 runs")


@pytest.mark.parametrize(("folders", "title"), [(("demo", "demo"), "demo"), (("runs", "runs"), "2 runs"), (("x", "y"), "2 runs")])
def test_the_title_is_the_common_folder_s_where_that_says_something(tmp_path: Path, folders: tuple[str, str], title: str) -> None:
    first, second = (tmp_path / name for name in folders)
    page = page_of(make_run(first / "a", lines=BRIEF), make_diffusion_run(second / "b", lines=[]))
    assert page.headings[0] == (1, title)


def test_latents_of_another_encoder_are_told(tmp_path: Path) -> None:
    page = page_of(*both(tmp_path / "demo", latents=LATENTS | {"encoder_hash": "e2"}))
    assert "diffusion was trained on latents of another encoder than that of autoencoder." in page.text
    unknown = page_of(make_run(tmp_path / "a"), make_diffusion_run(tmp_path / "b"))
    assert "trained on latents" not in unknown.text


def test_a_stage_that_has_only_begun_does_not_hide_the_other(tmp_path: Path) -> None:
    autoencoder = make_run(tmp_path / "a", evaluation=EVALUATION, pictures=True)
    page = page_of(autoencoder, make_diffusion_run(tmp_path / "b", lines=[], latents=None))
    assert "KL by channel nats an image; filled: active (1 of 2)" in page.text
    assert page.text.count("Nothing logged yet") == 1
    assert (2, "Diffusion") in page.headings


def test_the_page_of_both_asks_for_nothing_and_keeps_its_ids_and_choices_apart(tmp_path: Path) -> None:
    folders = both(tmp_path / "demo")
    noise = np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8)
    for folder in folders:
        for step in range(1, 12):
            Image.fromarray(noise).save(folder / "images" / f"step-{step:08d}.png", compress_level=1)
    html = render(read_runs(folders))
    assert len(html.encode()) < 2_000_000
    page = Page(html)
    assert not {"script", "iframe", "object"} & {tag for tag, _ in page.elements}
    references = [value or "" for _, attrs in page.elements for key, value in attrs.items() if key in ("href", "xlink:href", "src")]
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for reference in references:
        assert reference.startswith("data:") or reference.removeprefix("#") in ids
    groups = page.all("input", "name")
    chosen = [attrs["name"] for tag, attrs in page.elements if tag == "input" and "checked" in attrs]
    assert sorted(chosen) == sorted(set(groups))
    assert len(groups) == 9 + 9 + 1
    assert len(page.all("img", "src")) == len(groups) + 1


def test_hostile_strings_are_text(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "")
    evaluation = DIFFUSION_EVALUATION | {"frechet_on": HOSTILE, "classes": [HOSTILE], "provenance": {HOSTILE: HOSTILE}}
    latents = LATENTS | {"rows_hash": HOSTILE}
    config = {"sampling": {"sampler": HOSTILE}}
    run = make_diffusion_run(tmp_path / name, evaluation=evaluation, latents=latents, config=config, pictures=True)
    other = make_diffusion_run(tmp_path / "other")
    autoencoder = make_run(tmp_path / "a", lines=BRIEF, evaluation=with_encoder("e1"))
    for folders in ([run], [run, other], [run, autoencoder]):
        page = page_of(*folders)
        assert page.text.count(HOSTILE) >= 6
        assert not [attrs for _, attrs in page.elements if any(key.startswith("on") for key in attrs)]
        assert all(uri.startswith("data:image/") for uri in page.all("img", "src"))


# The budget of bytes


def test_budgets_give_what_small_files_leave_to_larger_ones() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 1000, 12).tolist()
        shares = rng.integers(1, 3, 12).tolist()
        total = int(rng.integers(200, 2 * sum(sizes)))
        allowed = budgets(sizes, shares, total)
        assert all(a <= size for a, size in zip(allowed, sizes, strict=True))
        assert sum(allowed) <= total or sum(allowed) == sum(sizes) <= total
        cut = [a / share for a, size, share in zip(allowed, sizes, shares, strict=True) if a < size]
        if not cut:
            assert sum(sizes) <= total
            continue
        assert max(cut) - min(cut) <= 1  # a share is worth the same to all that are cut; whole bytes
        assert math.isclose(sum(allowed), total, abs_tol=12)
        assert all(a / share <= max(cut) + 1 for a, share in zip(allowed, shares, strict=True))
    assert budgets([], [], 100) == []


# The command


def test_the_command_writes_one_page_of_both(tmp_path: Path) -> None:
    folders, out = both(tmp_path / "demo"), tmp_path / "report.html"
    assert main([*map(str, folders), "--out", str(out)]) == 0
    assert Page(out.read_text()).headings[0] == (1, "demo")


def test_a_damaged_file_is_told_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_diffusion_run(tmp_path / "run", evaluation=DIFFUSION_EVALUATION, pictures=True)
    (run / "latents.json").write_text(json.dumps(LATENTS)[:-9])
    assert main([str(run), "--out", str(tmp_path / "report.html")]) == 2
    assert "latents.json: not JSON" in capsys.readouterr().err
    (run / "latents.json").write_text(json.dumps(LATENTS))
    (run / "images" / "neighbours.png").write_bytes(b"GIF89a")
    assert main([str(run), "--out", str(tmp_path / "report.html")]) == 2
    message = capsys.readouterr().err
    assert "neighbours.png: not a PNG picture" in message
    assert message.count("\n") == 1
