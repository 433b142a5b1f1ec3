"""Experimental families in whole runs: they start at the plain VAE, resume bitwise, export, evaluate, and refuse what has no meaning."""

import json
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Normal

from autoencoder import encode, evaluate, export, reconstruct, train
from autoencoder.config import DataConfig, ModelConfig, TrainAutoencoderConfig
from autoencoder.elbo import evaluate_elbo
from autoencoder.experimental.config import ExperimentalConfig
from autoencoder.experimental.module import ExperimentalAutoencoder, Families
from autoencoder.experimental.saved import load_families, open_family, start_from
from autoencoder.likelihood import Laplace
from autoencoder.model import Autoencoder, AutoencoderKL, build, decode_parameters
from autoencoder.model import encode as encode_images
from autoencoder.posterior import DiagonalGaussian
from autoencoder.pretrained import load
from autoencoder.training import build_module
from tests.children import SMALL, run
from tests.gradients import launch
from tests.test_training import assert_same_run

ROOT = Path(__file__).parents[1]
TINY = ModelConfig(preset="tiny", block_out_channels=(8, 8), norm_groups=4)
FLOW = ["--experimental.flow_width=8", "--experimental.flow_couplings=4"]
MIXTURE = ["--experimental.components=3"]
SHORT = [*SMALL, "--train.images=32", "--log.validate_every_images=32", "--checkpoint.every_images=null"]


pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def network() -> AutoencoderKL:
    torch.manual_seed(0)
    return build(TINY, channels=3, resolution=16)


def small(**chosen: object) -> ExperimentalConfig:
    """Families, small."""
    flow = {"flow_width": 8, "flow_couplings": 4} if "flow" in chosen.values() else {}
    mixture = {"components": 3} if chosen.get("prior") in ("mixture", "vamp") else {}
    return ExperimentalConfig(**(flow | mixture | chosen))  # type: ignore[arg-type]


def with_families(**chosen: object) -> ExperimentalAutoencoder:
    """A network with families in float64."""
    vae, config = network(), small(**chosen)
    return ExperimentalAutoencoder(vae, None, Families(config, vae, resolution=16)).double()


