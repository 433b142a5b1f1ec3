"""The report of alarms, of what the latents carry and of what is optimised."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoencoder.objective_config import KLConfig, ObjectiveConfig, PerceptualConfig
from autoencoder.objective_summary import Measured, describe_objective
from autoencoder.report.charts import MOST_CELLS, heat, pooled
from tests.report_pages import EVALUATION, HOSTILE, LINES, TRAIN, make_diffusion_run, make_run, page_of

ALARMS = [
    {"alarms": ["idle_channels"], "raised": [{"name": "idle_channels", "message": "1 of 2 is inactive", "remedy": "Give fewer"}]},
    {
        "alarms": ["collapse"],
        "raised": [{"name": "collapse", "message": "the KL is 0.1 nats", "remedy": "Lower the weight"}],
        "cleared": ["idle_channels"],
    },
]
SITES = [[1.5, 0.5, 0.25], [0.125, 2.5, 0.75]]
CARRIED: dict[str, Any] = EVALUATION | {
    "site_kl_nats": SITES, "sites": 6, "units": 12, "active_channels": 1, "active_sites": 5, "active_units": 9, "share_near_prior": 0.25,
    "share_at_clamp": 0.00125, "shuffled_nll_nats": 1234.5, "shuffled_delta_nats": 234.25,
    "metrics": EVALUATION["metrics"] | {"scales_at_low_bound": {"mean": 0.5}, "elbo_nats": {"mean": -777.25}},
}  # fmt: skip


def alarmed() -> list[dict[str, Any]]:
    """A log in which one alarm is raised at 128 images, and at 256 cleared while another is raised."""
    return [*TRAIN[:1], TRAIN[1] | ALARMS[0], TRAIN[2] | {"alarms": ["idle_channels"]}, TRAIN[3] | ALARMS[1], *LINES[5:]]


def boxes(html_elements: list[tuple[str, dict[str, str | None]]]) -> int:
    return sum(tag == "aside" and attributes.get("role") == "alert" for tag, attributes in html_elements)


def test_an_alarm_that_stands_is_at_the_top_with_its_remedy_and_both_are_with_the_latents(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", lines=alarmed(), evaluation=CARRIED))
    assert boxes(page.elements) == 1
    top, _, below = page.text.partition("Evidence lower bound")
    assert "Collapse raised at 256 images The KL is 0.1 nats. Lower the weight." in top
    assert "inactive" not in top
    assert "Alarm “Collapse”, raised at 256 images: the KL is 0.1 nats." in below
    assert "Alarm “Idle channels”, raised at 128 images and cleared at 256: 1 of 2 is inactive." in below


def test_an_alarm_that_stands_at_the_end_has_the_final_figures(tmp_path: Path) -> None:
    final = [{"name": "collapse", "message": "the KL is 0.3 nats", "remedy": "Lower the weight"}]
    page = page_of(make_run(tmp_path / "run", lines=alarmed(), evaluation=CARRIED | {"alarms": final}))
    assert "Collapse raised at 256 images The KL is 0.3 nats. Lower the weight." in page.text
    assert "0.1 nats" not in page.text
    assert "1 of 2 is inactive" in page.text  # cleared: as it was raised


def test_alarms_of_several_runs_go_by_their_names(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "calm"), make_run(tmp_path / "wild", lines=alarmed())]
    page = page_of(*runs, make_diffusion_run(tmp_path / "diffusion"))
    assert boxes(page.elements) == 1
    assert "wild: Collapse raised at 256 images" in page.text
    assert "wild: Alarm “Idle channels”" in page.text


def test_a_calm_run_has_no_alarms(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", evaluation=CARRIED))
    assert boxes(page.elements) == 0
    assert "larm" not in page.text


def test_hostile_alarms_are_text(tmp_path: Path) -> None:
    lines = [*TRAIN[:2], TRAIN[2] | {"raised": [{"name": HOSTILE, "message": HOSTILE}]}]
    page = page_of(make_run(tmp_path / "run", lines=lines))
    assert not any(tag == "img" and attributes.get("src") == "x" for tag, attributes in page.elements)
    assert "<img src=x onerror=alert(1)>" in page.text


def test_what_the_latents_carry_is_told(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", evaluation=CARRIED))
    for words in (
        "Active channels 1 of 2", "Active sites 5 of 6", "Active units 9 of 12", "(above 0.9) 25%", "Log-variances at the clamp 0.12%",
        "NLL with latents of another image, nats 1,234.5 (+234.2)", "Scales at the lower bound 50%",
    ):  # fmt: skip
        assert words in page.text
    alt = "KL of each of 2 by 3 sites, nats an image: from 0.125 to 2.5, mean 0.9375"
    assert alt in page.all("div", "aria-label")


def test_a_map_is_as_strong_as_its_values() -> None:
    sites = np.array(SITES)
    svg = heat(sites, colour=3)
    drawn = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="[\d.]+" fill-opacity="([\d.]+)"', svg)
    cells = drawn[: sites.size]
    assert {width for _, _, width, _ in cells} == {"50.00"}
    for (y, x), value in np.ndenumerate(sites):
        (opacity,) = [float(o) for left, top, _, o in cells if (float(left), float(top)) == (50.0 * x, 50.0 * y)]
        assert opacity == pytest.approx(0.06 + 0.94 * value / 2.5, abs=0.01)
    assert "var(--series-3)" in svg
    assert heat(np.zeros((2, 2)), colour=0).count('fill-opacity="0.06"') == 5  # four cells and the end of the scale


def test_a_large_map_is_pooled_by_equal_blocks() -> None:
    values = np.random.default_rng(0).random((50, 37))
    cells = pooled(values, MOST_CELLS)
    assert cells.shape == (17, 13)
    np.testing.assert_allclose(cells[4, 5], values[12:15, 15:18].mean())
    np.testing.assert_allclose(cells[-1, -1], values[48:, 36:].mean())
    assert np.array_equal(pooled(values[:24, :20], MOST_CELLS), values[:24, :20])


def test_what_is_optimised_stands_term_by_term(tmp_path: Path) -> None:
    config = ObjectiveConfig(kl=KLConfig(weight=2.0), perceptual=PerceptualConfig(name="ssim", weight=0.05))
    measured = Measured(mean_absolute_error=0.05, mean_squared_error=0.005, channels=3, resolution=32, latent_shape=(4, 8, 8))
    told = describe_objective(config, measured)
    page = page_of(make_run(tmp_path / "run", evaluation=CARRIED | {"objective": told}))
    text = page.text
    assert "Pixel ELBO NLL (laplace" in text
    assert "−777.2 nats an image" in text
    assert re.search(r"Perceptual ssim, weight 0\.05: in the loss, in no ELBO 0\.0625 Adversarial off", text)
    assert "Effective beta 2" in text
    assert "As KL weight 0.1 in LDM" in text


def test_the_elbo_has_no_auxiliary_loss_beside_it(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", evaluation=CARRIED))
    bound, _, rest = page.text.partition("Auxiliary losses")
    assert "Perceptual distance" in rest
    assert "Perceptual" not in bound.partition("Evidence lower bound")[2]
