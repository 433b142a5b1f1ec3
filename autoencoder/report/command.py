"""`report`: one page of figures, curves and pictures from one or several runs of either stage."""

from dataclasses import dataclass
from pathlib import Path

from autoencoder.data.remote import check_local
from autoencoder.runtime import cli
from autoencoder.runtime.errors import require

DESCRIPTION = "Show runs of either stage or both on one self-contained HTML page; those of one stage side by side."


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which runs to show, and where."""

    runs: list[str]
    """Folders of runs (the --out of a training command)."""
    out: str
    """The HTML file to write."""

    def __post_init__(self) -> None:
        check_local(self.out, "out")
        require(bool(self.runs), "runs", self.runs, "give the folder of at least one run")
        require(not Path(self.out).is_dir(), "out", self.out, "that is a folder; give the name of an HTML file")
        parent = Path(self.out).absolute().parent
        require(parent.is_dir(), "out", self.out, f"the folder {parent} does not exist; make it first")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(lambda: _report(argv))


def _report(argv: list[str] | None) -> int:
    config = cli.parse(ReportConfig, argv, prog="firststage report", description=DESCRIPTION, positional="runs")

    from autoencoder.report.page import write_report

    write_report([Path(run) for run in config.runs], Path(config.out))
    print(f"written to {config.out}")
    return 0