def batch(*samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = 2 * torch.rand(5, 3, 16, 16, generator=generator, dtype=torch.float64) - 1
    return images, torch.randn(5, *samples, 4, 8, 8, generator=generator, dtype=torch.float64)


def sampled_kl(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """log q(z|x) - log N(z; 0, I) of one sample by torch.distributions."""
    q = Normal(mean, (0.5 * logvar).exp())
    z = mean + q.stddev * noise
    return (q.log_prob(z) - Normal(0, 1).log_prob(z)).flatten(1).sum(1)


@pytest.mark.parametrize("chosen", [{"posterior": "flow"}, {"prior": "flow"}, {"posterior": "flow", "prior": "flow"}])
def test_flows_start_at_the_plain_vae(chosen: dict[str, str]) -> None:
    module, (images, noise) = with_families(**chosen), batch()
    plain = Autoencoder(network()).double()(images, noise)
    output = module(images, noise)
    assert torch.equal(output.decoded, plain.decoded)
    torch.testing.assert_close(output.rate, sampled_kl(plain.mean, plain.logvar, noise), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prior", ["mixture", "vamp"])
def test_mixtures_start_near_the_plain_vae(prior: str) -> None:
    module, (images, noise) = with_families(prior=prior, components=64), batch()
    plain = Autoencoder(network()).double()(images, noise)
    output = module(images, noise)
    assert torch.equal(output.decoded, plain.decoded)
    difference = output.rate - sampled_kl(plain.mean, plain.logvar, noise)
    assert abs(difference.mean().item()) < 0.02 * noise[0].numel()


def test_the_rate_of_the_gaussian_is_log_q_minus_log_p_for_every_sample() -> None:
    module, (images, noise) = with_families(iwae_samples=3), batch(3)
    output = module(images, noise)
    posterior = encode_images(module.vae, images)
    for k in range(3):
        expected = sampled_kl(posterior.mean, posterior.logvar, noise[:, k])
        torch.testing.assert_close(output.rate.view(5, 3)[:, k], expected, rtol=1e-10, atol=1e-10)
        decoded = decode_parameters(module.vae, posterior.sample(noise[:, k]))
        torch.testing.assert_close(output.decoded.view(5, 3, *decoded.shape[1:])[:, k], decoded)


@pytest.mark.parametrize("chosen", [{"posterior": "flow", "prior": "vamp"}, {"prior": "mixture", "iwae_samples": 2}])
def test_everything_that_trains_is_reached(chosen: dict[str, object]) -> None:
    module = with_families(**chosen)
    output = module(*batch(*([2] if "iwae_samples" in chosen else [])))
    (output.decoded.square().sum() + output.rate.sum()).backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


def test_the_account_takes_a_flow_posterior() -> None:
    module, (images, _) = with_families(posterior="flow", prior="flow"), batch()
    for parameter in module.experimental.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    family = module.family()
    assert family is not None
    with torch.no_grad():
        terms = evaluate_elbo(
            images,
            encode=lambda x: family.families.posterior_from(encode_images(module.vae, x)),
            decode=lambda z: decode_parameters(module.vae, z),
            likelihood=Laplace(0.3),
            prior=family.prior,
            samples=2,
            generator=torch.Generator().manual_seed(3),
        )
        noise = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        rates = [family.sample(encode_images(module.vae, images), epsilon)[1] for epsilon in noise]
    torch.testing.assert_close(terms.kl, torch.stack(rates).mean(0))
    assert (terms.iwae >= terms.elbo).all()


CONFIGURED = {
    "mixture": [*MIXTURE, "--experimental.prior=mixture"],
    "vamp": [*FLOW, *MIXTURE, "--experimental.prior=vamp", "--experimental.posterior=flow"],
    "all": [
        *FLOW,
        *["--experimental.posterior=flow", "--experimental.prior=flow", "--experimental.iwae_samples=2", "--optimizer.name=muon"],
        *["--experimental.encoder_steps=2", "--experimental.encoder_steps_images=100", "--objective.likelihood.scale=pixel"],
    ],
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_run_ends_with_a_stock_folder_and_its_own_account(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert train.main([*SHORT, *CONFIGURED[name], "--out", str(folder)]) == 0
    assert "which stock code does not load" in capsys.readouterr().err
    stock = AutoencoderKL.from_pretrained(folder / "vae")
    assert stock.config["out_channels"] == 3

    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    metrics = json.loads((folder / "evaluation.json").read_text())["metrics"]
    assert metrics["kl_nats"]["mean"] == pytest.approx(last["kl_nats"], rel=1e-5)
    assert evaluate.main(["--model", str(folder), "--out", str(tmp_path / "evaluated.json")]) == 0
    evaluated = json.loads((tmp_path / "evaluated.json").read_text())
    assert evaluated["metrics"]["elbo_nats"]["mean"] == pytest.approx(metrics["elbo_nats"]["mean"], rel=1e-5)
    told = json.loads((folder / "evaluation.json").read_text())["objective"]["experimental"]
    assert evaluated["objective"]["experimental"] == told
    assert "KL is log q - log p of a sample" in told["words"]

    families = load_families(stock, folder / "vae")
    assert families is not None
    checkpoint = load_file(next((folder / "checkpoints").glob("step-*")) / "ema.safetensors")
    for key, value in families.state_dict().items():
        assert torch.equal(value, checkpoint[f"experimental.{key}"])


def test_a_killed_run_with_all_families_resumes_to_the_same_bits(tmp_path: Path) -> None:
    argv = [*SMALL, *CONFIGURED["all"]]
    assert run([*argv, "--out", str(tmp_path / "whole")]) == 0
    assert run([*argv, "--out", str(tmp_path / "run")], kill_at=11) == -signal.SIGKILL
    assert run([*argv, "--out", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["phase"] == "train"]
    for line in trained:
        assert line["iwae_nats"] >= line["elbo_nats"]
        assert line["loss"] == pytest.approx(-line["iwae_nats"])


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    argv = [*SMALL, *CONFIGURED["all"], "--train.images=29", "--train.microbatch=2", "--optimizer.clip_norm=null"]
    for processes in (1, 2):
        launch(tmp_path / str(processes), processes, [*argv, "--optimizer.lr=1e-5"])
    single, double = (load_file(tmp_path / name / "gradients.safetensors") for name in "12")
    assert single.keys() == double.keys()
    for step in range(4):
        keys = [key for key in single if key.startswith(f"{step}/")]
        assert any("experimental.posterior" in key for key in keys)
        difference = torch.cat([(single[k] - double[k]).flatten() for k in keys]).norm()
        assert difference <= 1e-5 * torch.cat([single[k].flatten() for k in keys]).norm()


def test_encoder_steps_move_nothing_but_the_encoder(tmp_path: Path) -> None:
    def weights_after(images: int) -> dict[str, Tensor]:
        out = tmp_path / str(images)
        argv = [*SHORT, f"--train.images={images}", "--experimental.encoder_steps=2", "--experimental.encoder_steps_images=33"]
        assert train.main([*argv, "--optimizer.schedule=constant", "--out", str(out)]) == 0
        step = next((out / "checkpoints").glob("step-*"))
        state = load_file(step / "optimizer.safetensors")
        held = {"/".join(key.split("/")[1:-1]) for key in state}
        return {"": torch.tensor(len(held))} | load_file(step / "model.safetensors")

    config = TrainAutoencoderConfig(out="", model=TINY, data=DataConfig(resolution=16))
    start = build_module(config).state_dict()
    encoder = [name for name in start if name.startswith(("vae.encoder.", "vae.quant_conv."))]
    decoder = [name for name in start if name not in encoder]
    alone, full = weights_after(16), weights_after(24)
    assert all(torch.equal(alone[name], start[name]) for name in decoder)
    assert int(alone[""]) == len(encoder)
    assert not all(torch.equal(alone[name], start[name]) for name in encoder)
    assert not any(torch.equal(full[name], start[name]) for name in decoder)
    assert int(full[""]) == len(start)


def test_a_new_phase_goes_on_with_the_families_of_the_last(tmp_path: Path) -> None:
    def module(**chosen: object) -> Autoencoder:
        data = DataConfig(resolution=16)
        return build_module(TrainAutoencoderConfig(out="", model=TINY, data=data, experimental=small(**chosen)))

    first = tmp_path / "first"
    assert train.main([*SHORT, *CONFIGURED["mixture"], "--out", str(first)]) == 0
    for path, file, prefix in (
        (first, first / "vae" / "experimental.safetensors", ""),
        (checkpoint := next((first / "checkpoints").glob("step-*")), checkpoint / "ema.safetensors", "experimental."),
    ):
        again = module(prior="mixture")
        assert again.experimental is not None
        assert start_from(again, str(path)) is None
        saved = load_file(file)
        for key, value in again.experimental.state_dict().items():
            assert torch.equal(value, saved[prefix + key])
    for other in (module(prior="flow"), module(prior="mixture", components=4)):
        assert "they start anew" in str(start_from(other, str(first)))
    assert "they are left out" in str(start_from(module(), str(first)))


def test_a_flow_posterior_is_exported_reconstructed_and_refused_by_encode_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train.main([*SHORT, *FLOW, "--experimental.posterior=flow", "--optimizer.lr=1e-2", "--out", str(folder)]) == 0
    checkpoint = next((folder / "checkpoints").glob("step-*"))
    capsys.readouterr()
    assert export.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "exported")]) == 0
    assert "stock code decodes the Gaussian before the flow" in capsys.readouterr().out
    written, final = (load_file(f / "experimental.safetensors") for f in (tmp_path / "exported", folder / "vae"))
    assert all(torch.equal(written[key], final[key]) for key in final)

    vae = load(str(folder))
    family = open_family(vae, folder / "vae", torch.device("cpu"))
    assert family is not None
    base = DiagonalGaussian(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    assert not torch.equal(family.mode(base), base.mode())
    photo = tmp_path / "photo.png"
    Image.new("RGB", (24, 20), (200, 40, 90)).save(photo)
    assert reconstruct.main(["--model", str(folder), "--input", str(photo), "--out", str(tmp_path / "pictures")]) == 0

    capsys.readouterr()
    assert encode.main(["--model", str(folder), "--data.source", "demo", "--out", str(tmp_path / "latents")]) == 2
    said = capsys.readouterr().err
    assert "model: got" in said
    assert "its posterior is a flow" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--experimental.posterior=flow", "--objective.convention=ldm"], "experimental.posterior: got 'flow'"),
        (["--experimental.encoder_steps=1", "--experimental.encoder_steps_images=8", "--objective.convention=diffusers"], "encoder_steps"),
        (["--experimental.prior=flow", "--objective.kl.free_bits=1"], "objective.kl.free_bits: got 1.0"),
        (["--experimental.iwae_samples=0"], "experimental.iwae_samples: got 0"),
        (["--experimental.iwae_samples=2", "--objective.kl.weight=0.5"], "objective.kl.weight: got 0.5"),
        (["--experimental.iwae_samples=2", "--objective.kl.schedule=cyclical"], "objective.kl.schedule: got 'cyclical'"),
        (["--experimental.iwae_samples=2", "--objective.kl.control=target", "--objective.kl.target=5"], "kl.control: got 'target'"),
        (["--experimental.iwae_samples=2", "--objective.perceptual.name=ssim"], "objective.perceptual.name: got 'ssim'"),
        (["--experimental.encoder_steps=2"], "experimental.encoder_steps_images: got 0"),
        (["--experimental.encoder_steps_images=5"], "experimental.encoder_steps_images: got 5"),
        (["--experimental.posterior=flow", "--experimental.flow_couplings=3"], "flow_couplings: got 3; give an even number, 2 or more"),
        (["--experimental.flow_couplings=4"], "flow_couplings: got 4; leave it out unless posterior or prior is `flow`"),
        (["--experimental.flow_width=8", "--experimental.prior=mixture"], "flow_width: got 8; leave it out unless posterior or prior"),
        (["--experimental.components=8", "--experimental.prior=flow"], "components: got 8; leave it out unless prior is `mixture`"),
        (["--objective.kl.target=5"], "if it is meant, give objective.kl.control=target with it"),
        (["--objective.kl.rise=0.2"], "if it is meant, give objective.kl.schedule=cyclical with it"),
        (["--objective.kl.anneal_images=5"], "give objective.kl.schedule=linear or objective.kl.schedule=cosine with it"),
        (["--objective.ldm_logvar=1"], "if it is meant, give objective.convention=ldm with it"),
        (["--objective.likelihood.scale=pixel", "--objective.convention=ldm"], "or objective.convention=elbo"),
        (["--experimental.components=0"], "experimental.components: got 0"),
        (["--experimental.prior=gmm"], "experimental.prior: got 'gmm'"),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_message(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*SMALL, *argv, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
