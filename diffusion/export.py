"""`export_pipeline`: a finished run's pipeline as a folder to publish, with half-precision variants and a model card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from autoencoder.data.remote import check_local
from autoencoder.export_folder import check_place
from autoencoder.publishing import UNPUBLISHED, check_publishing
from autoencoder.runtime import cli
from autoencoder.runtime.errors import ConfigError, require
from diffusion.pipeline_path import check_pipeline, pipeline_folder


@dataclass(frozen=True, kw_only=True)
class ExportPipelineConfig:
    """Write a pipeline as a folder to publish, and publish it."""

    pipeline: str
    """A finished diffusion run, or a DiTPipeline folder."""
    out: str
    """Folder to write: new, empty, or an earlier export that nobody has changed."""
    variants: list[Literal["fp16", "bf16"]] = ()  # type: ignore[assignment]
    """Half-precision weights beside the fp32 ones, for `from_pretrained(..., variant="fp16")`: `fp16`, `bf16`."""
    account: str | None = None
    """JSON of `evaluate_autoencoder --pipeline`, whose account goes into the model card; refused where it is of other weights."""
    license: str | None = None
    """Licence of the weights for the model card, by the hub's identifier (`apache-2.0`, `cc-by-4.0`, `other`, ...); null names none, or the
    one in the pipeline's card."""
    push_to_hub: str | None = None
    """Publish what is written as this repository of the hub, `OWNER/NAME`, made where it does not exist. Takes a token (`hf auth login`,
    or HF_TOKEN)."""
    private: bool = False
    """Make it a private repository."""
    dry_run: bool = False
    """Write `out`, say what `push_to_hub` would send, and send nothing."""

    def __post_init__(self) -> None:
        check_local(self.out, "out")
        require(len(set(self.variants)) == len(self.variants), "variants", list(self.variants), "give each once")
        check_publishing(self.license, self.push_to_hub)
        check_place(self.out)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(lambda: _export(argv))


def _export(argv: list[str] | None) -> int:
    config = cli.parse(
        ExportPipelineConfig,
        argv,
        prog="firststage export_pipeline",
        description="Write a pipeline as a folder to publish, with variants and a model card, and publish it.",
        idle=(UNPUBLISHED,),
    )
    check_pipeline(config.pipeline, "pipeline", hub=False)
    folder = pipeline_folder(config.pipeline)
    assert folder is not None
    if config.account is not None and not Path(config.account).is_file():
        raise ConfigError("account", config.account, "no such file; give what `evaluate_autoencoder --pipeline P --out F.json` wrote")
    from diffusion.exporting import export

    export(config, folder)
    return 0
