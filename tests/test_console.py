"""What a line shows where there is not room for all: on real terminals of several widths, with and without a bar."""

import fcntl
import os
import re
import select
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from autoencoder.runtime.console import Console

TOTAL = 5_000_000
ACCOUNT = {"nll_nats": 2410.4, "kl_nats": 401.2, "elbo_nats": -2811.6, "bits_per_dim": 3.512, "perceptual": 0.1234, "loss": 2823.0}
GAME = {"adversarial": 0.6931, "discriminator_accuracy": 0.7123}
LINE = {
    80: ["NLL 2,410", "KL 401.2", "D right 0.7123"],
    100: ["NLL 2,410", "KL 401.2", "adversarial 0.6931", "D right 0.7123"],
    140: ["NLL 2,410", "KL 401.2", "3.512 bits/dim", "adversarial 0.6931", "D right 0.7123", "123 img/s", "8h30m left"],
}
"""Of 1,234,567 / 5,000,000 images."""
BAR = {
    80: ["NLL 2,410", "D right 0.7123"],
    100: ["NLL 2,410", "KL 401.2", "D right 0.7123"],
    140: ["NLL 2,410", "KL 401.2", "3.512 bits/dim", "adversarial 0.6931", "D right 0.7123"],
}


@contextmanager
def terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A pseudo terminal of this width as stderr; what was written there is in the list at the end."""
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    said: list[str] = []
    with os.fdopen(writer, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        yield said
        stderr.flush()
        written = b""
        while select.select([reader], [], [], 0.2)[0]:
            written += os.read(reader, 10_000)
    os.close(reader)
    said.append(written.decode())


def shown(columns: int, scalars: dict[str, float], monkeypatch: pytest.MonkeyPatch, *, bar: bool) -> str:
    clock = iter([0.0, 0.0, 10_000.0])
    with terminal(columns, monkeypatch) as said, Console(TOTAL, shown=True, bar=bar) as console:
        if bar:
            console.advance(1_234_567)
        else:
            monkeypatch.setattr("autoencoder.runtime.console.time.monotonic", lambda: next(clock))
            console.line("train", 4567, scalars)
        console.line("train", 1_234_567, scalars)
    return [line for line in re.split(r"[\r\n]+", said[0]) if line.strip()][-1].rstrip()


@pytest.mark.parametrize("columns", [80, 100, 140])
@pytest.mark.parametrize("bar", [False, True])
def test_while_the_discriminator_plays_its_accuracy_is_on_every_line(columns: int, bar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    line = shown(columns, ACCOUNT | GAME, monkeypatch, bar=bar)
    assert len(line) <= columns
    wanted = (BAR if bar else LINE)[columns]
    assert [line.index(figure) for figure in wanted] == sorted(line.index(figure) for figure in wanted)


@pytest.mark.parametrize(("columns", "figures"), [(80, "NLL 2,410  KL 401.2"), (100, "NLL 2,410  KL 401.2  3.512 bits/dim")])
def test_without_one_the_account_has_the_room(columns: int, figures: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for bar in (False, True):
        line = shown(columns, ACCOUNT, monkeypatch, bar=bar)
        assert len(line) <= columns
        assert figures in line


def test_a_file_has_lines_of_120_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "stderr").open("w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        Console(TOTAL, shown=True, bar=True).line("train", 0, ACCOUNT | GAME)
    line = (tmp_path / "stderr").read_text().rstrip()
    assert "NLL 2,410  KL 401.2  3.512 bits/dim  adversarial 0.6931  D right 0.7123" in line
    assert len(line) <= 120
