"""Our recipe against the loops of `plain_loops.py`: same network, batch, photos and processor time, PSNR and SSIM at equal KL.

The CPU seconds of a step are measured first, one method after the other on one thread; each then trains for as many steps as `--minutes`
of one thread buy it (twenty minutes of two threads are forty of one). Every method has two KL weights in the first
seed; figures at equal KL are on the line between its two points, at the KL in the middle of the range that all methods reach. Later seeds
have the weight nearest to that KL alone, and move the rest of the way along the first seed's slope. All are exported and measured by
`evaluate_autoencoder`. `--ladder` compares `photos-64` with itself less one ingredient, by shorter runs: one of each, held against the line
of the whole recipe's two at its own KL. Writes
benchmarks/results/recipe-<device>.json after each run; runs that are in it are not made again.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import frame
from commands import command

WIDTHS, SIDE, BATCH = (32, 64, 128), 64, 16
CROPS = 3
"""A grid of 3 x 3 crops of each validation photo is measured."""
OURS = ["--config=photos-64"]
LADDER: dict[str, list[str]] = {
    "ours": [],
    "AdamW for Muon": ["--optimizer.name=adamw", "--optimizer.lr=1e-3"],
    "a constant learning rate": ["--optimizer.schedule=constant"],
    "no moving average": ["--train.ema_halflife_images=null"],
    "a fixed scale": ["--objective.likelihood.scale=fixed", "--objective.likelihood.value=0.05"],
    "fp32": ["--train.precision=fp32"],
    "SSIM beside": ["--objective.perceptual.name=ssim", "--objective.perceptual.weight=0.05"],
}
"""What each rung sets away from the preset."""
KL_WEIGHTS = {"plain": (0.03, 0.1), "strong": (0.03, 0.1), "ours": (0.6, 2.0)}
"""Two a method: of the KL beside sum |e| for the loops, beta for ours."""
NEAREST = {"plain": 0.03, "strong": 0.1, "ours": 2.0}
"""The one that lies nearest to the KL of the comparison: all that seeds after the first are given."""
LEARNING_RATES = {"plain": 1e-4, "strong": 1e-3}
TIMED = 30
"""Steps that a step's cost is measured over."""


def loop(method: str, folder: Path, options: argparse.Namespace, *, weight: float, seed: int, steps: int, lr: float) -> float:
    """Train a loop of `plain_loops.py` and write its network to `folder`; CPU seconds of a step."""
    import plain_loops
    import torch

    from autoencoder.config import ModelConfig
    from autoencoder.model import build

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    vae = build(ModelConfig(preset="tiny", block_out_channels=WIDTHS), channels=3, resolution=SIDE)
    photos = plain_loops.read(Path(options.train), SIDE)
    vae, cost = plain_loops.train(
        vae, photos, strong=method == "strong", lr=lr, kl_weight=weight, steps=steps, batch=BATCH, side=SIDE, seed=seed
    )
    vae.save_pretrained(folder)
    return cost


