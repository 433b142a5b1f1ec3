"""The tables of docs/performance.md from the results in benchmarks/results: what stands between the page's markers is made here.

`make bench` runs it last. It measures nothing.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import frame

PAGE = frame.ROOT / "docs" / "performance.md"
Rows = list[list[str]]


def table(head: list[str], rows: Rows) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def train_step(result: dict[str, Any]) -> str:
    """Loops by case, and the ceilings of the machine in the same run."""
    parts = []
    for case, told in result["cases"].items():
        head = ["", "ms a step", "times `people`", "times `corrected`", "of the matrix rate", "peak MiB"]
        rows = [
            [
                name,
                f"{loop['milliseconds']:,.0f}",
                f"{loop['times_people']:.2f}",
                f"{loop['times_corrected']:.2f}",
                f"{loop['share_of_the_matrix_rate']:.0%}",
                f"{loop['peak_mib']:,}",
            ]
            for name, loop in told["loops"].items()
        ]
        ceilings = "; ".join(f"{name} {rate:,.3g}" for name, rate in told["ceilings"].items())
        parts.append(f"**{case}**\n\n{table(head, rows)}\n\nIn the same rounds: {ceilings}.")
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"train-step": train_step}
"""By benchmark."""


def section(benchmark: str) -> str:
    """The tables of a benchmark, of each device that it was run on."""
    parts = []
    for file in sorted(frame.RESULTS.glob(f"{benchmark}-*.json")):
        result = json.loads(file.read_text())
        seconds = result.get("setting", {}).get("seconds", "wall-clock")
        versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "diffusers") if name in result["versions"])
        parts.append(f"{result['device']}; {versions}; {seconds} seconds:\n\n{TABLES[benchmark](result)}")
    return "\n\n".join(parts) or "Not measured yet."


def filled(page: str) -> str:
    """The page with what stands between each pair of markers made anew.

    Raises:
        KeyError: a marker of a benchmark that has no table.
    """

    def made(match: re.Match[str]) -> str:
        return f"{match[1]}\n{section(match[2])}\n{match[3]}"

    return re.sub(r"(<!-- table: ([\w-]+) -->)\n.*?\n?(<!-- end -->)", made, page, flags=re.DOTALL)


def main() -> None:
    """Write the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written to {PAGE.relative_to(frame.ROOT)}")


if __name__ == "__main__":
    main()
