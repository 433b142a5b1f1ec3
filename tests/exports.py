"""Exports of a small pipeline, for tests."""

from pathlib import Path

import pytest

from diffusion import export
from tests.pipelines import parts, write_ungated


def write_run(folder: Path) -> Path:
    """A finished run, as far as this command looks at one, with files in its pipeline that are nobody's to publish."""
    (folder / "config.yaml").write_text("out: here\n")
    pipeline = write_ungated(parts(), folder / "pipeline")
    (pipeline / "README.md").write_text(
        "---\nlicense: mit\n---\n\n# Ours\n\n`PATH_OR_HUB_ID`\n\n## Measured\n\nMuch.\n\n## Notes\n\nMine.\n"
    )
    (pipeline / "checkpoints").mkdir()
    for name in ("log.txt", "checkpoints/model.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors", "vae/optimizer.bin"):
        (pipeline / name).write_text("not this")
    return folder


def main(run: Path, out: Path, *more: str) -> int:
    return export.main(["--pipeline", str(run), "--out", str(out), *more])


def refusal(capsys: pytest.CaptureFixture[str], run: Path, out: Path, *more: str) -> str:
    """What it says as it ends with exit code 2, having left nothing."""
    before = sorted(out.parent.rglob("*"))
    assert main(run, out, *more) == 2
    assert sorted(out.parent.rglob("*")) == before
    # Stock code in this process has bars and warnings.
    _, error, message = capsys.readouterr().err.partition("error: ")
    assert error and "Traceback" not in message
    return message
