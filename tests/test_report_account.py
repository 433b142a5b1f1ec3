"""The account of both stages in the report."""

import json
from pathlib import Path
from typing import Any

import pytest

from autoencoder.report.page import render
from autoencoder.report.runs import read_runs
from autoencoder.runtime.errors import UsageError
from tests.report_pages import DIFFUSION_EVALUATION, Page, make_diffusion_run, page_of


def figure(mean: float) -> dict[str, float]:
    return {"mean": mean, "standard_error": 0.5, "monte_carlo": 0.1}


def account(**changes: Any) -> dict[str, Any]:
    priors = {
        name: {"rate_nats": figure(rate), "total_nats": figure(1000 + rate), "bits_per_dim": figure((1000 + rate) / 768)}
        for name, rate in (("standard_normal", 300.0), ("learned", 250.0), ("calibrated", 240.0))
    }
    each = ((-2.0, 0.0, 8.0), (0.0, 2.0, 40.0), (2.0, 2.4, 2.0))
    levels = [{"log_snr": [low, high], "saved_nats": figure(saved), "normal_nats": figure(80.0)} for low, high, saved in each]
    told = {"network_hash": "n1", "crops": 64, "images": 60, "labelled": 64, "same_images": False, "nll_nats": figure(1000.0), **priors}
    told |= {"saved_nats": figure(50.0), "calibrated_saved_nats": figure(60.0), "levels": levels}
    told |= {"channels": [{"saved_nats": figure(51.0)}, {"saved_nats": figure(-1.0)}]}
    return told | changes


def made(folder: Path, **changes: Any) -> Path:
    provenance = {**DIFFUSION_EVALUATION["provenance"], "pipeline": {"network_hash": "n1"}}
    run = make_diffusion_run(folder, evaluation={**DIFFUSION_EVALUATION, "provenance": provenance})
    (run / "account.json").write_text(json.dumps({"metrics": {}, "account": account(**changes)}))
    return run


def test_the_bound_stands_by_prior_with_what_the_learned_one_saves(tmp_path: Path) -> None:
    page = page_of(made(tmp_path / "run"))
    assert "Prior NLL, nats Rate, nats Bound on −log p(x|y), nats Bits/dim" in page.text
    assert "Standard normal 1,000.0 ± 0.5 300.0 ± 0.5 1,300.0 ± 0.5 1.6927 ± 0.5000" in page.text
    assert "Diffusion model, calibrated 1,000.0 ± 0.5 240.0 ± 0.5" in page.text
    assert "saves 50.0 ± 0.5 nats an image (calibrated: 60.0 ± 0.5), on 64 crops of 60 images" in page.text
    assert "β to train with" not in page.text and "other weights" not in page.text and "by heart" not in page.text
    labels = [label for label in page.all("div", "aria-label") if label]
    # By unit of log SNR: the last level is narrower.
    assert "Nats saved over log SNR: 4.0 at −1.0, 20.0 at 1.0, 5.0 at 2.2" in labels
    assert "Nats saved in each latent channel: 0: 51.0, 1: −1.0" in labels


@pytest.mark.parametrize(("labelled", "said"), [(0, "−log p(x)"), (3, "−log p(x|y) and −log p(x)"), (64, "−log p(x|y)")])
def test_what_is_bounded_is_said_of_images_with_labels_and_without(labelled: int, said: str, tmp_path: Path) -> None:
    assert f"Rate, nats Bound on {said}, nats Bits/dim" in page_of(made(tmp_path / "run", labelled=labelled)).text


def test_a_price_says_which_beta_to_train_with(tmp_path: Path) -> None:
    ratio = {"value": 0.66, "standard_error": 0.01}
    price = {"learned": {"value": 1.5, "standard_error": 0.04}, "standard_normal": ratio, "best_beta": ratio, "effective_beta": 1.0}
    page = page_of(made(tmp_path / "run", price=price))
    assert "buys 1.50 ± 0.04 nats of NLL. To first order the β to train with for this total is 0.66 ± 0.01; this one" in page.text


def test_what_makes_an_account_doubtful_is_said(tmp_path: Path) -> None:
    page = page_of(made(tmp_path / "run", network_hash="n0", same_images=True))
    assert "account.json is of other weights than this run's pipeline" in page.text
    assert "which it may know by heart" in page.text


def test_runs_with_and_without_an_account_stand_side_by_side(tmp_path: Path) -> None:
    runs = [made(tmp_path / "a"), make_diffusion_run(tmp_path / "b", evaluation=DIFFUSION_EVALUATION), made(tmp_path / "c")]
    page = Page(render(read_runs(runs)))
    assert page.text.count("Prior NLL, nats") == 2
    assert any(label and label.startswith("Nats saved over log SNR: a: 4.0 at") for label in page.all("div", "aria-label"))
    assert "account of both stages" not in page_of(runs[1]).text.lower()


def test_an_account_file_of_something_else_is_refused(tmp_path: Path) -> None:
    run = make_diffusion_run(tmp_path / "run", evaluation=DIFFUSION_EVALUATION)
    (run / "account.json").write_text(json.dumps({"metrics": {}, "account": {"learned": 1}}))
    with pytest.raises(UsageError, match=r"account.json: holds no account; write it by `evaluate_autoencoder --pipeline .*run --out"):
        read_runs([run])
