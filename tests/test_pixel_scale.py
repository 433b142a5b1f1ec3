"""A scale for each value, all the way: trained, resumed, exported without its channels, measured with them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autoencoder import artifact, evaluate, export
from autoencoder.config import ModelConfig
from autoencoder.identity import decoder_hash, encoder_hash
from autoencoder.likelihood import PixelScale
from autoencoder.model import (
    CONV_OUT,
    AutoencoderKL,
    build,
    decode,
    decode_parameters,
    is_widened,
    narrow,
    scale_rows,
    stock_state,
    widen,
)
from autoencoder.objective_config import LikelihoodConfig
from autoencoder.pretrained import load, load_weights
from autoencoder.reconstruction import reconstruct
from autoencoder.runtime.errors import ConfigError, UsageError
from autoencoder.scale import AnalyticScale, learned_scale
from autoencoder.single_file import to_ldm
from tests.children import SMALL, run
from tests.gradients import launch

PIXEL = [*SMALL, "--train.images=40", "--objective.likelihood.name=discretized_logistic", "--objective.likelihood.scale=pixel"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run([*PIXEL, "--checkpoint.every_images=16", "--out", str(folder)]) == 0
    return folder


def network(*, widened: bool = False, seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = build(ModelConfig(preset="tiny", block_out_channels=[8, 8], norm_groups=4), channels=3, resolution=16)
    if widened:
        widen(vae, 0.1)
    return vae


def average(folder: Path) -> dict[str, torch.Tensor]:
    """The moving average of the network at a run's end."""
    newest = max((folder / "checkpoints").glob("step-*"))
    return {k.removeprefix("vae."): v for k, v in load_file(newest / "ema.safetensors").items()}


