"""What comes out: folders that stock diffusers loads, LDM's names, hashes, the commands that read and write them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file

from autoencoder import artifact, evaluate, export, reconstruct
from autoencoder.identity import decoder_hash, encoder_hash
from autoencoder.model import AutoencoderKL, build, decode, encode
from autoencoder.model_config import ModelConfig
from autoencoder.pretrained import load
from autoencoder.single_file import to_ldm
from tests.children import SMALL, run

# Our packages are shut out first, whether installed or not. The mending of torchvision is what any user of diffusers needs
# beside a CPU build of torch where a CUDA build of torchvision is installed.
STOCK = """
import sys
sys.modules["autoencoder"] = sys.modules["diffusion"] = None
try:
    import torchvision
except (ImportError, RuntimeError):
    import torch
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
try:
    import autoencoder
except ImportError:
    pass
else:
    raise SystemExit("our package can be imported")
vae = AutoencoderKL.from_pretrained(sys.argv[1])
images = load_file(sys.argv[2])["images"]
with torch.no_grad():
    posterior = vae.encode(images).latent_dist
    reconstruction = vae.decode(posterior.mode()).sample
    made = {"mean": posterior.mean, "logvar": posterior.logvar, "reconstruction": reconstruction}
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run([*SMALL, "--train.images=40", "--objective.likelihood.name=discretized_logistic", "--out", str(folder)]) == 0
    return folder


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def test_stock_diffusers_loads_and_reconstructs_alike(trained: Path, tmp_path: Path) -> None:
    save_file({"images": images()}, tmp_path / "in.safetensors")
    command = [sys.executable, "-I", "-c", STOCK, str(trained / "vae"), str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    stock = load_file(tmp_path / "out.safetensors")
    vae = load(str(trained))
    posterior = encode(vae, images())
    torch.testing.assert_close(posterior.mean, stock["mean"], atol=1e-5, rtol=0)
    torch.testing.assert_close(posterior.logvar, stock["logvar"], atol=1e-5, rtol=0)
    torch.testing.assert_close(decode(vae, posterior.mode()), stock["reconstruction"], atol=1e-5, rtol=0)


def test_ldm_names_go_back_through_diffusers_own_conversion() -> None:
    vae = build(ModelConfig(preset="tiny", attention=True), channels=3, resolution=32)
    named = to_ldm(vae)
    assert {"encoder.down.0.block.0.conv1.weight", "decoder.mid.attn_1.q.weight", "decoder.up.0.block.1.norm2.bias"} <= named.keys()
    back = convert_ldm_vae_checkpoint({f"first_stage_model.{k}": v for k, v in named.items()}, dict(vae.config))
    assert back.keys() == vae.state_dict().keys()
    assert all(torch.equal(back[k].reshape(v.shape), v) for k, v in vae.state_dict().items())


def test_attention_in_the_lowest_level_has_ldms_names_and_shapes() -> None:
    # diffusers' conversion knows attention in the middle block alone.
    vae = build(ModelConfig(preset="kl-f16", block_out_channels=(32,) * 5, layers_per_block=1), channels=3, resolution=32)
    named = to_ldm(vae)
    for name in ("encoder.down.4.attn.0.q", "decoder.up.4.attn.1.proj_out"):
        assert named[f"{name}.weight"].shape == (32, 32, 1, 1)
    assert {"encoder.down.4.attn.0.norm.weight", "decoder.up.4.attn.0.norm.bias"} <= named.keys()
    assert len(named) == len(vae.state_dict())


def test_export_of_a_checkpoint_is_the_runs_average(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = trained / "checkpoints" / "step-00000005"
    assert export.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "vae")]) == 0
    assert "scaling_factor stays 1: the latents of a checkpoint have not been measured" in capsys.readouterr().out
    exported, average = AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict(), load_file(checkpoint / "ema.safetensors")
    assert all(torch.equal(v, average[f"vae.{k}"]) for k, v in exported.items())
    likelihood = artifact.load_likelihood(tmp_path / "vae")
    assert likelihood is not None
    assert (likelihood.name, likelihood.levels) == ("discretized_logistic", 256)
    assert float(likelihood.scale) == pytest.approx(float(load_file(checkpoint / "controllers.safetensors")["scale"]))


