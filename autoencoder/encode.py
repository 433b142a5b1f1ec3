"""`encode_dataset`: a data set of latents, once and for all."""

import shlex
import sys

from autoencoder.data.paths import check_source
from autoencoder.data.remote import is_remote
from autoencoder.latents.config import EncodeConfig
from autoencoder.latents.folder import LatentsFolder
from autoencoder.latents.worker import Worker
from autoencoder.model_path import check_model
from autoencoder.runtime import cli
from autoencoder.runtime.errors import ConfigError, UsageError
from autoencoder.runtime.memory import keep_freed
from autoencoder.runtime.own_class import find_class


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(lambda: _encode(argv))


def _encode(argv: list[str] | None) -> int:
    config = cli.parse(
        EncodeConfig, argv, prog="firststage encode_dataset", description="Encode images to a data set of latents.", stage="latents"
    )
    worker = Worker.of_config(config)
    if config.only != "finalize":
        check_model(config.model, "model", config.subfolder, config.variant)
        _check_images(config)
    # Before any thread has an arena of its own.
    keep_freed()
    folder = _folder(config, worker)
    try:
        from autoencoder.latents.encoding import encode_dataset

        code = encode_dataset(config, folder, worker)
    except UsageError as error:
        folder.withdraw()
        raise UsageError(worker.says(str(error))) from error
    finally:
        folder.close()
    if config.only == "plan":
        print(after_plan(sys.argv[1:] if argv is None else argv, config.append))
    return code


def after_plan(argv: list[str], append: bool) -> str:
    """The commands that make what this one has planned. The appended images are in the plan: the rest is as for any."""
    kept, rest = list[str](), list(argv)
    while rest:
        token = rest.pop(0)
        key = token.partition("=")[0]
        if key not in ("--only", "--append"):
            kept.append(token)
        elif token == key and rest and not rest[0].startswith("--"):
            rest.pop(0)
    given = [token.partition("=")[0] for token in argv]
    if append and "--append" not in given:  # but in a file
        kept.append("--append=false")
    base = shlex.join(["firststage", "encode_dataset", *kept])
    return (
        f"next, to make the shards: one process, or N at once on any machines, each with --worker I --workers N, I from 0 to N - 1\n"
        f"  {base} --only encode\nand once they are done\n  {base} --only finalize"
    )


def _folder(config: EncodeConfig, worker: Worker) -> LatentsFolder:
    if is_remote(config.out):
        from autoencoder.latents.remote import RemoteLatents

        return RemoteLatents(config.out, staging=config.staging, worker=worker.number)
    return LatentsFolder(config.out, dry=config.preflight, shared=worker.shared or config.only == "finalize")


def _check_images(config: EncodeConfig) -> None:
    if config.data.own.given:
        find_class(config.data.own, "data.own")
    elif config.data.source is not None:
        check_source(config.data.source, "data.source")
    else:
        raise ConfigError("data.source", None, "give the images: `demo`, a folder, a parquet or WebDataset glob, a hub name, or data.own")
