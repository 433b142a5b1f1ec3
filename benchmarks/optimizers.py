"""Muon against AdamW on the demo, at equal wall-clock: the demo's own configuration, several seeds.

The speed of each optimiser is measured first, side by side; each then trains on as many images as it sees in `--seconds`,
so that load on the machine afterwards does not change who wins. Writes benchmarks/results/optimizers-<device>.json.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import frame

RECIPES = {
    "muon": ["--optimizer.name=muon", "--optimizer.lr=3e-3"],
    "adamw 1e-3": ["--optimizer.name=adamw", "--optimizer.lr=1e-3"],
    "adamw 3e-3": ["--optimizer.name=adamw", "--optimizer.lr=3e-3"],
}
STEP = 64


def speed(scratch: Path, recipe: str) -> float:
    """Images a second: the median of windows of four steps after the first."""
    folder = scratch / f"speed {recipe}"
    frame.train_demo(
        folder, *RECIPES[recipe], f"--train.images={24 * STEP}", f"--log.every_images={4 * STEP}", "--log.validate_every_images=1M"
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_second"] for line in lines[1:] if line["phase"] == "train")


def figures(folder: Path) -> dict[str, float]:
    """What the run's own evaluation says of the held-out photos."""
    metrics = json.loads((folder / "evaluation.json").read_text())["metrics"]
    return {name: round(metrics[name]["mean"], 4) for name in ("psnr_db", "kl_nats", "elbo_nats", "ssim")}


def main() -> None:
    """Measure and write the result."""
    parser = frame.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=150, help="training time that each run gets, by its measured speed")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()

    device = frame.device_name()
    result: dict[str, Any] = {**frame.made_with(device), "seconds": options.seconds, "recipes": {}}
    with tempfile.TemporaryDirectory() as scratch:
        speeds = {name: speed(Path(scratch), name) for name in RECIPES}
        for name, rate in speeds.items():
            images = round(rate * options.seconds / STEP) * STEP
            result["recipes"][name] = {"images_per_second": round(rate, 1), "images": images, "seeds": []}
        for seed in range(options.seeds):
            for name, recipe in RECIPES.items():
                folder = Path(scratch) / f"{name} {seed}"
                frame.train_demo(folder, *recipe, f"--train.seed={seed}", f"--train.images={result['recipes'][name]['images']}")
                result["recipes"][name]["seeds"].append(figures(folder))
                print(name, seed, figures(folder), flush=True)
    file = frame.result_file("optimizers", device)
    frame.write(file, result)
    frame.say_written(file)


if __name__ == "__main__":
    main()
