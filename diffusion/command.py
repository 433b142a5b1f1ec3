"""`firststage COMMAND ...`: finds the command and hands it the rest of the line."""

import importlib
import sys

from autoencoder import __version__
from autoencoder.runtime.config_file import closest

COMMANDS = {
    "inspect_data": ("autoencoder.inspect_data", "look at images: bands, ranges, missing values; suggest data settings"),
    "train_autoencoder": ("autoencoder.train", "train a KL-VAE on images"),
    "evaluate_autoencoder": ("diffusion.evaluate", "measure an autoencoder: PSNR, SSIM, NLL, KL, bits/dim, with intervals; with its prior"),
    "reconstruct": ("autoencoder.reconstruct", "write images beside their reconstructions"),
    "export_autoencoder": ("autoencoder.export", "write a checkpoint's weights for other tools"),
    "encode_dataset": ("autoencoder.encode", "encode images to a data set of latents"),
    "export_latents": ("autoencoder.export_latents", "write a data set of latents as parquet or WebDataset"),
    "verify_latents": ("autoencoder.verify_latents", "check a data set of latents: files, rows, statistics, images; mend it"),
    "train_diffusion": ("diffusion.train", "train a latent diffusion model and export a stock pipeline"),
    "export_pipeline": ("diffusion.export", "write a pipeline with variants and a model card, and publish it"),
    "sample": ("diffusion.sample", "draw images from a pipeline"),
    "report": ("autoencoder.report.command", "make one HTML page of one run or several"),
}
"""Module with the command's `main(argv) -> int`, and what the command does."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code, 2 for one that does not exist."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"firststage {__version__}")
        return 0
    # Either way of writing a command.
    if (known := name.replace("-", "_")) not in COMMANDS:
        near = closest(name, COMMANDS)
        hint = f"closest: {near[0]}" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: {name}: no such command; {hint}", file=sys.stderr)
        return 2
    code: int = importlib.import_module(COMMANDS[known][0]).main(rest)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    usage = "usage: firststage COMMAND [--config FILE] [--KEY VALUE ...]"
    return "\n".join([usage, "", "commands:", *lines, "", "firststage COMMAND --help lists a command's settings."])
