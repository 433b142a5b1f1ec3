"""The examples of docs/latents-format.md, run as they stand there on a small data set."""

import re
import sys
from pathlib import Path

import pytest
import torch

from autoencoder import export_latents
from autoencoder.latents import reader, sampler
from tests.encode_children import photos, small_model
from tests.small_latents import encode_photos

PAGE = (Path(__file__).parents[1] / "docs" / "latents-format.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_model(tmp_path / "vae")
    photos(tmp_path / "photos", [f"{kind}/{k}.png" for kind in ("ape", "bee") for k in range(10)])
    latents = encode_photos(tmp_path / "vae", tmp_path / "photos", tmp_path / "LATENTS", "--shard_rows=8")
    assert export_latents.main(["--latents", str(latents), "--out", str(tmp_path / "DIR")]) == 0
    for module in (reader, sampler):
        name = Path(module.__file__ or "").name
        (tmp_path / name).write_text(Path(module.__file__ or "").read_text())
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    trainer, shapes, loader = (block for block in BLOCKS)
    steps: list[tuple[torch.Tensor, torch.Tensor]] = []
    found: dict[str, object] = {"train_step": lambda z, label: steps.append((z, label))}
    assert "num_workers=2" in trainer and "batch_size=256" in trainer
    exec(trainer.replace("num_workers=2", "num_workers=0").replace("batch_size=256", "batch_size=6"), found)
    assert len(steps) == 7
    assert found["checkpoint"] == {"sampler": {"rows_seen": 42}}
    z = torch.cat([z for z, _ in steps])
    assert z.shape == (42, 4, 8, 8)
    assert z.std() == pytest.approx(1, abs=0.05)
    counts = torch.cat([label for _, label in steps]).bincount()
    assert counts.sum() == 42 and counts.min() >= 20

    several = encode_photos(tmp_path / "vae", tmp_path / "photos", tmp_path / "SEVERAL", "--data.resolutions=16,8")
    held = {**found, "latents": reader.Latents(several)}
    exec(shapes, held)
    assert sorted(part.shape for part in held["parts"]) == [(4, 4, 4), (4, 8, 8)]  # type: ignore[attr-defined]
    assert sum(sampler.rows_seen for sampler in held["samplers"]) == 80  # type: ignore[attr-defined]
    assert held["rows"].mean.shape == (8, *held["parts"][held["n"]].shape)  # type: ignore[attr-defined, index]

    exec(loader, found)
    expected = reader.Latents(latents)[0]["mean"]
    assert torch.equal(found["mean"], expected)  # type: ignore[arg-type]
