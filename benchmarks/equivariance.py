"""What equivariance regularisation gives and costs: the demo with and without it, at equal images seen, from scratch or from a trained run.

Writes benchmarks/results/equivariance-<device>.json: equivariance errors of decoder and encoder, spectra's high ends, PSNR, NLL and
KL on held-out crops, and time.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import frame

RECIPES = {
    "off": [],
    "share 0.5, weight 1": ["--objective.equivariance.share=0.5"],
    "share 0.5, weight 2": ["--objective.equivariance.share=0.5", "--objective.equivariance.weight=2"],
    "share 0.5, weight 0.03": ["--objective.equivariance.share=0.5", "--objective.equivariance.weight=0.03"],
    "share 0.5, weight 0.1": ["--objective.equivariance.share=0.5", "--objective.equivariance.weight=0.1"],
    "share 0.5, weight 0.3": ["--objective.equivariance.share=0.5", "--objective.equivariance.weight=0.3"],
}
SCRATCH = ("off", "share 0.5, weight 1", "share 0.5, weight 2")
GENTLY = ["--optimizer.lr=1e-3", "--optimizer.muon_lr=0.007"]
"""A third of the demo's learning rates, for weights that have been trained."""


def figures(folder: Path, seconds: float) -> dict[str, Any]:
    """What the run came to on held-out crops."""
    evaluation = json.loads((folder / "evaluation.json").read_text())
    told, metrics = evaluation["diffusability"], evaluation["metrics"]
    return {
        **{key: round(told[key], 4) for key in ("decoder_error", "encoder_error")},
        "by_transformation": [{k: round(v, 4) for k, v in each.items()} for each in told["transformations"]],
        "energy_above_half_of_nyquist": {name: round(its["octaves"][0]["share"], 4) for name, its in told["spectrum"].items()},
        **{f"held_out_{name}": round(metrics[name]["mean"], 3) for name in ("psnr_db", "nll_nats", "kl_nats", "elbo_nats")},
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Measure and write the result."""
    parser = frame.parser(__doc__)
    parser.add_argument("--images", type=int, default=12_000, help="length of each run in training images")
    parser.add_argument("--init_from", help="a finished run of the demo to start from, at a third of its learning rates")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="a run of each recipe for each of them")
    parser.add_argument("--only", nargs="*", choices=list(RECIPES), help="recipes to run; the others stay as the result file has them")
    options = parser.parse_args()

    device = frame.device_name()
    file = frame.result_file("equivariance", device)
    part = "from_trained" if options.init_from else "recipes"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    result |= {**frame.made_with(device), f"{part}_images": options.images}
    recipes = result[part] = result.get(part, {}) if options.only else {}
    start = ["--init_from", options.init_from, *GENTLY] if options.init_from else []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.only or SCRATCH:
            recipes[name] = {}
            for seed in options.seeds:
                folder, begun = Path(scratch) / f"{name} {seed}", time.monotonic()
                argv = [*start, *RECIPES[name], f"--train.images={options.images}", f"--train.seed={seed}"]
                frame.train_demo(folder, *argv)
                recipes[name][f"seed {seed}"] = figures(folder, time.monotonic() - begun)
                print(name, seed, recipes[name][f"seed {seed}"], flush=True)
                frame.write(file, result)
    frame.say_written(file)


if __name__ == "__main__":
    main()
