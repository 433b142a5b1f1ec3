"""What `train_diffusion` refuses: latents that cannot be trained on, and weights that do not fit."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from autoencoder.data.order import sample_index
from autoencoder.latents.reader import Latents
from diffusion.data import hold_out
from diffusion.space import of_latents
from tests.diffusion_children import begin, refusal
from tests.small_latents import Data, rewrite, sign, write_data, write_latents


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def begun(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after a checkpoint."""
    return begin(data.latents, tmp_path_factory.mktemp("begun") / "run")


def numbers(rows: int, shape: tuple[int, int, int] = (4, 8, 8)) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, *shape), dtype=np.float32)


# Latents that cannot be trained on: each function damages a copy, or writes a data set, and says what is refused.


def mixed_shapes(data: Data, folder: Path) -> str:
    shutil.copytree(data.latents, folder)
    rewrite(folder, 1, **{name: numbers(28, (4, 4, 4)) for name in ("mean", "logvar")})
    return "rows of shapes (4, 8, 8), (4, 4, 4); a pipeline has one: give data.side, or encode to one"


def without_means(data: Data, folder: Path) -> str:
    shutil.copytree(data.latents, folder)
    file = folder / "data-00001.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"mean"', b'"maen"'))
    return "data-00001.safetensors: mean: no such tensor"


def too_short(data: Data, folder: Path) -> str:
    shutil.copytree(data.latents, folder)
    file = folder / "data-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "data-00001.safetensors"


def fewer_rows_than_a_batch(data: Data, folder: Path) -> str:
    write_latents(folder, data.vae, numbers(6))
    return "train.batch_size: got 8; the latents have 6 rows, 5 of them to train on, less than a batch; give at most 5"


def one_row(data: Data, folder: Path) -> str:
    write_latents(folder, data.vae, numbers(1))
    return "the latents have 1 rows, 0 of them to train on, less than a batch; encode more images"


def a_class_outside_the_table(data: Data, folder: Path) -> str:
    shutil.copytree(data.latents, folder)
    label = load_file(folder / "data-00001.safetensors")["label"]
    label[5] = 2
    rewrite(folder, 1, label=label)
    return "data-00001.safetensors: row 5 has label 2, but the table has 2 classes"


def a_class_below_none(data: Data, folder: Path) -> str:
    write_latents(folder, data.vae, numbers(20), label=np.arange(20) - 2)
    return "row 0 has label -2, but labels are -1 (none) or more"


def a_table_of_1001(data: Data, folder: Path) -> str:
    write_latents(folder, data.vae, numbers(20), label=np.arange(20), labels=[f"class {i}" for i in range(1001)])
    return "latents: got '1001 classes'; a stock DiT pipeline holds 1000 at most"


def numbers_up_to_1000(data: Data, folder: Path) -> str:
    write_latents(folder, data.vae, numbers(20), label=np.arange(20) + 981)
    return "latents: got '1001 classes'; a stock DiT pipeline holds 1000 at most"


def numbers_that_are_no_classes(data: Data, folder: Path) -> str:
    write_latents(folder, data.vae, numbers(20), label=np.arange(20) + 2**62)
    return f"latents: got '{2**62 + 20} classes'; a stock DiT pipeline holds 1000 at most"


def an_edited_manifest(data: Data, folder: Path) -> str:
    shutil.copytree(data.latents, folder)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"cat"', '"cow"'))
    return "manifest.json: edited since it was written"


def no_manifest(data: Data, folder: Path) -> str:
    shutil.copytree(data.latents, folder)
    (folder / "manifest.json").unlink()
    return "these latents are not finished; run the same encode_dataset command again"


def no_folder(data: Data, folder: Path) -> str:
    return f"latents: got {str(folder)!r}; no such folder"


def photos(data: Data, folder: Path) -> str:
    shutil.copytree(data.photos, folder)
    return "no manifest.json in it, so no latents"


def not_square(data: Data, folder: Path) -> str:
    write_latents(folder, data.vae, numbers(20, (4, 8, 4)))
    return "latents: got '8 x 4'; DiT's stock pipeline takes square latents only"


def a_side_of_seven(data: Data, folder: Path) -> str:
    write_latents(folder, data.vae, numbers(20, (4, 7, 7)))
    return "denoiser.patch_size: got 2; give a divisor of 7, the latents' side"


def a_channel_that_never_varies(data: Data, folder: Path) -> str:
    shutil.copytree(data.latents, folder)
    sign(folder, statistics={"mean": [0.0] * 4, "std": [1.0, 1.0, 0.0, 1.0]})
    return "latent channel 2 never varies"


def no_vae(data: Data, folder: Path) -> str:
    shutil.copytree(data.latents, folder)
    shutil.rmtree(folder / "vae")
    return "no vae/ in it; give the autoencoder that made them as --vae"


