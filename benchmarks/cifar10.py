"""The bound on CIFAR-10 in bits/dim: one scale for all values against one for each, then the experimental families at equal cost.

`configs/autoencoder/cifar10.yaml`; the same at half its length, with a scale of each value's own and with one for all; and with a KL
weight of 1 from the start. From the weights of the first, the plain VAE and each family train on, each for as many images as the plain
one sees in the same time by the costs in `FAMILIES`; the families are compared with the plain one image by image, all on the whole test
set. One thread. Writes benchmarks/results/cifar10-<device>.json and draws docs/images/cifar10.png. A run that `--runs` has already goes
on, or is measured as it is.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import frame
from commands import command, folder_name, trained

CONSTANT = ["--objective.kl.schedule=constant", "--objective.kl.anneal_images=0"]
HALF = ["--train.images=120k", "--objective.kl.anneal_images=48k"]
SCALES = {
    "learned, half the images": [*HALF, "--objective.likelihood.scale=learned"],
    "pixel, half the images": HALF,
    "pixel": [],
    "pixel, constant weight": [*CONSTANT, "--train.images=200k"],
}
FAMILIES: dict[str, tuple[float, list[str]]] = {
    "plain": (1.0, []),
    "flow posterior": (1.30, ["--experimental.posterior=flow"]),
    "mixture prior": (1.10, ["--experimental.prior=mixture"]),
    "flow prior": (1.25, ["--experimental.prior=flow"]),
}
"""CPU time of a training step over the plain VAE's, and what is set."""
ONWARD = [*CONSTANT, "--optimizer.lr=2e-3", "--optimizer.muon_lr=0.005"]
BATCH = 16
MOST_SHOWN = 6.0
"""Bits/dim at which the chart is cut off."""


def train(folder: Path, options: argparse.Namespace, *argv: str) -> None:
    """A training run with its CPU seconds beside it, unless it is finished."""
    data = [f"--data.source={options.train}", f"--data.validation_source={options.test}"]
    trained(folder, "train_autoencoder", "--config=cifar10", *data, *argv)


def figures(folder: Path, options: argparse.Namespace, against: Path | None = None) -> dict[str, Any]:
    """What `evaluate_autoencoder` says of the whole test set, and against the run `against`."""
    out = folder / "test.json"
    compared = [] if against is None else [f"--compare={against / 'test.json'}"]
    command("evaluate_autoencoder", f"--model={folder}", f"--data.source={options.test}", "--data.workers=0", f"--out={out}", *compared)
    report = json.loads(out.read_text())
    told: dict[str, Any] = {"cpu_seconds": round(json.loads((folder / "cpu_seconds.json").read_text()))}
    told |= {name: round(report["metrics"][name]["mean"], 4) for name in ("bits_per_dim", "nll_nats", "kl_nats", "elbo_nats", "psnr_db")}
    told |= {"active_channels": report["active_channels"], "alarms": [alarm["name"] for alarm in report["alarms"]]}
    if against is not None:
        difference = report["comparison"]["differences"]["elbo_nats"]
        told["elbo_gain_nats"] = {k: round(difference[k], 2) for k in ("mean", "standard_error")}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told["images"] = lines[-1]["images"]
    told["validation"] = [[line["images"], round(line["bits_per_dim"], 4)] for line in lines if line["phase"] == "validation"]
    return told


def draw(runs: dict[str, Any], file: Path) -> None:
    """Bits/dim of 500 test images over training images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    words = (
        "one scale for all values",
        "each value's own scale",
        "the same, twice the images",
        "the same, KL weight 1 from the start",
    )
    for name, told in zip(SCALES, words, strict=True):
        if name in runs:
            images, bits = zip(*runs[name]["validation"], strict=True)
            axes.plot([n / 1000 for n in images], bits, marker="o", markersize=3.5, label=f"{told}: {runs[name]['bits_per_dim']:.2f}")
    axes.set(xlabel="training images seen, thousands", ylabel="bits/dim, test images", ylim=(None, MOST_SHOWN), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="CIFAR-10, beta 1, discretised logistic")
    figure.savefig(file)


def main() -> None:
    """Measure, write and draw."""
    parser = frame.parser(__doc__)
    parser.add_argument("--train", help="training images: a parquet glob or a folder")
    parser.add_argument("--test", help="test images, alike")
    parser.add_argument("--runs", type=Path, help="folder for the runs")
    parser.add_argument("--onward-images", type=int, default=32_000, help="images that the plain VAE trains on, beside the families")
    parser.add_argument("--only", nargs="*", choices=[*SCALES, *FAMILIES], help="runs to make; the others stay as the result file has them")
    options = parser.parse_args()
    if not (options.train and options.test and options.runs):
        print("cifar10: left out; give --train, --test and --runs to measure it")
        return

    device = frame.device_name(one_thread=True)
    file = frame.result_file("cifar10", device)
    result = {**frame.made_with(device), "runs": json.loads(file.read_text())["runs"] if file.exists() else {}}
    wanted = options.only or [*SCALES, *FAMILIES]
    for name, setting in SCALES.items():
        if name in wanted:
            folder = options.runs / folder_name(name)
            train(folder, options, *setting)
            result["runs"][name] = figures(folder, options)
            frame.write(file, result)
    for name, (cost, setting) in FAMILIES.items():
        if name in wanted:
            folder = options.runs / folder_name(name)
            images = round(options.onward_images / cost / BATCH) * BATCH
            start = f"--init_from={options.runs / 'pixel'}"
            train(folder, options, start, f"--train.images={images}", f"--log.validate_every_images={images}", *ONWARD, *setting)
            result["runs"][name] = figures(folder, options, None if name == "plain" else options.runs / "plain")
            frame.write(file, result)
    draw(result["runs"], frame.ROOT / "docs" / "images" / "cifar10.png")
    frame.say_written(file, " and docs/images/cifar10.png")


if __name__ == "__main__":
    main()
