"""Settings that have no effect beside another: refused where they were given with it, taken where it came later and switched them off."""

from pathlib import Path

import pytest

from autoencoder import train
from autoencoder.adversarial_config import AdversarialConfig
from autoencoder.config import TrainAutoencoderConfig
from autoencoder.data_config import DataConfig
from autoencoder.model import build
from autoencoder.model_config import ModelConfig
from autoencoder.objective_config import ObjectiveConfig
from autoencoder.runtime import cli
from autoencoder.runtime.cli import load_config
from autoencoder.runtime.config_file import plain, to_yaml
from autoencoder.training import introduction
from diffusion import train as train_diffusion
from tests.children import SMALL

WEIGHT = "objective.adversarial.weight"
HINGE, OFF = "--objective.adversarial.name=hinge", "--objective.adversarial.name=none"
FOLDER = Path(__file__).parent
WEIGHT_FILE = "objective: {adversarial: {weight: 0.3}}"


pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")


def printed(tmp_path: Path, argv: list[str], files: list[str]) -> int:
    """The exit code of `--print_config` with these arguments after these files' contents."""
    for number, content in enumerate(files):
        (tmp_path / f"{number}.yaml").write_text(content)
    given = [f"--config={tmp_path / f'{number}.yaml'}" for number in range(len(files))]
    try:
        return train.main([*given, *argv, "--out=run", "--print_config"])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize(
    ("argv", "files", "said"),
    [
        (["--model.pretrained=a/b", "--model.preset=tiny"], [], "model.preset: got 'tiny'; it would have no effect: model.pretrained=a/b"),
        (
            ["--model.pretrained=a/b", "--model.preset=tiny", "--model.attention=false"],
            [],
            "model.preset: got 'tiny'; it would have no effect (so would model.attention)",
        ),
        (["--config=finetune-decoder", "--model.preset=tiny"], [], "model.preset: got 'tiny'"),
        ([], ["model: {pretrained: a/b, preset: tiny}"], "0.yaml)"),
        ([f"--{WEIGHT}=0.1"], [], f"{WEIGHT}: got 0.1; it would have no effect: objective.adversarial.name is none"),
        ([f"--{WEIGHT}=0.3", OFF], [], WEIGHT),
        (["--config=kl-f8", OFF, f"--{WEIGHT}=0.3"], [], WEIGHT),
        ([], [WEIGHT_FILE], WEIGHT),
        ([], ["objective: {adversarial: {name: none}}", WEIGHT_FILE], WEIGHT),
        (["--objective.perceptual.weight=0.5"], [], "objective.perceptual.weight: got 0.5; it would have no effect"),
        (["--objective.equivariance.weight=0.5"], [], "objective.equivariance.weight: got 0.5; it would have no effect"),
        (["--objective.perceptual.own=a.B"], [], "objective.perceptual.own.class_path: got 'a.B'; it would have no effect"),
        (
            ["--optimizer.muon_lr=0.01", "--optimizer.muon_momentum=0.9"],
            [],
            "optimizer.muon_lr: got 0.01; it would have no effect (so would optimizer.muon_momentum): optimizer.name is adamw",
        ),
        ([HINGE, "--objective.adversarial.r1_every=4"], [], "objective.adversarial.r1_every: got 4; it would have no effect"),
        (
            ["--objective.likelihood.scale=fixed", "--objective.likelihood.decay=0.5"],
            [],
            "objective.likelihood.decay: got 0.5; it would have no effect: objective.likelihood.scale is fixed, which follows no",
        ),
        ([], ["objective: {likelihood: {scale: learned, decay: 0.5}}"], "objective.likelihood.decay: got 0.5"),
        (
            ["--objective.likelihood.scale=fixed", "--objective.likelihood.bounds=0.01,10"],
            [],
            "objective.likelihood.bounds: got [0.01, 10.0]; it would have no effect",
        ),
        ([f"--data.source={FOLDER}", "--data.label_column=kind"], [], "data.label_column: got 'kind'; it would have no effect"),
    ],
)
def test_what_is_given_beside_what_makes_it_idle_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], files: list[str], said: str
) -> None:
    assert printed(tmp_path, argv, files) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "files"),
    [
        (["--config=finetune-decoder"], []),
        (["--config=kl-f16", "--model.pretrained=a/b"], []),
        (["--model.pretrained=a/b", "--model.norm_groups=null"], []),
        (["--config=kl-f8", OFF], []),
        (["--config=ldm-kl-f8", OFF], []),
        ([OFF], [WEIGHT_FILE]),
        ([HINGE], [WEIGHT_FILE]),
        (["--model.pretrained=a/b", "--model.preset=null"], ["model: {preset: tiny}"]),
        (["--optimizer.name=adamw"], ["optimizer: {name: muon, muon_lr: 0.01}"]),
        (["--objective.adversarial.r1=0"], ["objective: {adversarial: {name: hinge, r1: 1, r1_every: 4}}"]),
        (["--objective.likelihood.scale=fixed"], ["objective: {likelihood: {decay: 0.5, bounds: [0.01, 10]}}"]),
        ([f"--data.source={FOLDER}"], ["data: {source: photos/*.parquet, label_column: kind}"]),
        (["--data.source=photos/*.parquet", "--data.label_column=kind"], []),
        ([], [WEIGHT_FILE, "objective: {adversarial: {name: none}}"]),
        (["--objective.perceptual.name=ssim"], ["objective: {perceptual: {name: own, own: a.B}}"]),
        (["--data.own=null", "--data.source=photos"], ["data: {own: a.B}"]),
        (["--data.source=demo", "--data.own=a.B"], ["data: {source: photos}"]),
    ],
)
def test_what_something_later_has_switched_off_is_taken(tmp_path: Path, argv: list[str], files: list[str]) -> None:
    assert printed(tmp_path, argv, files) == 0