def no_weights(data: Data, folder: Path) -> str:
    shutil.copytree(data.latents, folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    return f"{folder / 'vae'}: cannot be loaded as an AutoencoderKL"


def a_row_that_is_not_finite(data: Data, folder: Path) -> str:
    # Of the rows that are trained on the one that comes first.
    shutil.copytree(data.latents, folder)
    rows = hold_out(Latents(folder), 512)[0]
    row = int(rows[sample_index(0, len(rows), 0)])
    shard, local = divmod(row, 32)
    mean = load_file(folder / f"data-{shard:05d}.safetensors")["mean"]
    mean[local, 1, 2, 3] = np.nan
    rewrite(folder, shard, mean=mean)
    return f"data-{shard:05d}.safetensors: mean of row {local} is not finite; "


@pytest.mark.parametrize(
    "make",
    [
        mixed_shapes, without_means, too_short, fewer_rows_than_a_batch, one_row, a_class_outside_the_table, a_class_below_none,
        a_table_of_1001, numbers_up_to_1000, numbers_that_are_no_classes, an_edited_manifest, no_manifest, no_folder, photos, not_square,
        a_side_of_seven, a_channel_that_never_varies, no_vae, no_weights, a_row_that_is_not_finite,
    ],
)  # fmt: skip
def test_latents_that_cannot_be_trained_on(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Data, Path], str]
) -> None:
    said = make(data, tmp_path / "latents")
    assert refusal(capsys, ["--latents", str(tmp_path / "latents"), "--out", str(tmp_path / "run")]).count(said) == 1


def test_a_row_that_a_worker_reads_is_refused_alike(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = a_row_that_is_not_finite(data, tmp_path / "latents")
    assert said in refusal(capsys, ["--latents", str(tmp_path / "latents"), "--out", str(tmp_path / "run"), "--data.workers=1"])


def test_without_classes_any_number_of_them_will_do(data: Data, tmp_path: Path) -> None:
    numbers_that_are_no_classes(data, tmp_path / "latents")
    assert of_latents(Latents(tmp_path / "latents"), conditional=False).classes == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("vae", "no checkpoint in it"),
        ("nowhere", "no such folder"),
        ("run/checkpoints/step-00000003", "dit.pos_embed.proj.bias of shape (32,), this network (48,); give weights of the same network"),
        ("autoencoder", "latents.json, so no diffusion run"),
        ("torn", "ema.safetensors cannot be read"),
    ],
)
def test_weights_that_do_not_fit(
    data: Data, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, said: str
) -> None:
    shutil.copytree(data.vae, tmp_path / "vae")
    for name in ("run", "autoencoder", "torn"):
        shutil.copytree(begun, tmp_path / name)
    (tmp_path / "autoencoder" / "latents.json").unlink()
    file = tmp_path / "torn" / "checkpoints" / "step-00000006" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    argv = ["--latents", str(data.latents), "--init_from", str(tmp_path / given), "--out", str(tmp_path / "out"), "--denoiser.heads=3"]
    message = refusal(capsys, argv)
    assert message.startswith("error: init_from: ")
    assert said in message


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--process.name=vp"], "(flow, velocity) than this run's (vp of the linear table, v)"),
        (
            ["--process.name=vp", "--process.prediction=epsilon", "--process.schedule=scaled_linear"],
            "(vp of the scaled_linear table, epsilon)",
        ),
    ],
)
def test_weights_of_another_process(
    data: Data, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    message = refusal(capsys, ["--latents", str(data.latents), "--init_from", str(begun), "--out", str(tmp_path / "out"), *given])
    assert message.startswith(f"error: init_from: got '{begun}'; its network gives something else ")
    assert said in message
    assert "give the same process.name, process.prediction and process.schedule, or another run" in message


def test_weights_whose_process_is_not_told(data: Data, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(begun, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("process: 3")
    argv = ["--latents", str(data.latents), "--init_from", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    message = refusal(capsys, argv)
    assert message.startswith("error: init_from: ")
    assert "config.yaml does not tell its process" in message


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--process.schedule=scaled_linear"], "process.schedule: got 'scaled_linear'; it would have no effect: process.name is flow"),
        (["--process.times=uniform", "--process.t_mean=1"], "process.t_mean: got 1.0; it would have no effect: process.times is uniform"),
        (["--process.min_snr_gamma=3"], "process.min_snr_gamma: got 3.0; it would have no effect: process.weight is unit"),
        (["--process.log_snr=[-5, 5]"], "process.log_snr: got (-5.0, 5.0); it would have no effect"),
        (
            ["--process.times=likelihood", "--process.log_snr=[30, 40]", "--process.name=vp"],
            "vp of the linear table, v goes from -10.1 to 9.21",
        ),
    ],
)
def test_settings_of_the_process_that_do_nothing(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    assert said in refusal(capsys, ["--latents", str(data.latents), "--out", str(tmp_path / "out"), *given])
    assert not (tmp_path / "out").exists()
