"""`evaluate_autoencoder --pipeline`: the account of an autoencoder and a diffusion model, on tiny networks and priors that are known."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoencoder import artifact
from autoencoder.config import DataConfig
from autoencoder.identity import identity
from autoencoder.likelihood import DiscretizedLogistic
from autoencoder.posterior import DiagonalGaussian
from autoencoder.runtime.errors import ConfigError
from diffusion import account, account_text, command, evaluate, price
from diffusion.data import hold_out
from diffusion.denoiser import NULL_CLASS
from diffusion.learned_prior import LearnedPrior, images_of, open_prior, pilot_latents
from diffusion.likelihood import Latents
from diffusion.process import flow
from tests import diffusion_children, small_latents
from tests.pipelines import CLASSES, SIDE, parts, write_ungated

CROPS = 6
QUICK = ["--data.workers=0", "--account.draws=8", "--account.pilot_rows=8"]


@dataclasses.dataclass(frozen=True)
class Pair:
    """An autoencoder, a pipeline of its latents, and images."""

    model: Path
    pipeline: Path
    images: Path

    @property
    def argv(self) -> list[str]:
        return ["--model", str(self.model), "--pipeline", str(self.pipeline), "--data.source", str(self.images), *QUICK]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder, made = tmp_path_factory.mktemp("pair"), parts()
    recipe = artifact.preprocessing(DataConfig(source="demo", resolution=SIDE), 256)
    artifact.save_autoencoder(made.vae, folder / "vae", preprocessing=recipe, likelihood=DiscretizedLogistic(torch.tensor(0.1)))
    of_it = dataclasses.replace(made, identity=identity(made.vae, recipe["pixels"]))
    write_ungated(of_it, folder / "pipeline")
    draws = np.random.default_rng(0)
    for number in range(CROPS):
        # Half of them of a class that the pipeline knows, half of one that it does not.
        place = folder / "images" / ("heron" if number % 2 else "boat")
        place.mkdir(parents=True, exist_ok=True)
        pixels = draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(place / f"{number}.png")
    return Pair(folder / "vae", folder / "pipeline", folder / "images")


def pilot(prior: LearnedPrior, number: int = 32) -> Latents:
    """Rows of a standard normal in the encoder's units."""
    moments = torch.randn((number, *prior.shape), generator=torch.Generator().manual_seed(0))
    return Latents(prior.normalize(moments), torch.full((number,), NULL_CLASS), range(number))


