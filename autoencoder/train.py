"""`train_autoencoder`: parse, check, and only then import what is heavy."""

from autoencoder.config import IDLE, TrainAutoencoderConfig
from autoencoder.data.paths import check_source
from autoencoder.lpips_weights import lpips_weights_path
from autoencoder.model_path import check_model, checkpoint_weights
from autoencoder.runtime import cli
from autoencoder.runtime.own_class import find_class
from autoencoder.runtime.training_command import start


def check(config: TrainAutoencoderConfig) -> None:
    """Refuse what can be refused before torch is imported: missing paths, weights and classes of the user's own (which import it)."""
    if config.data.own.given:
        find_class(config.data.own, "data.own")
    else:
        check_source(config.data.source, "data.source")
    if config.data.validation_own.given:
        find_class(config.data.validation_own, "data.validation_own")
    if config.data.validation_source is not None:
        check_source(config.data.validation_source, "data.validation_source")
    if config.model.pretrained is not None:
        check_model(config.model.pretrained, "model.pretrained", config.model.subfolder, config.model.variant)
    if config.init_from is not None and checkpoint_weights(config.init_from) is None:
        check_model(config.init_from, "init_from")
    perceptual = config.objective.perceptual
    if perceptual.name == "lpips":
        lpips_weights_path(perceptual.net, perceptual.weights)
    adversarial = config.objective.adversarial
    if adversarial.on and adversarial.own.given:
        find_class(adversarial.own, "objective.adversarial.own", channels=config.data.channels)
    if perceptual.name == "own":
        find_class(perceptual.own, "objective.perceptual.own")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(lambda: _train(argv))


def _train(argv: list[str] | None) -> int:
    config = cli.parse(
        TrainAutoencoderConfig,
        argv,
        prog="firststage train_autoencoder",
        description="Train a KL-VAE on images.",
        stage="autoencoder",
        idle=IDLE,
    )
    check(config)
    return start(config, "autoencoder.training")
