"""Whole fine-tunings: what is frozen stays to the bit, latents keep their space, and runs depend on their own folder alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from autoencoder import encode, evaluate, export, finetuning, reconstruct, train
from autoencoder.config import TrainAutoencoderConfig
from autoencoder.identity import ENCODER, encoder_hash
from autoencoder.latents.opened import open_latents
from autoencoder.model import Autoencoder, AutoencoderKL
from autoencoder.model_config import ModelConfig
from autoencoder.network_file import load_network_file
from autoencoder.pretrained import load, open_pretrained
from autoencoder.runtime.ema import Ema
from autoencoder.single_file import to_ldm
from tests.children import SMALL, run
from tests.test_training import assert_same_run

WEIGHTS = "diffusion_pytorch_model.safetensors"
TUNE = [a for a in SMALL if not a.startswith("--model.")] + ["--train.images=40"]
STAYS = (*ENCODER, "post_quant_conv.")
KEPT = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of others': no recipe beside it, latents with a scale and a shift of their own, weights that are -0."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        norm_num_groups=4, mid_block_add_attention=False, scaling_factor=0.1875, shift_factor=0.03125, latents_mean=[0.0, 0.1, 0.2, 0.3],
    )  # fmt: skip
    with torch.no_grad():
        vae.encoder.conv_in.bias.fill_(-0.0)
    folder = tmp_path_factory.mktemp("pretrained") / "vae"
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    argv = [*TUNE, f"--model.pretrained={pretrained}", "--model.train=decoder", "--optimizer.weight_decay=0.1", "--optimizer.name=muon"]
    assert run([*argv, "--train.gradient_checkpointing=true", "--out", str(folder)], output=folder.with_name("stderr")) == 0
    return folder


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def assert_stays(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], prefixes: tuple[str, ...]) -> None:
    """What is under these prefixes has the same bits; of the rest, nearly all has moved."""
    moved = {name: bits(value) != bits(after[name]) for name, value in before.items()}
    assert not [name for name, it_moved in moved.items() if it_moved and name.startswith(prefixes)]
    rest = [it_moved for name, it_moved in moved.items() if not name.startswith(prefixes)]
    assert sum(rest) > 0.9 * len(rest)


def test_a_frozen_encoder_stays_to_the_bit_in_weights_average_and_export(pretrained: Path, tuned: Path) -> None:
    before, after = load_file(pretrained / WEIGHTS), load_file(tuned / "vae" / WEIGHTS)
    step = tuned / "checkpoints" / "step-00000005"
    held = [load_file(step / name) for name in ("model.safetensors", "ema.safetensors")]
    for other in (after, *({name.removeprefix("vae."): value for name, value in h.items()} for h in held)):
        assert_stays(before, other, STAYS)
    optimised = {key.split("/")[1] for key in load_file(step / "optimizer.safetensors")}
    assert optimised == {f"vae.{name}" for name in before if not name.startswith(STAYS)}


def test_latents_keep_their_scale_and_their_identity(pretrained: Path, tuned: Path) -> None:
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (pretrained, tuned / "vae"))
    # `force_upcast` is of the activations, the decoder's among them, and audited anew.
    apart = ("_name_or_path", "force_upcast")
    assert {k: v for k, v in after.items() if k not in apart} == {k: v for k, v in before.items() if k not in apart}
    assert [after[key] for key in KEPT] == [0.1875, 0.03125, [0.0, 0.1, 0.2, 0.3], None]
    recipe = json.loads((tuned / "vae" / "preprocessing.json").read_text())
    source = open_pretrained(str(pretrained))
    assert recipe["encoder_hash"] == encoder_hash(source.vae, source.pixels)


def test_the_start_says_what_trains_and_what_stays(tuned: Path) -> None:
    said = tuned.with_name("stderr").read_text()
    assert "M trained, " in said
    assert "M frozen)" in said
    assert "scaling_factor 0.1875, shift_factor 0.03125" in said
    assert "the KL has no gradient" in said


def test_latents_of_the_original_decode_with_the_new_decoder(
    pretrained: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(pretrained), "--data.source", "demo", "--data.resolution", "16", "--data.workers", "0"]
    assert encode.main([*argv, "--batch_size", "8", "--out", str(tmp_path / "latents")]) == 0
    again = ["--latents", str(tmp_path / "latents"), "--model", str(tuned), "--out", str(tmp_path / "pictures")]
    assert reconstruct.main(again) == 0
    assert "the decoder has changed" in capsys.readouterr().err
    assert (tmp_path / "pictures" / "grid.png").is_file()
    manifest = open_latents(str(tmp_path / "latents"), "latents").manifest
    assert manifest["encoder_hash"] == json.loads((tuned / "vae" / "preprocessing.json").read_text())["encoder_hash"]


def test_a_killed_fine_tuning_goes_on_without_what_it_started_from(pretrained: Path, tmp_path: Path) -> None:
    moved = tmp_path / "vae"
    shutil.copytree(pretrained, moved)
    argv = [*TUNE, f"--model.pretrained={moved}", "--model.train=decoder", "--checkpoint.every_images=8"]
    assert run([*argv, "--out", str(tmp_path / "whole")]) == 0
    assert run([*argv, "--out", str(tmp_path / "run")], kill_at=3) < 0
    weights = tmp_path / "vae" / WEIGHTS
    weights.rename(tmp_path / "aside")
    # Others' weights, of the same shapes, in its place.
    save_file({k: torch.ones_like(v) for k, v in load_file(tmp_path / "aside").items()}, weights, metadata={"format": "pt"})
    assert run([*argv, "--out", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run", step=5)
    one, other = ((tmp_path / name / "vae" / WEIGHTS).read_bytes() for name in ("whole", "run"))
    assert one == other
    # Nor does the export of a checkpoint need it.
    shutil.rmtree(moved)
    step = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert export.main(["--checkpoint", str(step), "--out", str(tmp_path / "exported")]) == 0
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["scaling_factor"] == 0.1875


def test_encoder_only_leaves_the_decoder_and_measures_the_scale(pretrained: Path, tmp_path: Path) -> None:
    argv = [*TUNE, f"--init_from={pretrained}", "--model.preset=tiny", "--model.block_out_channels=[8, 8]", "--model.norm_groups=4"]
    assert run([*argv, "--model.train=encoder", "--out", str(tmp_path / "run")]) == 0
    before, after = load_file(pretrained / WEIGHTS), load_file(tmp_path / "run" / "vae" / WEIGHTS)
    assert_stays(before, after, ("decoder.", "post_quant_conv."))
    assert json.loads((tmp_path / "run" / "vae" / "config.json").read_text())["scaling_factor"] not in (0.1875, 1.0)


def test_a_single_file_tells_no_scale_and_is_asked_for_it(pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # GroupNorm has 32 groups in LDM's files: widths of 32.
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(32,), mid_block_add_attention=False)
    save_file({f"first_stage_model.{k}": v.contiguous() for k, v in to_ldm(vae).items()}, tmp_path / "sd.safetensors")
    argv = [*TUNE, "--train.images=8", f"--model.pretrained={tmp_path / 'sd.safetensors'}", "--model.train=decoder"]
    assert run([*argv, "--out", str(tmp_path / "run")], output=tmp_path / "stderr") == 2
    assert "model.scaling_factor: not given" in (tmp_path / "stderr").read_text()
    assert run([*argv, "--model.scaling_factor=0.18215", "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "vae" / "config.json").read_text())["scaling_factor"] == 0.18215
    assert torch.equal(load(str(tmp_path / "run")).encoder.conv_in.weight, vae.encoder.conv_in.weight)

    # The converter: a file to a folder and back to the same bytes of weights.
    given = ["--checkpoint", str(tmp_path / "sd.safetensors"), "--out", str(tmp_path / "folder")]
    assert export.main(given) == 0
    assert "does not tell it" in capsys.readouterr().out
    # What the file does not tell the folder and the file made of it do not tell either.
    opened = open_pretrained(str(tmp_path / "folder"))
    assert (opened.scale_known, opened.preprocessing) == (False, None)
    back = ["--checkpoint", str(tmp_path / "folder"), "--format", "ldm", "--out", str(tmp_path / "back.safetensors")]
    assert export.main(back) == 0
    assert not open_pretrained(str(tmp_path / "back.safetensors")).scale_known
    latents = ["--model", str(tmp_path / "folder"), "--data.source=demo", "--data.resolution=16", "--out", str(tmp_path / "latents")]
    assert encode.main([*latents, "--data.workers=0"]) == 0
    assert not open_pretrained(str(tmp_path / "latents" / "vae")).scale_known
    capsys.readouterr()
    argv = [*TUNE, f"--model.pretrained={tmp_path / 'folder'}", "--model.train=decoder", "--out", str(tmp_path / "again")]
    assert train.main(argv) == 2
    assert "model.scaling_factor: not given" in capsys.readouterr().err
    told = ["--checkpoint", str(tmp_path / "folder"), "--scaling_factor=0.18215", "--out", str(tmp_path / "told")]
    assert export.main(told) == 0
    assert open_pretrained(str(tmp_path / "told")).scale_known
    first, last = load_file(tmp_path / "sd.safetensors"), load_file(tmp_path / "back.safetensors")
    assert all(bits(value) == bits(last[name.removeprefix("first_stage_model.")]) for name, value in first.items())


def test_a_run_goes_out_as_one_file_and_comes_back_whole(tuned: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    assert export.main(["--checkpoint", str(tuned), "--format", "ldm", "--out", str(file)]) == 0
    assert export.main(["--checkpoint", str(file), "--out", str(tmp_path / "back")]) == 0
    for name in (WEIGHTS, "config.json", "preprocessing.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tuned / "vae" / name).read_bytes(), name
    out = tmp_path / "evaluation.json"
    argv = ["--model", str(file), "--data.source", "demo", "--batch_size", "8", "--out", str(out)]
    assert evaluate.main(argv) == 0
    own = json.loads((tuned / "evaluation.json").read_text())
    assert json.loads(out.read_text())["provenance"]["encoder_hash"] == own["provenance"]["encoder_hash"]


def test_a_checkpoint_is_measured_with_its_own_likelihood(tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation.json"
    assert evaluate.main(["--model", str(tuned / "checkpoints" / "step-00000005"), "--data.source", "demo", "--out", str(out)]) == 0
    assert "nll_nats" in json.loads(out.read_text())["metrics"]


def test_widened_by_configuration(pretrained: Path, tmp_path: Path) -> None:
    output = tmp_path / "stderr"
    argv = [*TUNE, "--train.images=8", f"--model.pretrained={pretrained}", "--model.latent_channels=6", "--data.channels=1"]
    assert run([*argv, "--out", str(tmp_path / "run")], output=output) == 0
    assert "widened from 4 to 6 latent channels" in output.read_text()
    assert "grey from RGB" in output.read_text()
    config = json.loads((tmp_path / "run" / "vae" / "config.json").read_text())
    assert [config[key] for key in ("latent_channels", "in_channels", "out_channels", "latents_mean")] == [6, 1, 1, None]


TRAIN_DECODER = ["--model.pretrained=VAE", "--model.train=decoder"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model.train=decoder"], "give model.pretrained or init_from"),
        (
            [*TRAIN_DECODER, "--objective.kl.control=target", "--objective.kl.target=9"],
            "objective.kl.control: got 'target'",
        ),
        ([*TRAIN_DECODER, "--objective.kl.control=geco", "--objective.kl.target_rmse=1"], "objective.kl.control: got 'geco'"),
        ([*TRAIN_DECODER, "--objective.kl.schedule=linear", "--objective.kl.anneal_images=9"], "objective.kl.schedule: got 'linear'"),
        ([*TRAIN_DECODER, "--objective.kl.free_bits=1"], "objective.kl.free_bits"),
        ([*TRAIN_DECODER, "--experimental.posterior=flow"], "experimental.posterior"),
        ([*TRAIN_DECODER, "--model.latent_channels=2"], "model.latent_channels: got 2; another number takes both halves"),
        ([*TRAIN_DECODER, "--model.norm_groups=8"], "model.norm_groups: got 8; it would have no effect"),
        (["--model.pretrained=VAE", "--model.scaling_factor=1"], "model.scaling_factor: got 1.0; leave it out"),
        (["--model.pretrained=VAE", "--model.train=encoder", "--objective.likelihood.scale=pixel"], "objective.likelihood.scale"),
        (["--model.variant=fp16"], "give model.pretrained with it"),
        (["--model.pretrained=VAE", "--model.variant=fp16"], "model.variant: got 'fp16'; variants in"),
    ],
)
def test_what_has_no_meaning_with_a_frozen_half_is_refused(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    given = [a.replace("VAE", str(pretrained)) for a in argv]
    assert train.main([*TUNE, *given, "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"--model.scaling_factor": "0.5"}, "tells its own, 0.1875"),
        ({"--data.channels": "1"}, "keeps the network for 3"),
    ],
)
def test_what_the_pretrained_network_contradicts_is_refused(pretrained: Path, tmp_path: Path, given: dict[str, Any], said: str) -> None:
    argv = [f"{key}={value}" for key, value in given.items()]
    code = run([*TUNE, f"--model.pretrained={pretrained}", "--model.train=decoder", *argv, "--out", str(tmp_path / "run")],
               output=tmp_path / "stderr")  # fmt: skip
    assert code == 2
    assert said in (tmp_path / "stderr").read_text()


def test_the_average_of_a_frozen_parameter_is_not_touched() -> None:
    module = torch.nn.Linear(2, 2)
    with torch.no_grad():
        module.weight.fill_(-0.0)
    module.weight.requires_grad_(False)
    ema = Ema(module, halflife=10, rampup=1.0)
    with torch.no_grad():
        module.bias.add_(1.0)
    before = ema.module.bias.clone()
    ema.update(100, 8, torch.zeros(()))
    assert torch.equal(ema.module.weight.signbit(), torch.ones(2, 2, dtype=torch.bool))
    assert not torch.equal(ema.module.bias, before)


def test_only_weights_that_came_from_the_hub_are_a_cards_base_model(tuned: Path, tmp_path: Path) -> None:
    """Not a folder whose relative name reads like a repository's, exported from another working directory."""
    run, bases = tmp_path / "run", []
    shutil.copytree(tuned, run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["pretrained"] = "runs/vae"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    kept = json.loads((run / "network.json").read_text())
    for n, hub in enumerate((kept["hub"], "owner/vae")):
        (run / "network.json").write_text(json.dumps(kept | {"hub": hub}))
        assert export.main(["--checkpoint", str(run), "--out", str(tmp_path / f"out{n}")]) == 0
        bases.append(ModelCard.load(tmp_path / f"out{n}" / "README.md").data.base_model)
    assert bases == [None, "owner/vae"]


def test_a_start_from_the_hub_is_recorded(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pretrained, tmp_path / "runs" / "vae")
    module, found = Autoencoder(load(str(pretrained))), finetuning.Origin()
    for source, hub in (("runs/vae", None), ("owner/vae", "owner/vae")):
        config = TrainAutoencoderConfig(model=ModelConfig(pretrained=source), out="run")
        finetuning.record(config, module, found, tmp_path)
        assert load_network_file(tmp_path).hub == hub  # type: ignore[union-attr]
