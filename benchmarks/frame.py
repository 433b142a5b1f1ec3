"""What the benchmarks have in common: the way to the project (imported first, it makes the rest importable), device and result file."""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUIET = ["--config=demo", "--log.trackers=[]", "--checkpoint.every_images=null", "--checkpoint.every_minutes=null"]
"""The demo's autoencoder, without what a benchmark does not read."""

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line whose help is the benchmark's docstring as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def train_demo(folder: Path, *argv: str) -> None:
    """Train the demo's autoencoder with these settings; ends the benchmark where that fails."""
    from autoencoder import train

    if code := train.main([*QUIET, *argv, "--out", str(folder)]):
        raise SystemExit(code)


def players_at_once(weighting: Any, **changes: Any) -> Any:
    """An `AdversarialConfig` whose discriminator is heard from the first image on, ungated: what steps of both players are timed with."""
    from autoencoder.adversarial_config import AdversarialConfig

    config = AdversarialConfig(
        name="hinge", weighting=weighting, weight=1.0, ratio_bound=1e4, start=0, warmup_images=0, ramp_images=0, gate=(0.0, 1.0)
    )
    return dataclasses.replace(config, **changes)


def device_name(*, one_thread: bool = False) -> str:
    """The device that PyTorch takes, in words; `one_thread`: the processor, of which one thread is used."""
    import torch

    from autoencoder.runtime.device import describe

    if one_thread:
        return f"{describe(torch.device('cpu')).split(',')[0]}, 1 thread"
    return describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def result_file(benchmark: str, device: str) -> Path:
    """Where a benchmark's result on this device lies."""
    kind = re.sub(r"\W+", "-", device.lower()).strip("-")
    return RESULTS / f"{benchmark}-{kind}.json"


def made_with(device: str) -> dict[str, Any]:
    """How a result begins."""
    from autoencoder.runtime.versions import versions

    return {"device": device, "versions": versions()}


def write(file: Path, result: dict[str, Any]) -> None:
    """Write a result as it stands."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


def say_written(file: Path, also: str = "") -> None:
    """The last line that a benchmark prints."""
    print(f"written to {file.relative_to(ROOT)}{also}")
