"""`train_autoencoder`: parse, check, and only then import what is heavy."""

from pathlib import Path

from autoencoder.config import TrainAutoencoderConfig
from autoencoder.data.paths import check_source
from autoencoder.lpips_weights import lpips_weights_path
from autoencoder.model_path import check_model
from autoencoder.runtime import cli
from autoencoder.runtime.processes import is_main_process
from autoencoder.runtime.run_folder import RunFolder


def check(config: TrainAutoencoderConfig) -> None:
    """Refuse what can be refused without torch: missing paths and weights."""
    check_source(config.data.source, "data.source")
    if config.data.validation_source is not None:
        check_source(config.data.validation_source, "data.validation_source")
    if config.model.pretrained is not None:
        check_model(config.model.pretrained, "model.pretrained", config.model.subfolder)
    if config.init_from is not None and not any((Path(config.init_from) / f"{n}.safetensors").is_file() for n in ("ema", "model")):
        check_model(config.init_from, "init_from")
    perceptual = config.objective.perceptual
    if perceptual.name == "lpips":
        lpips_weights_path(perceptual.net, perceptual.weights)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(lambda: _train(argv))


def _train(argv: list[str] | None) -> int:
    config = cli.parse(TrainAutoencoderConfig, argv, prog="firststage train_autoencoder", description="Train a KL-VAE on images.")
    check(config)
    if config.preflight:
        from autoencoder.training import preflight

        return preflight(config)
    # One process owns the folder; the others learn from it where to go on.
    run = RunFolder.open(config.out, config, resume=config.resume) if is_main_process() else None
    try:
        from autoencoder.training import train

        return train(config, run)
    finally:
        if run is not None:
            run.close()
