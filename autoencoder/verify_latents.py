"""`verify_latents`: whether a data set of latents is whole and what its manifest says, and what its rows are like."""

from dataclasses import dataclass, field
from pathlib import Path

from autoencoder.data.paths import check_source
from autoencoder.data_config import check_own
from autoencoder.latents.check import MANIFEST, check_latents
from autoencoder.runtime import cli
from autoencoder.runtime.errors import require
from autoencoder.runtime.own_class import OwnClass, find_class


@dataclass(frozen=True, kw_only=True)
class VerifyDataConfig:
    """The images that the latents are of."""

    source: str | None = None
    """Where they are now, as for encode_dataset; null: where they were then. Of latents of several sources, those that it is of."""
    own: OwnClass = field(default_factory=OwnClass)
    """Instead of `source`, a class of your own."""

    def __post_init__(self) -> None:
        check_own(self.own, source=self.source)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check a data set of latents against its manifest, its records and its images. Exit code 1 where anything is damaged."""

    latents: str
    """A finished folder of latents (the --out of encode_dataset)."""
    decode: int = 0
    """Rows, evenly spread, that are decoded, and whose crops are cut and encoded again to compare; 0 needs no images."""
    data: VerifyDataConfig = field(default_factory=VerifyDataConfig)
    """Images, for `decode`."""
    mend: bool = False
    """Delete the records of damaged shards, and the manifest: the same encode_dataset command then makes these shards again."""
    threads: int | None = None
    """Shards that are read at once, each of which is in memory whole; null: one a core, at most 8."""
    out: str | None = None
    """JSON file for all that was found."""

    def __post_init__(self) -> None:
        require(self.decode >= 0, "decode", self.decode, "give 0 or more rows")
        require(self.threads is None or self.threads >= 1, "threads", self.threads, "give at least 1, or null")
        given = self.data.own.class_path or self.data.source
        require(given is None or self.decode > 0, "data.source", given, "give decode, the number of rows to compare, with it")
        parent = Path(self.out).absolute().parent if self.out else Path()
        require(parent.is_dir(), "out", self.out, f"the folder {parent} does not exist; make it first")
        require(self.out is None or not Path(self.out).is_dir(), "out", self.out, "a folder; give the name of a JSON file")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(lambda: _verify(argv))


def _verify(argv: list[str] | None) -> int:
    config = cli.parse(
        VerifyConfig, argv, prog="firststage verify_latents", description="Check a data set of latents: files, rows, statistics, images."
    )
    if not (Path(config.latents) / MANIFEST).is_file():
        check_latents(config.latents, "latents")
    if config.data.own.given:
        find_class(config.data.own, "data.own")
    elif config.data.source is not None:
        check_source(config.data.source, "data.source")
    from autoencoder.latents.verification import verify_latents

    return verify_latents(config)