@pytest.fixture
def without_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pilot rows without a data set of latents."""

    class Stored:
        folder, manifest = Path("latents"), {"segments": [{"source": {"fingerprint": "another"}}]}

    monkeypatch.setattr(account, "pilot_latents", lambda prior, *rest, **options: (pilot(prior), Stored()))


def measured(pair: Pair, out: Path, *options: str) -> dict[str, Any]:
    assert evaluate.main([*pair.argv, "--out", str(out), *options]) == 0
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def refusal(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    capsys.readouterr()
    assert evaluate.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


class StandardNormal(torch.nn.Module):
    """The denoiser of a flow whose latents are N(0, I) before they are normalised."""

    def __init__(self, prior: LearnedPrior) -> None:
        super().__init__()
        self.mean, self.variance = (values.float().view(-1, 1, 1) for values in (-prior.mean / prior.std, prior.std**-2))

    def forward(self, noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        alpha = 1 - t
        denoised = self.mean + alpha * self.variance / (alpha**2 * self.variance + t**2) * (noisy - alpha * self.mean)
        return flow().output(noisy, denoised, t.flatten())


def test_a_prior_that_is_the_standard_normal_saves_nothing(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_latents: None
) -> None:
    def known(path: str, device: torch.device) -> LearnedPrior:
        prior = open_prior(path, device)
        return dataclasses.replace(prior, denoiser=StandardNormal(prior))  # type: ignore[arg-type]

    monkeypatch.setattr(account, "open_prior", known)
    told = measured(pair, tmp_path / "a.json", "--account.draws=512", "--account.ode_rows=2")["account"]
    dims = 4 * (SIDE // 2) ** 2
    # Normalisation and its volume cancel; what is left is below the ends of the log SNR.
    assert abs(told["saved_nats"]["mean"]) < 3 * told["saved_nats"]["monte_carlo"] + 5e-4 * dims
    assert told["saved_nats"]["monte_carlo"] < 0.008 * dims
    for channel in told["channels"]:
        assert abs(channel["saved_nats"]["mean"]) < 4 * channel["saved_nats"]["monte_carlo"] + 5e-4 * dims
    assert told["price"]["learned"]["value"] == pytest.approx(told["price"]["standard_normal"]["value"], rel=0.15)
    assert told["price"]["best_beta"]["value"] == pytest.approx(1, rel=0.15)
    assert told["ode"]["bound_less_ode_nats"] == pytest.approx(0, abs=4 * told["saved_nats"]["monte_carlo"] * math.sqrt(CROPS))


def test_the_parts_of_the_account_sum_to_the_whole(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str], without_latents: None
) -> None:
    report = measured(pair, tmp_path / "a.json")
    told, shown = report["account"], capsys.readouterr()
    saved = told["saved_nats"]["mean"]
    assert sum(level["saved_nats"]["mean"] for level in told["levels"]) + told["ends"]["saved_nats"]["mean"] == pytest.approx(saved)
    assert sum(channel["saved_nats"]["mean"] for channel in told["channels"]) == pytest.approx(saved)
    normal, learned = told["standard_normal"], told["learned"]
    assert normal["rate_nats"]["mean"] - learned["rate_nats"]["mean"] == pytest.approx(saved)
    # In closed form, as in the table above it.
    assert normal["rate_nats"]["mean"] == pytest.approx(report["metrics"]["kl_nats"]["mean"], rel=1e-5)
    assert learned["total_nats"]["mean"] == pytest.approx(told["nll_nats"]["mean"] + learned["rate_nats"]["mean"])
    dims = 3 * SIDE**2
    assert learned["bits_per_dim"]["mean"] == pytest.approx(learned["total_nats"]["mean"] / (dims * math.log(2)))
    assert (told["crops"], told["images"], told["labelled"], told["same_images"]) == (CROPS, CROPS, CROPS // 2, False)
    assert "the learned prior saves" in shown.out and "price of the rate" in shown.out and "account measured on" in shown.err
    assert max(map(len, shown.out.splitlines())) <= 120


def test_settings_of_memory_change_nothing_and_labels_do(pair: Pair, tmp_path: Path, without_latents: None) -> None:
    def account_of(name: str, *options: str) -> dict[str, Any]:
        told: dict[str, Any] = measured(pair, tmp_path / name, "--account.price=false", *options)["account"]
        return told

    whole = account_of("a.json")
    apart = account_of("b.json", "--account.batch_size=3", "--batch_size=4")
    assert apart["learned"]["rate_nats"]["mean"] == pytest.approx(whole["learned"]["rate_nats"]["mean"], rel=1e-5)
    unlabelled = account_of("c.json", "--account.labels=none")
    assert unlabelled["labelled"] == 0 and unlabelled["learned"]["rate_nats"] != whole["learned"]["rate_nats"]
    assert "price" not in whole and "ode" not in whole
    assert account_of("d.json", "--account.images=3")["crops"] == 3


def test_what_has_no_account_is_refused_before_anything_is_measured(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str], without_latents: None
) -> None:
    assert "give 16" in refusal(capsys, [*pair.argv, "--data.resolution=32"])
    likelihood = pair.model / artifact.LIKELIHOOD
    kept = likelihood.read_bytes()
    likelihood.unlink()
    assert "likelihood.name" in refusal(capsys, pair.argv)
    likelihood.write_bytes(kept)
    other = write_ungated(parts(), tmp_path / "other")
    message = refusal(capsys, [*pair.argv, f"--pipeline={other}"])
    hashes = {line.split()[-1] for line in message.splitlines() if "encoder_hash" in line}
    assert "another encoder" in message and len(hashes) == 2 and all(len(found) == 64 for found in hashes)
    (other / "vae" / artifact.PREPROCESSING).write_text("{}")
    assert "does not tell which autoencoder" in refusal(capsys, [*pair.argv, f"--pipeline={other}"])
    fewer = tmp_path / "fewer"
    shutil.copytree(pair.pipeline, fewer)
    weights = fewer / "transformer" / "diffusion_pytorch_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith("proj_out_2")}
    save_file(kept, weights, metadata={"format": "pt"})
    assert "its network cannot be loaded" in refusal(capsys, [*pair.argv, f"--pipeline={fewer}"])
    for wrong, said in (
        ("--pipeline=owner/name", "fetch it first"), ("--pipeline=/nowhere", "no such folder"), ("--account.draws=7", "even number"),
        ("--account.images=1", "at least 2"), ("--account.pilot_rows=2", "at least 8"),
    ):  # fmt: skip
        assert said in refusal(capsys, [*pair.argv, wrong])
    assert "above 0" in refusal(capsys, [*pair.argv, "--account.ode_rows=2", "--account.ode_tolerance=0"])


def test_a_bare_pipeline_wants_latents(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert "account.latents: not given" in refusal(capsys, pair.argv)
    assert "no such folder" in refusal(capsys, [*pair.argv, "--account.latents=/nowhere"])


def test_the_command_measures_an_autoencoder_alone_as_before(pair: Pair, tmp_path: Path) -> None:
    argv = ["evaluate_autoencoder", "--model", str(pair.model), f"--data.source={pair.images}", "--data.workers=0"]
    assert command.main([*argv, "--out", str(tmp_path / "a.json")]) == 0
    assert "account" not in json.loads((tmp_path / "a.json").read_text())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--account.draws=8"], "account.draws: got 8; it would have no effect: without a pipeline there is no account"),
        (["--pipeline", "PIPELINE", "--account.ode_tolerance=1e-3"], "account.ode_tolerance: got 0.001; it would have no effect"),
    ],
)
def test_settings_of_no_account_are_refused(pair: Pair, capsys: pytest.CaptureFixture[str], given: list[str], said: str) -> None:
    options = [str(pair.pipeline) if option == "PIPELINE" else option for option in given]
    assert said in refusal(capsys, ["--model", str(pair.model), f"--data.source={pair.images}", *options])


def test_labels_go_by_name(pair: Pair) -> None:
    prior = open_prior(str(pair.pipeline), torch.device("cpu"))
    names = ["boat", *CLASSES[::-1]]
    numbers = torch.tensor([-1, 0, 1, 6])
    assert prior.labels(numbers, names, asked=True).tolist() == [NULL_CLASS, NULL_CLASS, 5, 0]
    assert prior.labels(numbers, names, asked=False).tolist() == [NULL_CLASS] * 4
    # A source without names has numbers for names, and one class is called "5".
    assert prior.labels(torch.tensor([5, 4]), None, asked=True).tolist() == [3, NULL_CLASS]


def test_a_price_is_told_with_the_side_that_the_total_falls_to() -> None:
    def told(value: float) -> str:
        ratio = {"value": value, "standard_error": 0.1}
        price = {"learned": ratio, "standard_normal": ratio, "best_beta": ratio, "effective_beta": None}
        return " ".join(account_text._price(price))

    assert "above 1: less noise" in told(1.5) and "below 1: more noise" in told(0.5)
    # NLL and rate both fall with less noise.
    assert "below 0: less noise" in told(-2.0)


def test_slopes_are_those_of_a_model_in_closed_form() -> None:
    """x = z + noise, p(z) = N(0, v): with a posterior of standard deviation s, all three slopes are known."""
    draws, step = torch.Generator().manual_seed(0), 0.01
    means, s, v, noise = torch.randn(500, 1, generator=draws).double(), 0.3, 0.5, 0.2

    def rates(step: float) -> price.Rates:
        posterior = DiagonalGaussian(means, torch.full_like(means, 2 * (math.log(s) + step)))
        variance = posterior.std.square()[:, 0]
        learned = 0.5 * ((means[:, 0].square() + variance) / v + math.log(v) - 1) - posterior.std.log()[:, 0]
        return price.Rates(*(values[None] for values in (variance / (2 * noise**2), posterior.kl_to_standard_normal(), learned)))

    slopes = price.Slopes.between(rates(-step), rates(step))
    nll, normal, learned = s**2 / noise**2, s**2 - 1, s**2 / v - 1
    assert slopes.price_of_normal().value == pytest.approx(-nll / normal, rel=1e-3)
    assert slopes.price_of_learned().value == pytest.approx(-nll / learned, rel=1e-3)
    assert slopes.learned_for_normal().value == pytest.approx(learned / normal, rel=1e-3)
    # Every crop has the same slope here, and so the ratio no error.
    assert slopes.price_of_learned().standard_error < 1e-6


def test_the_error_of_a_ratio_is_the_spread_of_repeated_studies() -> None:
    draws = torch.Generator().manual_seed(1)
    found = []
    for _ in range(500):
        below = 2 + torch.randn(100, generator=draws).double()
        found.append(price.Ratio.of(3 * below + torch.randn(100, generator=draws).double(), below, None))
    assert float(np.mean([r.standard_error for r in found])) == pytest.approx(float(np.std([r.value for r in found])), rel=0.1)


def test_a_likelihood_of_densities_has_no_bits(pair: Pair, tmp_path: Path, without_latents: None) -> None:
    given = ["--likelihood.name=gaussian", "--likelihood.scale=0.1", "--account.price=false"]
    assert "bits_per_dim" not in measured(pair, tmp_path / "a.json", *given)["account"]["learned"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, small_latents.Data]:
    """A finished diffusion run of few steps and its data."""
    root = tmp_path_factory.mktemp("run")
    made = small_latents.write_data(root / "data")
    argv = [*diffusion_children.SMALL_DIFFUSION, "--latents", str(made.latents), "--out", str(root / "run"), "--sampling.evaluate=0"]
    assert diffusion_children.run(argv) == 0
    return root / "run", made


def test_a_run_tells_where_its_training_rows_are(
    run: tuple[Path, small_latents.Data], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, made = run
    argv = ["--model", str(made.vae), "--pipeline", str(folder), f"--data.source={made.photos}", "--data.resolution=16"]
    options = ["--likelihood.name=discretized_logistic", "--likelihood.scale=0.1", "--account.images=12", "--account.price=false", *QUICK]
    assert evaluate.main([*argv, *options, "--out", str(tmp_path / "a.json")]) == 0
    told = json.loads((tmp_path / "a.json").read_text())["account"]
    assert told["pilot"] == {"latents": str(made.latents), "rows": 8} and told["labelled"] == 12
    # Those are the images that were encoded.
    assert told["same_images"] and "may know by heart" in capsys.readouterr().out
    # Likewise of some of them.
    assert evaluate.main([*argv, *options, "--data.images=4", "--out", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["account"]["same_images"]
    other = refusal(capsys, [*argv, *options, f"--account.latents={made.other_latents}"])
    assert "account.latents: latents of another encoder" in other and other.count("encoder_hash") == 2


def test_a_run_tells_which_images_its_prior_has_seen(run: tuple[Path, small_latents.Data]) -> None:
    """Also where the pilot's rows are given apart."""
    folder, made = run
    manifest = json.loads((made.latents / "manifest.json").read_text())
    assert images_of(str(folder)) == {segment["source"]["fingerprint"] for segment in manifest["segments"]} != set()
    assert images_of(str(folder / "pipeline")) == set()


def test_a_run_whose_evaluation_is_damaged_is_refused_in_words(tmp_path: Path) -> None:
    for text in ("{", '{"provenance": null}', '{"metrics": {}}'):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(ConfigError, match=r"evaluation.json cannot be read"):
            images_of(str(tmp_path))


def test_pilot_rows_are_none_that_were_held_out(run: tuple[Path, small_latents.Data]) -> None:
    folder, made = run
    prior = open_prior(str(folder), torch.device("cpu"))
    rows, stored = pilot_latents(prior, str(folder), None, most=10_000, seed=0, labelled=True, device=torch.device("cpu"))
    training, held_out = hold_out(stored, 512)
    assert list(rows.numbers) == training.tolist() and not set(rows.numbers) & set(held_out.tolist())
    assert rows.labels.tolist() == stored.gather(training).label.tolist()
    # Draws of the posterior, normalised.
    assert abs(float(rows.values.std()) - 1) < 0.1 and abs(float(rows.values.mean())) < 0.1
    everything, _ = pilot_latents(prior, str(folder), str(made.latents), most=10_000, seed=0, labelled=False, device=torch.device("cpu"))
    assert len(everything) == len(stored) and set(everything.labels.tolist()) == {NULL_CLASS}