@pytest.mark.parametrize(("dtype", "expected"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_export_writes_the_precision_that_was_asked_for(trained: Path, tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    assert export.main(["--checkpoint", str(trained), "--out", str(tmp_path / "vae"), "--dtype", dtype]) == 0
    weights = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    source = load_file(trained / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(v, source[k].to(expected)) for k, v in weights.items())
    recipe = json.loads((tmp_path / "vae" / "preprocessing.json").read_text())
    assert recipe["encoder_hash"] == json.loads((trained / "vae" / "preprocessing.json").read_text())["encoder_hash"]


def test_export_writes_one_ldm_file(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main(["--checkpoint", str(trained), "--format", "ldm", "--out", str(tmp_path / "vae.safetensors")]) == 0
    assert "scaling_factor" not in capsys.readouterr().out
    assert load_file(tmp_path / "vae.safetensors").keys() == to_ldm(load(str(trained))).keys()


def test_the_encoders_hash_knows_encoder_and_recipe_alone() -> None:
    vae = build(ModelConfig(preset="tiny"), channels=3, resolution=32)
    recipe = {"range": [-1.0, 1.0], "levels": 256, "channels": 3}
    before, decoder_before = encoder_hash(vae, recipe), decoder_hash(vae)
    assert encoder_hash(vae, {**recipe, "levels": 65536}) != before
    with torch.no_grad():
        vae.decoder.conv_in.bias[0] += 1
    assert encoder_hash(vae, recipe) == before
    assert decoder_hash(vae) != decoder_before
    with torch.no_grad():
        vae.quant_conv.bias[0] += 1
    assert encoder_hash(vae, recipe) != before


def test_the_latents_scale_factor_is_one_over_their_deviation(trained: Path) -> None:
    config = json.loads((trained / "vae" / "config.json").read_text())
    assert config["scaling_factor"] != 1.0
    latent_std = json.loads((trained / "evaluation.json").read_text())["latent_std"]
    # Measured on training crops, compared with held-out ones.
    assert config["scaling_factor"] == pytest.approx(1 / latent_std, rel=0.3)


def test_evaluate_repeats_the_runs_own_figures(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = json.loads((trained / "evaluation.json").read_text())
    for name, arguments in {
        "run": ["--model", str(trained)],
        "folder": ["--model", str(trained / "vae"), "--data.source", "demo", "--batch_size", "8"],
    }.items():
        out = tmp_path / f"{name}.json"
        assert evaluate.main([*arguments, "--out", str(out)]) == 0
        report = json.loads(out.read_text())
        for metric, value in own["metrics"].items():
            assert report["metrics"][metric]["mean"] == pytest.approx(value["mean"], rel=1e-5), metric
        assert report["provenance"]["encoder_hash"] == own["provenance"]["encoder_hash"]
    assert "bits_per_dim" in report["metrics"]
    assert report["metrics"]["psnr_db"]["low"] <= report["metrics"]["psnr_db"]["mean"] <= report["metrics"]["psnr_db"]["high"]
    assert "psnr_db" in capsys.readouterr().out


def test_evaluate_takes_an_autoencoder_that_is_not_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoencoderKL(block_out_channels=(32,), sample_size=16, use_quant_conv=False, use_post_quant_conv=False).save_pretrained(
        tmp_path / "vae"
    )
    out = tmp_path / "out.json"
    argv = [
        "--model",
        str(tmp_path / "vae"),
        "--data.source",
        "demo",
        "--data.resolution",
        "16",
        "--lpips",
        "vgg",
        "--lpips_weights",
        "random",
    ]
    assert evaluate.main([*argv, "--out", str(out)]) == 0
    assert "NLL and ELBO left out" in capsys.readouterr().out
    metrics = json.loads(out.read_text())["metrics"]
    assert {"kl_nats", "psnr_db", "ssim", "lpips"} <= metrics.keys()
    assert "nll_nats" not in metrics
    assert metrics["psnr_db"]["spread"] > 0
    argv = [*argv[:6], "--data.images", "1", "--likelihood.name", "laplace", "--likelihood.scale", "0.2", "--out", str(out)]
    assert evaluate.main(argv) == 0
    alone = json.loads(out.read_text(), parse_constant=pytest.fail)["metrics"]["nll_nats"]
    assert alone["mean"] is not None
    assert (alone["spread"], alone["low"]) == (None, None)


def test_reconstruct_takes_images_of_any_size(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in" / "deeper"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (37, 23, 3), dtype=np.uint8)).save(folder / "odd.png")
    Image.fromarray(rng.integers(0, 256, (80, 90), dtype=np.uint8)).save(tmp_path / "in" / "grey.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    argv = ["--model", str(trained), "--input", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--tile", "64"]
    assert reconstruct.main(argv) == 0
    with Image.open(tmp_path / "out" / "deeper" / "odd.png") as picture:
        assert picture.height == 37
        assert picture.width >= 46
        np.testing.assert_array_equal(np.asarray(picture)[:, :23], np.asarray(Image.open(folder / "odd.png")))
    assert (tmp_path / "out" / "grey.png").exists()
    assert not (tmp_path / "out" / "broken.png").exists()


@pytest.mark.parametrize(
    ("command", "argv", "said"),
    [
        (evaluate.main, ["--model", "MISSING"], "model: got"),
        (evaluate.main, ["--model", "RUN/vae"], "data.source"),
        (reconstruct.main, ["--model", "MISSING", "--input", "EMPTY", "--out", "OUT"], "model: got"),
        (evaluate.main, ["--model", "EMPTY", "--data.source", "demo"], "config.json"),
        (evaluate.main, ["--model", "RUN", "--data.source", "/no/such/folder"], "data.source"),
        (evaluate.main, ["--model", "RUN", "--data.resolution", "17"], "data.resolution: got 17; give a multiple of 2"),
        (evaluate.main, ["--model", "RUN", "--out", "/no/such/folder/out.json"], "does not exist"),
        (evaluate.main, ["--model", "RUN", "--lpips", "vgg", "--lpips_weights", "/no/such/file.pth"], "lpips_weights"),
        (evaluate.main, ["--model", "RUN", "--likelihood.name", "laplace"], "likelihood.scale"),
        (reconstruct.main, ["--model", "RUN", "--input", "/no/such/image.png", "--out", "OUT"], "input"),
        (reconstruct.main, ["--model", "RUN", "--input", "EMPTY", "--out", "OUT"], "holds no image"),
        (reconstruct.main, ["--model", "RUN", "--out", "OUT"], "input: not given"),
        (export.main, ["--checkpoint", "/no/such/folder", "--out", "OUT"], "checkpoint"),
        (export.main, ["--checkpoint", "EMPTY", "--out", "OUT"], "config.json"),
        (export.main, ["--checkpoint", "RUN", "--out", "RUN"], "out: got"),
        (export.main, ["--checkpoint", "RUN", "--out", "OUT", "--format", "ldm"], ".safetensors"),
        (export.main, ["--checkpoint", "RUN", "--out", "OUT", "--dtype", "fp8"], "dtype: got 'fp8'"),
    ],
)
def test_bad_input_ends_with_2_and_one_message(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: object, argv: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "OUT": str(tmp_path / "out"), "MISSING": str(tmp_path / "no")}
    assert command([a.replace("RUN", str(trained)) if a.startswith("RUN") else places.get(a, a) for a in argv]) == 2  # type: ignore[operator]
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert said in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()