@torch.no_grad()
def test_a_widened_network_decodes_the_same_images_and_starts_at_one_scale() -> None:
    vae, latents = network(), torch.randn(2, 4, 8, 8)
    before, hashed, state = decode(vae, latents), decoder_hash(vae), vae.state_dict()
    widen(vae, 0.1)
    made = decode_parameters(vae, latents)
    assert made.shape == (2, 6, 16, 16)
    torch.testing.assert_close(decode(vae, latents), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(PixelScale("laplace").split(made)[1], torch.full((2, 3, 16, 16), 0.1))
    # What is exported, hashed and renamed is the network as it was.
    stock = narrow(vae)
    assert (is_widened(vae), is_widened(stock), stock.config["out_channels"]) == (True, False, 3)
    for found in (stock.state_dict(), stock_state(vae)):
        assert found.keys() == state.keys() and all(torch.equal(found[k], v) for k, v in state.items())
    assert decoder_hash(vae) == decoder_hash(stock) == hashed
    assert to_ldm(vae)["decoder.conv_out.weight"].shape[0] == 3
    assert narrow(stock) is stock
    with pytest.raises(ConfigError, match="takes 3 channels and makes 6"):
        widen(vae, 0.1)


def test_whole_images_leave_the_scales_behind_also_in_tiles() -> None:
    vae, images = network(widened=True), torch.zeros(1, 3, 70, 33)
    assert reconstruct(vae, images).shape == reconstruct(vae, images, tile=64).shape == images.shape


def test_the_run_folder_has_a_stock_network_and_the_scales_beside_it(trained: Path) -> None:
    state, weights = average(trained), load_file(trained / "vae" / WEIGHTS)
    assert json.loads((trained / "vae" / "config.json").read_text())["out_channels"] == 3
    assert all(torch.equal(v, state[k][:3] if k in CONV_OUT else state[k]) for k, v in weights.items())
    rows = load_file(trained / "vae" / artifact.LIKELIHOOD)
    assert rows.keys() == set(CONV_OUT)
    assert all(torch.equal(v, state[k][3:]) for k, v in rows.items())
    # They have learned: they started at no weight and ln 0.1.
    assert all((rows[k] - start).abs().max() > 1e-4 for k, start in zip(CONV_OUT, (0.0, torch.tensor(0.1).log()), strict=True))


@torch.no_grad()
def test_the_scales_are_attached_to_measure_and_change_no_reconstruction(trained: Path) -> None:
    vae, wide = load(str(trained)), load(str(trained))
    artifact.attach_scales(wide, trained / "vae")
    latents = torch.randn(2, 4, 8, 8)
    assert torch.equal(decode(wide, latents), decode(vae, latents))
    assert all(torch.equal(v, average(trained)[k]) for k, v in wide.state_dict().items())
    recipe = json.loads((trained / "vae" / "preprocessing.json").read_text())
    for either in (vae, wide):
        assert recipe["decoder_hash"] == decoder_hash(either)
        assert recipe["encoder_hash"] == encoder_hash(either, recipe["pixels"])
    likelihood = artifact.load_likelihood(trained / "vae")
    assert isinstance(likelihood, PixelScale)
    assert (likelihood.name, likelihood.levels, likelihood.bounds) == ("discretized_logistic", 256, (1e-4, 100.0))


def test_the_log_has_the_geometric_mean_scale(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    scales = [line["geometric_mean_scale"] for line in lines if line["phase"] == "train"]
    assert scales[0] == pytest.approx(0.1, rel=1e-3)
    assert len(set(scales)) == len(scales) == 5
    assert not any("likelihood_scale" in line for line in lines)


def test_evaluate_repeats_the_runs_own_account(trained: Path, tmp_path: Path) -> None:
    own, last = json.loads((trained / "evaluation.json").read_text()), json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    out = tmp_path / "out.json"
    assert evaluate.main(["--model", str(trained), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    for metric in ("nll_nats", "elbo_nats", "bits_per_dim", "psnr_db"):
        # The last validation was of the network before it was stripped.
        assert own["metrics"][metric]["mean"] == pytest.approx(last[metric], rel=1e-6)
        assert found["metrics"][metric]["mean"] == pytest.approx(last[metric], rel=1e-5), metric
    assert found["provenance"]["likelihood"]["scale"] == "pixel"
    assert found["provenance"]["decoder_hash"] == own["provenance"]["decoder_hash"]
    # Another likelihood takes the reconstruction alone.
    other = ["--likelihood.name", "laplace", "--likelihood.scale", "0.2"]
    assert evaluate.main(["--model", str(trained), *other, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["metrics"]["psnr_db"] == found["metrics"]["psnr_db"]


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_export_says_what_it_strips_and_casts_the_scales_too(
    trained: Path, tmp_path: Path, dtype: str, expected: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, state = max((trained / "checkpoints").glob("step-*")), average(trained)
    # From a checkpoint, and again from what was exported.
    for given, out in ((checkpoint, tmp_path / "once"), (tmp_path / "once", tmp_path / "twice")):
        assert export.main(["--checkpoint", str(given), "--out", str(out), "--dtype", dtype]) == 0
        assert "log scales; these rows of conv_out go into likelihood.safetensors" in capsys.readouterr().out
        assert AutoencoderKL.from_pretrained(out).config["out_channels"] == 3
        weights, rows = load_file(out / WEIGHTS), load_file(out / artifact.LIKELIHOOD)
        for name in CONV_OUT:
            assert torch.equal(torch.cat((weights[name], rows[name])), state[name].to(expected))
        assert isinstance(artifact.load_likelihood(out), PixelScale)
    argv = ["--checkpoint", str(trained), "--format", "ldm", "--out", str(tmp_path / "vae.safetensors"), "--dtype", dtype]
    assert export.main(argv) == 0
    assert "are left out" in capsys.readouterr().out
    ldm = load_file(tmp_path / "vae.safetensors")
    assert torch.equal(ldm["decoder.conv_out.weight"], state["decoder.conv_out.weight"][:3].to(expected))


def test_weights_go_from_narrow_to_widened_networks_and_back(trained: Path, tmp_path: Path) -> None:
    state, checkpoint = average(trained), str(max((trained / "checkpoints").glob("step-*")))
    for given in (str(trained), checkpoint):
        wide, plain = network(widened=True, seed=1), network(seed=1)
        assert load_weights(wide, given) is None
        assert all(torch.equal(v, state[k]) for k, v in wide.state_dict().items())
        assert "log scales in its decoder, which this objective does not use; they are dropped" in str(load_weights(plain, given))
        assert all(torch.equal(v, state[k][:3] if k in CONV_OUT else state[k]) for k, v in plain.state_dict().items())
    source, wide = network(seed=2), network(widened=True, seed=1)
    source.save_pretrained(tmp_path / "narrow")
    assert "has no log scales" in str(load_weights(wide, str(tmp_path / "narrow")))
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in stock_state(wide).items())
    assert all(torch.equal(v, scale_rows(network(widened=True))[k]) for k, v in scale_rows(wide).items())
    other = build(ModelConfig(preset="tiny", block_out_channels=[8, 16], norm_groups=4), channels=3, resolution=16)
    with pytest.raises(UsageError, match="same architecture"):
        load_weights(other, checkpoint)


def test_a_start_from_other_weights_says_what_becomes_of_the_scales(trained: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    assert run([*SMALL, "--train.images=8", f"--init_from={trained}", "--out", str(out)], output=said) == 0
    assert "they are dropped" in said.read_text()
    assert load_file(out / "vae" / artifact.LIKELIHOOD).keys() == {"scale"}
    back = [*PIXEL, "--train.images=8", f"--init_from={out}", "--out", str(tmp_path / "back")]
    assert run(back, output=said) == 0
    assert "has no log scales in its decoder; they start at" in said.read_text()
    assert "stripped at export" in said.read_text()


def test_a_killed_run_goes_on_to_the_same_bits(trained: Path, tmp_path: Path) -> None:
    argv = [*PIXEL, "--checkpoint.every_images=16", "--out", str(tmp_path / "run")]
    assert run(argv, kill_at=3) == -9
    assert run(argv) == 0
    for name in ("vae/" + WEIGHTS, f"vae/{artifact.LIKELIHOOD}", "checkpoints/step-00000005/optimizer.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes(), name


def test_gradients_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    # A step of eight images and an uneven one of five.
    argv = [*PIXEL, "--train.images=13", "--train.microbatch=2", "--optimizer.clip_norm=null", "--optimizer.lr=1e-5"]
    for folder, processes in (("one", 1), ("two", 2)):
        launch(tmp_path / folder, processes, argv)
    single, double = (load_file(tmp_path / folder / "gradients.safetensors") for folder in ("one", "two"))
    assert single.keys() == double.keys() and single["0/vae.decoder.conv_out.weight"].shape[0] == 6
    for key, value in single.items():
        assert (value - double[key]).norm() <= 1e-5 * torch.cat([v.flatten() for v in single.values()]).norm(), key
    logged = [[json.loads(line) for line in (tmp_path / f / "run" / "metrics.jsonl").read_text().splitlines()] for f in ("one", "two")]
    scales = [[line["geometric_mean_scale"] for line in lines if line["phase"] == "train"] for lines in logged]
    assert scales[0] == pytest.approx(scales[1], rel=1e-5)


@pytest.mark.parametrize("name", ["gaussian", "laplace", "discretized_logistic", "discretized_gaussian"])
def test_one_scale_for_all_stays_within_its_bounds(name: str) -> None:
    config = LikelihoodConfig(name=name, bounds=(1e-3, 10.0))  # type: ignore[arg-type]
    scale = AnalyticScale(config, torch.device("cpu"))
    scale.update(torch.zeros(()), torch.zeros(()))
    # An error of exactly zero, whose best scale has no density.
    assert scale.value.item() == pytest.approx(1e-3)
    scale.update(torch.tensor(1e9), torch.zeros(()))
    assert scale.value.item() == pytest.approx(10.0)
    learned = LikelihoodConfig(name=name, scale="learned", bounds=(1e-3, 10.0))  # type: ignore[arg-type]
    for raw, expected in ((-50.0, 1e-3), (torch.tensor(0.1).log().item(), 0.1), (50.0, 10.0)):
        assert learned_scale(torch.tensor(raw), learned).item() == pytest.approx(expected, rel=1e-4)
