"""A training step of the autoencoder against the loops that people write, and what each step from theirs to ours gives.

Same network, batch (in memory), discriminator and backbone of LPIPS (random weights) throughout. `people` is what one finds: fp32, one
batch for the autoencoder and another for the discriminator, each with a pass of its own, the adaptive weight by two gradients through the
whole graphs. `corrected` is bf16 with one pass for both players. `ours` is a step of the training loop, with AdamW and no moving average
as they have none; `as shipped` is the same with the configuration's defaults, Muon and average. Between `corrected` and `ours` stand its
parts, one more in each line. `autoencoder` alone and with LPIPS leave the discriminator, or both, out.

Each is a process of its own; they take turns. Ratios are medians over rounds. Beside them the machine's ceilings, a matrix product of 2048
a side and a copy, in the same rounds. Writes benchmarks/results/train-step-<device>.json.
"""

import argparse
import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import frame
import turns
from turns import Step, Worker

WIDTHS, SIDE, BATCH = (64, 128, 128), 64, 16
KL_WEIGHT, LR = 1e-6, 1e-4
CASES = {"autoencoder": (False, False), "autoencoder, LPIPS": (True, False), "autoencoder, LPIPS, discriminator": (True, True)}
"""Whether there is a perceptual distance, and a discriminator."""
PLAIN = {"people": {}, "corrected": {"bf16": True, "one_pass": True}}
PARTS = {
    "corrected, norms channels last": {"bf16": True, "one_pass": True, "layout": True},
    "the same, one gradient for the adaptive weight": {"bf16": True, "one_pass": True, "layout": True, "one_gradient": True},
}


def network(device: Any) -> Any:
    """The autoencoder that all of them train."""
    import torch

    from autoencoder.config import ModelConfig
    from autoencoder.model import build

    torch.manual_seed(0)
    config = ModelConfig(preset="tiny", block_out_channels=WIDTHS, attention=True, norm_groups=32)
    return build(config, channels=3, resolution=SIDE).to(device)


def plain(case: str, *, bf16: bool = False, one_pass: bool = False, layout: bool = False, one_gradient: bool = False) -> Step:
    """A loop as people write it, with so many of its faults mended."""
    import torch

    from autoencoder import layout as layouts
    from autoencoder.adversarial.patchgan import PatchGAN
    from autoencoder.perceptual import LPIPSDistance  # mends torchvision, which lpips imports

    import lpips  # isort: skip

    with_distance, with_opponent = CASES[case]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = network(device)
    if layout and layouts.helps(device, "bf16", compiled=False):
        layouts.to_channels_last(vae)
    # The package's own module and forward, with the backbone that ours starts with random weights.
    distance = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).to(device)
    distance.net.load_state_dict(LPIPSDistance("vgg", "random").backbone.state_dict())
    distance.requires_grad_(False)
    opponent = PatchGAN(3).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LR, betas=(0.5, 0.9))
    opposing = torch.optim.AdamW(opponent.parameters(), lr=LR, betas=(0.5, 0.9))
    batches: Iterator[Any] = itertools.cycle([torch.rand(BATCH, 3, SIDE, SIDE, device=device) * 2 - 1 for _ in range(4)])
    layer = vae.decoder.conv_out.weight

    def autocast() -> Any:
        return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def forward(images: Any) -> tuple[Any, Any]:
        posterior = vae.encode(images).latent_dist
        return posterior, vae.decode(posterior.sample()).sample.float()

    def judge(images: Any, reconstruction: Any) -> None:
        with autocast():
            real, fake = opponent(images.detach()), opponent(reconstruction.detach())
            loss = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
        opposing.zero_grad()
        loss.backward()
        opposing.step()

    def step() -> None:
        images = next(batches)
        opponent.requires_grad_(False)
        with autocast():
            posterior, reconstruction = forward(images)
            # No leaf: the counter of operations cannot follow a gradient that ends at one.
            seen = reconstruction.detach().requires_grad_().view_as(reconstruction) if one_gradient else reconstruction
            fidelity = (images - seen).abs().mean()
            if with_distance:
                fidelity = fidelity + distance(images, seen).mean()
            against = -opponent(seen).mean() if with_opponent else None
        kl = KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        if against is None:
            (fidelity + kl).backward()
        elif one_gradient:
            # Both gradients to the reconstruction; from there to the last layer it is one convolution, and on from their sum one pass.
            first, second = (torch.autograd.grad(loss, seen, retain_graph=True)[0] for loss in (fidelity, against))
            norms = [torch.autograd.grad(reconstruction, layer, part, retain_graph=True)[0].norm() for part in (first, second)]
            weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)
            torch.autograd.backward((reconstruction, kl), (first + weight * second, None))
        else:
            norms = [torch.autograd.grad(loss, layer, retain_graph=True)[0].norm() for loss in (fidelity, against)]
            weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()
            (fidelity + kl + weight * against).backward()
        optimizer.step()
        opponent.requires_grad_(True)
        if with_opponent:
            if not one_pass:
                images = next(batches)
                with autocast():
                    reconstruction = forward(images)[1]
            judge(images, reconstruction)

    return step


