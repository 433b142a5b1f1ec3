"""How closely the target-KL controller holds its target: the demo at two learning rates and two resolutions, gains as they come.

From 30% of each run on, the mean KL of every 2,000 training images in a row (whole log lines) is compared with the target. Writes
benchmarks/results/target-kl-<device>.json.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import frame

TARGET = 200
LINE, WINDOW, BEGIN = 256, 2000, 0.3
RECIPES = {
    "demo": [],
    "a third of the learning rates": ["--optimizer.lr=1e-3", "--optimizer.muon_lr=0.00667"],
    "24 pixels": ["--data.resolution=24"],
    "24 pixels, a third of the learning rates": ["--data.resolution=24", "--optimizer.lr=1e-3", "--optimizer.muon_lr=0.00667"],
}


def run(folder: Path, *argv: str) -> None:
    """A training run; ends the benchmark where it fails."""
    watched = [f"--log.every_images={LINE}", "--objective.kl.control=target", f"--objective.kl.target={TARGET}"]
    frame.train_demo(folder, *watched, *argv)


def figures(folder: Path, images: int) -> dict[str, Any]:
    """Means over all windows of `WINDOW` images from `BEGIN` of the run on, and what the run came to."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["phase"] == "train" and line["images"] % LINE == 0 and line["images"] > BEGIN * images]
    kl, across = [line["kl_nats"] for line in lines], -(-WINDOW // LINE)
    means = [sum(kl[i : i + across]) / across for i in range(len(kl) - across + 1)]
    weights = [line["kl_weight"] for line in lines]
    evaluation = json.loads((folder / "evaluation.json").read_text())["metrics"]
    return {
        "windows": len(means),
        "lowest_mean_nats": round(min(means), 2),
        "highest_mean_nats": round(max(means), 2),
        "worst_deviation": round(max(abs(mean / TARGET - 1) for mean in means), 4),
        "mean_nats": round(sum(kl) / len(kl), 2),
        "kl_weight": [round(min(weights), 3), round(max(weights), 3)],
        **{f"held_out_{name}": round(evaluation[name]["mean"], 3) for name in ("kl_nats", "elbo_nats", "psnr_db")},
    }


def main() -> None:
    """Measure and write the result."""
    parser = frame.parser(__doc__)
    parser.add_argument("--images", type=int, default=36_000, help="length of each run in training images")
    parser.add_argument("--only", nargs="*", choices=list(RECIPES), help="recipes to run; the others stay as the result file has them")
    options = parser.parse_args()

    device = frame.device_name()
    file = frame.result_file("target-kl", device)
    before = json.loads(file.read_text())["recipes"] if file.exists() and options.only else {}
    result = {**frame.made_with(device), "target_nats": TARGET, "window_images": WINDOW, "recipes": before}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.only or RECIPES:
            folder = Path(scratch) / name
            run(folder, *RECIPES[name], f"--train.images={options.images}")
            result["recipes"][name] = {"images": options.images, **figures(folder, options.images)}
            print(name, result["recipes"][name], flush=True)
            frame.write(file, result)
    frame.say_written(file)


if __name__ == "__main__":
    main()
