"""The account of both stages in a published card: what it says, and of which weights it has to be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from diffusion.account_card import Account, read_account
from diffusion.pipeline_path import network_hash
from tests.exports import main, refusal, write_run
from tests.pipelines import stock_in_this_process


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    stock_in_this_process(monkeypatch)


def account_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """What `evaluate_autoencoder --pipeline` writes, as far as a card tells of it."""
    of = json.loads((folder / "vae" / "preprocessing.json").read_text())["folded"]["of"]

    def figure(mean: float) -> dict[str, float]:
        return {"mean": mean, "standard_error": 0.5, "monte_carlo": 0.1}

    priors = {
        name: {"rate_nats": figure(rate), "total_nats": figure(1000 + rate), "bits_per_dim": figure((1000 + rate) / 768)}
        for name, rate in (("standard_normal", 300.0), ("learned", 250.0), ("calibrated", 240.0))
    }
    account = {
        "network_hash": network_hash(folder),
        "crops": 64,
        "images": 60,
        "labelled": 5,
        "same_images": False,
        "log_snr": [-12.0, 5.0],
        "nll_nats": figure(1000.0),
    } | priors
    data = {"source": "owner/birds (test)", "fingerprint": "0123456789abcdef", "images": 60}
    return {"account": {**account, "saved_nats": figure(50.0), **changes}, "provenance": {**of, "data": data}}


def test_the_account_goes_into_card_and_model_index(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(account_of(run / "pipeline")))
    assert main(run, tmp_path / "out", "--account", str(tmp_path / "a.json"), "--license", "mit") == 0
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    (result,) = card.data.eval_results or ()
    assert (result.dataset_type, result.dataset_split, result.metric_type) == ("owner/birds", "test", "bits_per_dim")
    assert result.metric_value == pytest.approx(1250 / 768, abs=1e-4)
    section = card.text.split("## Account\n")[1].split("\n## ")[0]
    assert "| Rate, E_q[−log p(z)] − H(q(z\\|x)) | 300 ± 0.5 | 250 ± 0.5 | 240 ± 0.5 |" in section
    assert (
        "saves 50 ± 0.5 nats an image" in section
        and "64 crops of 60 images (owner/birds (test), 5 of them given their class), log SNR from -12 to 5." in section
    )


def test_an_account_that_is_in_no_model_index_leaves_none_of_an_earlier_one(run: Path, tmp_path: Path) -> None:
    place = run
    for name, known in (("first", False), ("second", True)):
        (tmp_path / "a.json").write_text(json.dumps(account_of(run / "pipeline", same_images=known)))
        assert main(place, tmp_path / name, "--account", str(tmp_path / "a.json")) == 0
        place = tmp_path / name
        assert ("model-index" in (place / "README.md").read_text()) != known


def test_the_cards_account_says_of_labels_and_of_images_that_the_prior_may_know(run: Path, tmp_path: Path) -> None:
    def told(**changes: Any) -> Account:
        (tmp_path / "a.json").write_text(json.dumps(account_of(run / "pipeline", **changes)))
        return read_account(str(tmp_path / "a.json"), run / "pipeline")

    held_out, known = told(labelled=0), told(labelled=64, same_images=True)
    assert "| Bound on −log p(x) |" in held_out.text and "bound of the whole on −log p(x), by" in held_out.text
    assert "by heart" not in held_out.text and held_out.model_index is not None
    assert "| Bound on −log p(x\\|y) |" in known.text and "bound of the whole on −log p(x|y), by" in known.text
    assert "which may know them by heart" in known.text and known.model_index is None
    assert "−log p(x|y) and −log p(x), by" in told().text


def test_an_account_of_images_that_are_not_on_the_hub_is_in_no_model_index(run: Path, tmp_path: Path) -> None:
    report = account_of(run / "pipeline")
    report["provenance"]["data"] = {"source": "/data/mine/birds", "fingerprint": "0" * 64, "images": 60}
    (tmp_path / "a.json").write_text(json.dumps(report))
    account = read_account(str(tmp_path / "a.json"), run / "pipeline")
    assert account.model_index is None
    assert "(birds, 5 of them" in account.text and "/data" not in account.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda report: report["account"].update(network_hash="f" * 64), "network_hash there:      ffff"),
        (lambda report: report["provenance"].update(encoder_hash="e" * 64), "encoder_hash there:      eeee"),
        (lambda report: report["provenance"].update(decoder_hash="d" * 64), "decoder_hash there:      dddd"),
        (lambda report: report.pop("account"), "is no evaluation with an account"),
        (lambda report: report["account"].pop("saved_nats"), "is no evaluation with an account"),
        (lambda report: report["account"].pop("network_hash"), "is no evaluation with an account"),
    ],
)
def test_an_account_of_other_weights_or_none_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], None], said: str
) -> None:
    report = account_of(run / "pipeline")
    change(report)
    (tmp_path / "a.json").write_text(json.dumps(report))
    (tmp_path / "new").mkdir()
    message = refusal(capsys, run, tmp_path / "new" / "out", "--account", str(tmp_path / "a.json"))
    assert message.startswith("account: got ") and said in message