def ours(folder: Path, options: argparse.Namespace, *argv: str, weight: float, seed: int, steps: int) -> float:
    """Train ours on one thread; seconds of a step, on an idle core CPU seconds."""
    data = [f"--data.source={options.train}", f"--data.validation_source={options.validation}", "--data.workers=0"]
    every = f"--log.every_images={max(BATCH, steps * BATCH // 20)}"
    quiet = ["--log.trackers=[]", "--log.progress=false", "--log.validate_every_images=10M", every]
    told = [f"--train.batch_size={BATCH}", f"--objective.kl.weight={weight}", f"--train.seed={seed}", f"--train.images={steps * BATCH}"]
    command("train_autoencoder", *OURS, *data, *quiet, *told, *argv, "--out", str(folder))
    rates = [json.loads(line).get("images_per_second") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return BATCH / statistics.median(rate for rate in rates if rate)


def cost(method: str, folder: Path, options: argparse.Namespace) -> float:
    """CPU seconds of a step of `method`, on an idle core."""
    if method in LEARNING_RATES:
        return loop(method, folder, options, weight=KL_WEIGHTS[method][0], seed=0, steps=TIMED, lr=LEARNING_RATES[method])
    return ours(folder, options, *LADDER[method], weight=1.0, seed=0, steps=TIMED)


def figures(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Means over the validation crops."""
    out = folder / "measured.json"
    data = [f"--data.source={options.validation}", f"--data.resolution={SIDE}", f"--data.grid={CROPS}", "--data.workers=0"]
    command("evaluate_autoencoder", f"--model={folder}", *data, f"--out={out}")
    metrics = json.loads(out.read_text())["metrics"]
    return {name: round(metrics[name]["mean"], 4) for name in ("psnr_db", "ssim", "kl_nats")}


def at_equal_kl(runs: dict[str, Any]) -> dict[str, Any]:
    """PSNR and SSIM of each method at one KL, mean and standard deviation over seeds; empty until one has two points.

    A seed of one point moves to that KL along the slope of its method's first seed of two.
    """
    lines: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name, run in runs.items():
        method, seed, _ = name.rsplit(" ", 2)
        lines.setdefault(method, {}).setdefault(seed, []).append(run)
    for seeds in lines.values():
        for points in seeds.values():
            points.sort(key=lambda run: run["kl_nats"])
    pairs = [points for seeds in lines.values() for points in seeds.values() if len(points) == 2]
    if not pairs:
        return {}
    low, high = max(pair[0]["kl_nats"] for pair in pairs), min(pair[1]["kl_nats"] for pair in pairs)
    # PSNR is nearly linear in the logarithm of the rate.
    kl = math.sqrt(low * high)
    told: dict[str, Any] = {"kl_nats": round(kl, 1), "common_range": [round(low, 1), round(high, 1)]}
    for method, seeds in lines.items():
        line = next((points for points in seeds.values() if len(points) == 2), None)
        if line is None:
            continue
        values: dict[str, list[float]] = {"psnr_db": [], "ssim": []}
        for points in seeds.values():
            one, two = points if len(points) == 2 else line
            share = math.log(kl / points[0]["kl_nats"]) / math.log(two["kl_nats"] / one["kl_nats"])
            for name, found in values.items():
                found.append(points[0][name] + share * (two[name] - one[name]))
        told[method] = {
            name: {"mean": round(statistics.mean(found), 4), "deviation": round(statistics.stdev(found), 4) if len(found) > 1 else None}
            for name, found in values.items()
        }
        told[method]["seeds"] = {seed: {name: round(found[n], 4) for name, found in values.items()} for n, seed in enumerate(seeds)}
    return told


def below_ours(ladder: dict[str, Any]) -> dict[str, Any]:
    """PSNR and SSIM of each rung less those of the whole recipe at the rung's KL, by seed; `kl_nats` is outside its two where `beyond`."""
    told: dict[str, Any] = {}
    for name, run in ladder.items():
        method, seed, _ = name.rsplit(" ", 2)
        line = [ladder.get(f"ours {seed} {weight:g}") for weight in KL_WEIGHTS["ours"]]
        if method == "ours" or None in line:
            continue
        one, two = sorted((point for point in line if point), key=lambda point: float(point["kl_nats"]))
        share = math.log(run["kl_nats"] / one["kl_nats"]) / math.log(two["kl_nats"] / one["kl_nats"])
        less = {key: round(run[key] - one[key] - share * (two[key] - one[key]), 4) for key in ("psnr_db", "ssim")}
        told[f"{method} {seed}"] = {"kl_nats": run["kl_nats"], **less, "beyond": not 0 <= share <= 1}
    return told


def main() -> None:
    """Measure and write."""
    parser = frame.parser(__doc__)
    parser.add_argument("--train", help="folder of training photos")
    parser.add_argument("--validation", help="folder of validation photos")
    parser.add_argument("--runs", type=Path, help="folder for the runs")
    parser.add_argument("--minutes", type=float, help="minutes of one thread that each run gets (40)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--ladder", action="store_true", help="run the ladder, of which --minutes is 10 unless given")
    parser.add_argument("--only", nargs="*", choices=[*LEARNING_RATES, *LADDER], help="methods or rungs to run")
    parser.add_argument("--tune", type=float, nargs="*", help="learning rates of `strong` to try at its first KL weight, and stop")
    options = parser.parse_args()
    if not (options.train and options.validation and options.runs):
        print("recipe: left out; give --train, --validation and --runs to measure it")
        return

    device = frame.device_name(one_thread=True)
    file = frame.result_file("recipe", device)
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else frame.made_with(device)
    for key in ("cpu_seconds_a_step", "runs", "ladder", "tuning"):
        result.setdefault(key, {})

    def write() -> None:
        result["at_equal_kl"], result["less_one_ingredient"] = at_equal_kl(result["runs"]), below_ours(result["ladder"])
        frame.write(file, result)

    def steps_of(method: str, minutes: float) -> int:
        if method not in result["cpu_seconds_a_step"]:
            result["cpu_seconds_a_step"][method] = round(cost(method, options.runs / f"cost-{method}", options), 4)
        return round(minutes * 60 / float(result["cpu_seconds_a_step"][method]))

    minutes = options.minutes or (10 if options.ladder else 40)
    for lr in options.tune or []:
        folder, steps = options.runs / f"tune-{lr:g}", steps_of("strong", minutes)
        loop("strong", folder, options, weight=KL_WEIGHTS["strong"][0], seed=0, steps=steps, lr=lr)
        result["tuning"][f"{lr:g} for {minutes:g} minutes"] = figures(folder, options)
        write()
    place = "ladder" if options.ladder else "runs"
    part = result[place]
    for seed in [] if options.tune else options.seeds:
        for method in options.only or (LADDER if options.ladder else [*LEARNING_RATES, "ours"]):
            weights: tuple[float, ...] = KL_WEIGHTS.get(method, KL_WEIGHTS["ours"])
            if options.ladder and method != "ours":
                weights = weights[:1]
            elif not options.ladder and seed > 0:
                weights = (NEAREST[method],)
            for weight in weights:
                name, steps = f"{method} {seed} {weight:g}", steps_of(method, minutes)
                if name in part:
                    continue
                folder = options.runs / place / name.replace(" ", "-")
                if method in LEARNING_RATES:
                    loop(method, folder, options, weight=weight, seed=seed, steps=steps, lr=LEARNING_RATES[method])
                else:
                    ours(folder, options, *LADDER[method], weight=weight, seed=seed, steps=steps)
                part[name] = {"steps": steps, **figures(folder, options)}
                print(name, part[name], flush=True)
                write()
    frame.say_written(file)


if __name__ == "__main__":
    main()