def test_the_diffusion_stage_has_a_muon_too(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--latents=latents", "--out=run", "--print_config", "--optimizer.muon_lr=0.01"]
    assert train_diffusion.main(argv) == 2
    assert "optimizer.muon_lr: got 0.01; it would have no effect: optimizer.name is adamw" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        train_diffusion.main([*argv, "--optimizer.name=muon"])


def idle_config(out: Path) -> TrainAutoencoderConfig:
    return TrainAutoencoderConfig(
        out=str(out),
        data=DataConfig(source="demo", resolution=32),
        model=ModelConfig(preset="kl-f16", pretrained="a/b"),
        objective=ObjectiveConfig(adversarial=AdversarialConfig(weight=0.3, lr=1e-3)),
    )


def test_a_whole_configuration_is_a_record(tmp_path: Path) -> None:
    record = to_yaml(plain(idle_config(tmp_path)))
    assert printed(tmp_path, [], [record]) == 0
    assert plain(load_config(TrainAutoencoderConfig, tmp_path / "0.yaml")) == plain(idle_config(tmp_path))


def test_a_start_says_what_of_its_configuration_has_no_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = introduction(idle_config(tmp_path), (4, 2, 2), 8, "demo", 8)
    assert "objective.adversarial.name is none: weight, lr beside it have no effect" in told
    build(ModelConfig(preset="tiny"), channels=3, resolution=16).save_pretrained(tmp_path / "vae")
    (tmp_path / "tiny.yaml").write_text("model: {preset: tiny}")
    argv = [a for a in SMALL if not a.startswith("--model.")]
    argv += ["--train.images=8", f"--config={tmp_path / 'tiny.yaml'}", f"--model.pretrained={tmp_path / 'vae'}"]
    assert train.main([*argv, f"--out={tmp_path / 'run'}"]) == 0
    assert "model.preset=tiny has no effect: the network is that of" in capsys.readouterr().err


def test_a_start_says_that_its_discriminator_comes_too_late(tmp_path: Path) -> None:
    def said(*argv: str) -> str:
        late = ["--objective.adversarial.name=hinge", "--objective.adversarial.layers=1", "--objective.adversarial.warmup_images=5k", *argv]
        config = cli.parse(TrainAutoencoderConfig, [*SMALL, *late, f"--out={tmp_path}"], prog="x", description="x", stage="autoencoder")
        return introduction(config, (4, 4, 4), 1, "x", 1)

    assert "not before 45,000 images (two windows" in said("--train.images=45k")
    assert "note: the decoder hears no" not in said("--train.images=45001")
    assert "not before 5,007 images (start" in said("--objective.adversarial.start=7", "--train.images=5k")