def ours(case: str, shipped: bool) -> Step:
    """A step of the training loop, its batches read before."""
    from autoencoder.config import DataConfig, ModelConfig, TrainAutoencoderConfig
    from autoencoder.data.sources import open_train_and_validation
    from autoencoder.objective_config import AdversarialConfig, KLConfig, ObjectiveConfig, PerceptualConfig
    from autoencoder.runtime.config import LogConfig, OptimizerConfig, TrainConfig
    from autoencoder.runtime.launch import build_accelerator
    from autoencoder.runtime.loop import Trainer
    from autoencoder.task import AutoencoderTask
    from autoencoder.training import build_module, lay_out

    with_distance, with_opponent = CASES[case]
    perceptual = PerceptualConfig(name="lpips", net="vgg", weights="random", weight=1.0) if with_distance else PerceptualConfig()
    train = TrainConfig(images="1M", batch_size=BATCH)
    config = TrainAutoencoderConfig(
        out="",
        data=DataConfig(source="demo", resolution=SIDE, workers=0),
        model=ModelConfig(preset="tiny", block_out_channels=WIDTHS, attention=True, norm_groups=32),
        objective=ObjectiveConfig(
            convention="ldm",
            kl=KLConfig(weight=KL_WEIGHT),
            perceptual=perceptual,
            adversarial=frame.players_at_once("step", clip_norm=None) if with_opponent else AdversarialConfig(),
        ),
        optimizer=OptimizerConfig() if shipped else OptimizerConfig(name="adamw", lr=LR, betas=(0.5, 0.9), weight_decay=0.01),
        train=train if shipped else dataclasses.replace(train, ema_halflife_images=None),
        log=LogConfig(every_images="1M"),
    )
    accelerator = build_accelerator(config.train)
    module = build_module(config)
    lay_out(module, config, accelerator)
    folder = Path(tempfile.mkdtemp())
    task = AutoencoderTask(config, module, *open_train_and_validation(config.data), accelerator, folder)
    trainer = Trainer(
        task, accelerator=accelerator, folder=folder, train=config.train, optimizer=config.optimizer, log=config.log,
        checkpoint=config.checkpoint, metrics=None, trackers=None,
    )  # fmt: skip
    batches = [batches for _, batches in itertools.islice(task.loader(0), 4)]
    numbers = itertools.count()

    def step() -> None:
        number = next(numbers)
        trainer._step(number, batches[number % len(batches)])

    return step


def loop(case: str, name: str) -> Step:
    """The step of that name."""
    if name in ("ours", "as shipped"):
        return ours(case, name == "as shipped")
    return plain(case, **{**PLAIN, **PARTS}[name])


def compare(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one case."""
    parts = [part for part in PARTS if CASES[case][1] or "one_gradient" not in PARTS[part]]
    names = [*PLAIN, *parts, "ours", "as shipped"]
    workers = {name: Worker(loop, case, name, threads=options.threads) for name in names}
    ceilings = {
        **{f"{precision} product": Worker(turns.product, precision, threads=options.threads) for precision in ("float32", "bfloat16")},
        "copy": Worker(turns.copy, threads=options.threads),
    }
    seconds = turns.rounds(workers | ceilings, number=options.rounds, steps=options.steps)
    unit = 1 if options.cpu_time else 0
    told: dict[str, Any] = {"rounds": options.rounds, "steps_a_round": options.steps, "loops": {}}
    for name, worker in workers.items():
        precision = "float32" if name == "people" else "bfloat16"
        rate = worker.gigaflops / ceilings[f"{precision} product"].gigaflops
        told["loops"][name] = {
            "milliseconds": turns.milliseconds(seconds[name], unit),
            "gigaflops": round(worker.gigaflops, 1),
            "share_of_the_matrix_rate": round(rate * turns.ratio(seconds[f"{precision} product"], seconds[name], unit), 3),
            "times_people": turns.ratio(seconds["people"], seconds[name], unit),
            "times_corrected": turns.ratio(seconds["corrected"], seconds[name], unit),
        }
    products = {
        name: round(worker.gigaflops / turns.milliseconds(seconds[name], unit), 3) for name, worker in ceilings.items() if worker.gigaflops
    }
    told["ceilings"] = {f"{name}, teraflop/s": rate for name, rate in products.items()}
    told["ceilings"]["copy, GB/s"] = round(2 * turns.COPIED / 1e6 / turns.milliseconds(seconds["copy"], unit), 1)
    for name, worker in workers.items():
        told["loops"][name]["peak_mib"] = round(worker.close())
    for worker in ceilings.values():
        worker.close()
    return told


def main() -> None:
    """Measure and write the result."""
    parser = frame.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of each in a round")
    parser.add_argument("--threads", type=int, default=0, help="threads of each; 0: as many as torch takes")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, which other load lengthens less, in place of wall-clock")
    parser.add_argument("--only", nargs="*", choices=CASES)
    options = parser.parse_args()

    import torch

    options.threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(options.threads)
    device = frame.device_name()
    file = frame.result_file("train-step", device)
    setting = {"widths": WIDTHS, "side": SIDE, "batch": BATCH, "seconds": "CPU" if options.cpu_time else "wall-clock"}
    result: dict[str, Any] = {**frame.made_with(device), "setting": setting, "cases": {}}
    for case in options.only or CASES:
        result["cases"][case] = compare(case, options)
        print(case, result["cases"][case], flush=True)
        frame.write(file, result)
    frame.say_written(file)


if __name__ == "__main__":
    main()
