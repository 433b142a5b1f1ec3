"""Two processes that train a decoder are one, and leave the encoder as one does."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.children import SMALL
from tests.gradients import launch
from tests.test_finetuning_sources import WEIGHTS, network


def test_two_processes_have_one_processs_gradients_with_a_frozen_encoder(tmp_path: Path) -> None:
    network(mid_block_add_attention=False).save_pretrained(tmp_path / "vae")
    shape = ("--model.", "--train.images", "--optimizer.lr")
    argv = [
        *(a for a in SMALL if not a.startswith(shape)), "--train.images=21", "--train.microbatch=2", "--optimizer.lr=1e-5",
        f"--model.pretrained={tmp_path / 'vae'}", "--model.train=decoder", "--train.gradient_checkpointing=true",
        "--optimizer.clip_norm=null",
    ]  # fmt: skip
    for name, processes in (("one", 1), ("two", 2)):
        launch(tmp_path / name, processes, argv)
    single, double = (load_file(tmp_path / name / "gradients.safetensors") for name in ("one", "two"))
    assert single.keys() == double.keys()
    assert {key.split("/")[0] for key in single} == {"0", "1", "2"}
    assert all(key.split("/")[1].startswith("vae.decoder.") for key in single)
    for step in range(3):
        keys = [key for key in single if key.startswith(f"{step}/")]
        difference = torch.cat([(single[k] - double[k]).flatten() for k in keys]).norm()
        assert difference <= 1e-5 * torch.cat([single[k].flatten() for k in keys]).norm()
    before = load_file(tmp_path / "vae" / WEIGHTS)
    for name in ("one", "two"):
        after = load_file(tmp_path / name / "run" / "vae" / WEIGHTS)
        assert all(torch.equal(value, after[key]) for key, value in before.items() if not key.startswith("decoder."))
