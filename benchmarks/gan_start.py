"""What a discriminator's start costs a trained autoencoder: PSNR over the 500 steps after it, with its safeguards and without.

The demo's autoencoder is trained (or taken from --from), then goes on for 500 steps without a discriminator, with one as the defaults
have it (durations in proportion to these few images), and with one as LDM starts its own: heard at once, at half of the gradient's norm
in each step, without a gate. PSNR is that of held-out crops, of the training weights or of their moving average (--halflife). Writes
benchmarks/results/gan-start-<device>.json.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import frame

STEPS = 500
# Of the 500 steps the discriminator trains alone in the first 100, and is heard in full after 200.
SAFE = {"warmup_images": STEPS // 5, "ramp_images": STEPS // 5}
BARE = {"warmup_images": 0, "ramp_images": 0, "gate": "[0,1]", "weighting": "step", "weight": 0.5, "ratio_bound": 1e4}
VARIANTS: dict[str, dict[str, Any]] = {
    "no discriminator": {"name": "none"},
    "as the defaults": SAFE,
    "as LDM starts it": BARE,
}


def phase(folder: Path, start: str, options: argparse.Namespace, steps: int, *argv: str) -> list[dict[str, Any]]:
    """The lines of a run of so many steps from the weights at `start`."""
    batch = options.batch
    frame.train_demo(
        folder,
        f"--init_from={start}",
        f"--train.batch_size={batch}",
        f"--train.images={steps * batch}",
        f"--train.ema_halflife_images={options.halflife or 'null'}",
        "--optimizer.name=adamw",
        f"--optimizer.lr={options.lr}",
        "--optimizer.schedule=constant",
        f"--data.validation_grid={options.grid}",
        f"--log.every_images={10 * batch}",
        f"--log.validate_every_images={options.every * batch}",
        *argv,
    )
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def variant(scratch: Path, name: str, start: str, options: argparse.Namespace) -> dict[str, Any]:
    """One way to go on, measured at every validation."""
    settings = {"name": "hinge", "start": 0, "width": options.width, "layers": 2, "lr": options.d_lr, **VARIANTS[name]}
    for key in ("warmup_images", "ramp_images"):
        if key in settings:
            settings[key] *= options.batch
    settings |= {"gate_images": 20 * options.batch, "memory_images": 20 * options.batch}
    if settings["name"] == "none":
        settings = {"name": "none"}
    lines = phase(scratch / name, start, options, STEPS, *(f"--objective.adversarial.{key}={value}" for key, value in settings.items()))
    trained = [line for line in lines if line["phase"] == "train"]
    measured = [line for line in lines if line["phase"] == "validation"]
    shown = ("adversarial_weight", "discriminator_accuracy", "discriminator_loss", "adversarial")
    return {
        "settings": settings,
        "psnr_db": [round(line["psnr_db"], 3) for line in measured],
        "kl_nats": [round(line["kl_nats"], 1) for line in measured],
        **{key: [round(line[key], 4) for line in trained[4::5]] for key in shown if key in trained[-1]},
    }


def note_costs(variants: dict[str, Any]) -> None:
    """Beside each discriminator's figures, the most that it cost at any measurement against going on without one."""
    control = variants.get("no discriminator")
    for name, found in variants.items():
        if control is not None and name != "no discriminator":
            lost = [without - with_one for without, with_one in zip(control["psnr_db"], found["psnr_db"], strict=True)]
            found["largest_cost_db"] = round(max(lost), 3)


def main() -> None:
    """Measure and write the result."""
    parser = frame.parser(__doc__)
    parser.add_argument("--from", dest="start", help="a finished run of the demo's autoencoder; without it one is trained")
    parser.add_argument("--images", type=int, default=36_000, help="length of that training")
    parser.add_argument("--batch", type=int, default=16, help="images a step of the 500")
    parser.add_argument(
        "--halflife", type=int, default=0, help="of the moving average that is measured, in images; 0: the training weights"
    )
    parser.add_argument("--lr", type=float, default=3e-5, help="AdamW's, of the 500 steps")
    parser.add_argument("--width", type=int, default=16, help="of the discriminator's first layer")
    parser.add_argument("--d-lr", type=float, default=1e-3, help="the discriminator's: a narrow one takes more than the default")
    parser.add_argument("--grid", type=int, default=4, help="held-out crops a photo are this squared")
    parser.add_argument("--every", type=int, default=50, help="steps between two measurements")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), help="variants to run; the others stay as the result file has them")
    options = parser.parse_args()

    device = frame.device_name()
    file = frame.result_file("gan-start", device)
    setting = {key: getattr(options, key) for key in ("batch", "halflife", "lr", "d_lr", "width", "grid", "every")}
    result = {**frame.made_with(device), "steps": STEPS, **setting}
    with tempfile.TemporaryDirectory() as scratch:
        start = options.start
        if start is None:
            start = str(Path(scratch) / "start")
            frame.train_demo(Path(start), f"--train.images={options.images}")
        lines = phase(Path(scratch) / "unmoved", start, options, 1, "--optimizer.lr=1e-12")
        result["psnr_db_at_the_start"] = round(lines[-1]["psnr_db"], 3)
        for name in options.only or VARIANTS:
            found = variant(Path(scratch), name, start, options)
            print(name, found, flush=True)
            # As the file has them now: variants may run side by side.
            others = json.loads(file.read_text())["variants"] if file.exists() and options.only else result.get("variants", {})
            result["variants"] = {key: found if key == name else others[key] for key in VARIANTS if key == name or key in others}
            note_costs(result["variants"])
            frame.write(file, result)
    frame.say_written(file)


if __name__ == "__main__":
    main()
