"""docs/performance.md says what the results in benchmarks/results say."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    performance = importlib.import_module("performance")
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert page.count("<!-- table:") == page.count("<!-- end -->") == len(performance.TABLES)
    assert performance.filled(page) == page, "run `python benchmarks/performance.py`"
    for name in ("performance", "frame"):
        sys.modules.pop(name)
