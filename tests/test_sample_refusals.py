"""What `sample` refuses: pipelines, folders and settings that cannot be, each by one message."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoencoder.runtime.errors import ConfigError
from diffusion import sample
from diffusion.pipeline_path import check_pipeline, pipeline_folder
from tests.pipelines import SIDE, edit, parts, write_ungated

from diffusers import DDIMScheduler, EulerDiscreteScheduler  # isort: skip  (after ours: model.py)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, as far as this command looks at one: six classes, colour."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text("out: here\n")
    write_ungated(parts(), folder / "pipeline")
    return folder


def draw(pipeline: Path, out: Path, *more: str) -> int:
    return sample.main(["--pipeline", str(pipeline), "--out", str(out), *more])


def replace(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text) and None


def without(*files: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return change


def swap_scheduler(scheduler: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        scheduler.save_pretrained(folder / "scheduler")
        edit("model_index.json", scheduler=["diffusers", type(scheduler).__name__])(folder)

    return change


BEFORE_TORCH = [
    (without("transformer/config.json"), "transformer/config.json is missing"),
    (without("transformer/diffusion_pytorch_model.safetensors"), "transformer/diffusion_pytorch_model*.safetensors is missing"),
    (without("vae/config.json"), "vae/config.json is missing"),
    (without("vae/diffusion_pytorch_model.safetensors"), "vae/diffusion_pytorch_model*.safetensors is missing"),
    (without("scheduler/scheduler_config.json"), "scheduler/scheduler_config.json is missing"),
    (without("vae/config.json", "vae/diffusion_pytorch_model.safetensors"), "vae/config.json and vae/diffusion_pytorch_model*"),
    (without("model_index.json"), "no model_index.json in it"),
    (replace("model_index.json", "{"), "its model_index.json cannot be read"),
    (replace("model_index.json", "[]"), "its model_index.json cannot be read"),
    (replace("model_index.json", "{}"), "its model_index.json cannot be read"),
    (edit("model_index.json", _class_name="StableDiffusionPipeline"), "holds a StableDiffusionPipeline; give a DiTPipeline"),
]
IN_TORCH = [
    (replace("vae/diffusion_pytorch_model.safetensors", "no weights"), "cannot be loaded as a DiTPipeline"),
    (replace("transformer/config.json", "{"), "cannot be loaded as a DiTPipeline"),
    (edit("transformer/config.json", num_attention_heads=4), "cannot be loaded as a DiTPipeline"),
    (edit("model_index.json", id2label={"zero": "heron"}), "cannot be loaded as a DiTPipeline"),
    (swap_scheduler(DDIMScheduler()), "its scheduler (DDIMScheduler) clips what it predicts"),
    (swap_scheduler(EulerDiscreteScheduler(prediction_type="sample")), "its scheduler (EulerDiscreteScheduler) predicts sample"),
]


@pytest.mark.parametrize(("change", "said", "early"), [(*case, True) for case in BEFORE_TORCH] + [(*case, False) for case in IN_TORCH])
def test_a_pipeline_that_cannot_be_used_ends_with_2_and_one_message(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None], said: str, early: bool,
) -> None:  # fmt: skip
    shutil.copytree(run / "pipeline", tmp_path / "pipeline")
    change(tmp_path / "pipeline")
    if early:
        # Nothing that needs torch may be asked for.
        monkeypatch.setitem(sys.modules, "diffusion.drawing", None)
    assert draw(tmp_path / "pipeline", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: pipeline: ")
    assert said in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_network_that_predicts_a_variance_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusion.denoiser import DiTTransformer2DModel

    pipeline = write_ungated(parts(), tmp_path / "pipeline")
    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "in_channels": 4, "sample_size": SIDE // 2}
    DiTTransformer2DModel(**shape, out_channels=8).save_pretrained(pipeline / "transformer")
    assert draw(pipeline, tmp_path / "out") == 2
    assert "its network predicts a variance, too" in capsys.readouterr().err


def test_paths_that_name_no_pipeline(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert pipeline_folder(str(run)) == pipeline_folder(str(run / "pipeline")) == run / "pipeline"
    check_pipeline(str(run), "pipeline")
    # What could be a hub id is asked of the hub.
    assert pipeline_folder("owner/a-name.v2") is None
    check_pipeline("owner/a-name.v2", "pipeline")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text("out: here\n")
    (tmp_path / "unfinished" / "latents.json").write_text("{}")
    (tmp_path / "autoencoder").mkdir()
    (tmp_path / "autoencoder" / "config.yaml").write_text("out: here\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    wrong = {
        str(tmp_path / "unfinished"): "this run has no pipeline/ yet: let it finish",
        str(tmp_path / "autoencoder"): "a run of the autoencoder, and pipelines come from train_diffusion",
        str(tmp_path / "empty"): "no model_index.json in it",
        str(tmp_path / "file"): "no such folder",
        str(tmp_path / "nowhere"): "no such folder",
        "nowhere": "no such folder",
        "a/b/c": "no such folder",
        # A folder of the working directory that has no such folder in it is a slip, not a hub id.
        "empty/nowhere": "no such folder",
    }
    for path, said in wrong.items():
        with pytest.raises(ConfigError, match=f"pipeline: got {re.escape(repr(path))}; {re.escape(said)}"):
            check_pipeline(path, "pipeline")


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda out: out.write_text(""), "that is a file; give a folder"),
        (lambda out: (out.mkdir(), (out / "photo.png").write_bytes(b"")), "holds PNGs and no samples.json"),
        (lambda out: (out.mkdir(), (out / "samples.json").write_text("{")), "its samples.json is damaged"),
        (lambda out: (out.mkdir(), (out / "samples.json").write_text("[]")), "its samples.json is damaged"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Callable[[Path], Any], said: str
) -> None:
    out = tmp_path / "out"
    prepare(out)
    assert draw(run, out) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: out: got '{out}'; ")
    assert said in message


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--images", "0"], "images: got 0; give at least 1"),
        (["--batch_size", "0"], "batch_size: got 0"),
        (["--guidance", "0.5"], "guidance: got 0.5; give 1 (none) or more"),
        (["--seed", "-1"], "seed: got -1"),
        (["--classes", "[]"], "classes: got []"),
        (["--sampler", "ddpm"], "sampler: got 'ddpm'; give `euler`, `heun`, `dpm++` or `ddim`"),
        (["--sampler", "ddim"], "sampler: got 'ddim'; DDIM is for variance-preserving processes; give euler"),
        (["--guidance_interval", "[0.6, 0.2]"], "guidance_interval: got [0.6, 0.2]; give [low, high] with 0 <= low < high <= 1"),
        (["--guidance_interval", "[0.2, 0.6]", "--guidance", "1"], "guidance is 1, so nothing is guided"),
        (["--time_shift", "0"], "time_shift: got 0.0; give a shift above 0"),
    ],
)
def test_wrong_settings_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    assert draw(run, tmp_path / "out", *argv) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_pipeline_is_checked_without_torch(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code = (
        "import sys\nfrom diffusion import sample\n"
        "code = sample.main(['--pipeline', sys.argv[1], '--out', sys.argv[2]])\n"
        "print(code, sorted({'torch', 'numpy', 'diffusers', 'PIL'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "empty"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "2 []\n", done.stderr
