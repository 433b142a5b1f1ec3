"""`export_latents`: a data set of latents as files that other loaders read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from autoencoder.data.remote import check_local
from autoencoder.latents.check import check_latents
from autoencoder.runtime import cli
from autoencoder.runtime.errors import require


@dataclass(frozen=True, kw_only=True)
class ExportLatentsConfig:
    """Write a data set of latents for other loaders, a file for each of its shards."""

    latents: str
    """A finished folder of latents (the --out of encode_dataset)."""
    out: str
    """Folder to write; an export that was left half done goes on with the next file."""
    format: Literal["parquet", "webdataset"] = "parquet"
    """`parquet`: `mean` and `logvar` as lists of fixed size, their shape in the schema's metadata, beside label, id, name and the other
    columns. `webdataset`: tars of `ID.mean.npy`, `ID.logvar.npy`, `ID.cls` and `ID.json`."""
    dtype: Literal["fp32", "fp16"] | None = None
    """What is written; null keeps what is stored. fp16 is half the size, at a relative rounding of 5e-4."""

    def __post_init__(self) -> None:
        check_local(self.out, "out")
        same = Path(self.out).absolute() == Path(self.latents).absolute()
        require(not same, "out", self.out, "give another folder than that of the latents")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(lambda: _export(argv))


def _export(argv: list[str] | None) -> int:
    config = cli.parse(
        ExportLatentsConfig, argv, prog="firststage export_latents", description="Write a data set of latents for other loaders."
    )
    check_latents(config.latents, "latents")
    from autoencoder.latents.exporting import export_latents

    return export_latents(config)
