"""Bits/dim of CIFAR-10 in one CPU hour: a VAE at beta 1 alone, against a shorter one with a diffusion model for its prior.

The single stage is `configs/autoencoder/cifar10.yaml`, made as long as the hour takes it. The two stages are the same VAE, shorter, its
latents, and `configs/diffusion/cifar10.yaml` on them; `evaluate_autoencoder --pipeline` measures the bound on -log p(x) of both on the
test images. What is told is the CPU time of each part. One thread. Writes benchmarks/results/two-stages-<device>.json, and draws
docs/images/cifar10-samples.png from the last pair. A run that `--runs` has already goes on, or is measured as it is.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import frame
from commands import command, folder_name, trained

SINGLE = {"one stage": ["--train.images=300k"]}
KNEE = "--objective.kl.anneal_images"
PAIRS: dict[str, tuple[list[str], list[str]]] = {
    "two stages": (["--train.images=170k", f"{KNEE}=68k"], []),
    "two stages, beta 0.7": (["--train.images=170k", f"{KNEE}=68k", "--objective.kl.weight=0.7"], []),
    "two stages, logit-normal times": (["--train.images=170k", f"{KNEE}=68k"], ["--process.times=logit_normal"]),
}
"""Settings of the VAE and of the diffusion model; pairs of one VAE share it. 0.7 is about what the account of a brief pair asks for."""


def vae(folder: Path, options: argparse.Namespace, setting: list[str]) -> float:
    """Train an autoencoder; CPU seconds."""
    data = [f"--data.source={options.train}", f"--data.validation_source={options.test}"]
    return trained(folder, "train_autoencoder", "--config=cifar10", *data, *setting)


def encoded(model: Path, latents: Path, options: argparse.Namespace) -> float:
    """Encode the training images and their mirror images; CPU seconds."""
    note = latents / "cpu_seconds.json"
    if not note.exists():
        told = [f"--data.source={options.train}", "--mirrors=true", "--data.workers=0"]
        spent = command("encode_dataset", f"--model={model}", *told, f"--out={latents}")
        note.write_text(json.dumps(spent))
    return float(json.loads(note.read_text()))


def measured(model: Path, options: argparse.Namespace, out: Path, *argv: str) -> dict[str, Any]:
    """What `evaluate_autoencoder` says on the test images."""
    command("evaluate_autoencoder", f"--model={model}", f"--data.source={options.test}", "--data.workers=0", f"--out={out}", *argv)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A VAE alone."""
    folder = options.runs / folder_name(name)
    seconds = vae(folder, options, SINGLE[name])
    metrics = measured(folder, options, folder / "test.json")["metrics"]
    told = {key: round(metrics[key]["mean"], 4) for key in ("bits_per_dim", "nll_nats", "kl_nats")}
    return {"cpu_seconds": {"autoencoder": round(seconds), "in all": round(seconds)}, **told}


def two(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A VAE and the diffusion model of its latents."""
    first, second = PAIRS[name]
    model = options.runs / folder_name(" ".join(["vae", *(setting.partition("=")[2] for setting in first)]))
    latents, folder = model.with_name(f"{model.name}-latents"), options.runs / folder_name(name)
    seconds = {"autoencoder": vae(model, options, first), "latents": encoded(model, latents, options)}
    seconds["diffusion"] = trained(folder, "train_diffusion", "--config=cifar10", f"--latents={latents}", *second)
    report = measured(model, options, folder / "test.json", f"--pipeline={folder}", f"--account.images={options.crops}")
    account = report["account"]
    told: dict[str, Any] = {"cpu_seconds": {key: round(value) for key, value in seconds.items()} | {"in all": round(sum(seconds.values()))}}
    told["crops"] = account["crops"]
    for key in ("standard_normal", "learned", "calibrated"):
        told[key] = {name: rounded(value) for name, value in account[key].items()}
    told |= {key: rounded(account[key]) for key in ("nll_nats", "saved_nats", "calibrated_saved_nats")}
    return told | {"price": account["price"]}


def rounded(estimate: dict[str, Any]) -> dict[str, Any]:
    """An estimate with fewer digits."""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in estimate.items()}


def main() -> None:
    """Measure, write and draw."""
    parser = frame.parser(__doc__)
    parser.add_argument("--train", help="training images: a parquet glob or a folder")
    parser.add_argument("--test", help="test images, alike")
    parser.add_argument("--runs", type=Path, help="folder for the runs")
    parser.add_argument("--crops", type=int, default=1000, help="test images that the account of two stages is measured on")
    parser.add_argument("--only", nargs="*", choices=[*SINGLE, *PAIRS], help="runs to make; the others stay as the result file has them")
    options = parser.parse_args()
    if not (options.train and options.test and options.runs):
        print("two_stages: left out; give --train, --test and --runs to measure it")
        return

    device = frame.device_name(one_thread=True)
    file = frame.result_file("two-stages", device)
    result = {**frame.made_with(device), "runs": json.loads(file.read_text())["runs"] if file.exists() else {}}
    for name in options.only or [*SINGLE, *PAIRS]:
        result["runs"][name] = one(name, options) if name in SINGLE else two(name, options)
        frame.write(file, result)
        if name in PAIRS:
            newest = sorted((options.runs / folder_name(name) / "images").glob("step-*.png"))[-1]
            shutil.copyfile(newest, frame.ROOT / "docs" / "images" / "cifar10-samples.png")
    frame.say_written(file)


if __name__ == "__main__":
    main()
