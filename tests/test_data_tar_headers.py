"""Headers of tars: what is read of them without `tarfile` is what it reads, whole or damaged."""

import io
import tarfile

import numpy as np
import pytest

from autoencoder.data.index import headers
from tests.source_files import tar

NAMES = ["0001.png", "a/0001.txt", "a" * 96 + ".cls", "d/" + "b" * 95 + ".cls", "c/" * 60 + "1.png", "grün/ä.png", "empty.txt", "2.png"]


def read(data: bytes) -> list[tuple[str, int, int, bool]] | str:
    """What `members` finds, or the name of its error."""
    file = io.BytesIO(data)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            return [tuple(member) for member in headers.members(file, archive)]
    except tarfile.TarError as error:
        return str(error)


def reference(data: bytes) -> list[tuple[str, int, int, bool]] | str:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            return [(m.name, m.offset_data, m.size, m.isreg() and not m.issparse()) for m in archive if not m.isdir()]
    except tarfile.TarError as error:
        return str(error)


def made(format: int) -> bytes:
    """A tar of odd names, a folder and two links."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for k, name in enumerate(NAMES):
            member = tarfile.TarInfo(name)
            # Of sizes that fill their last block and that do not.
            member.size, member.mtime = (0, 512, 513, 1000, 1024, 3)[k % 6], 1_700_000_000.5 if format == tarfile.PAX_FORMAT else 1
            archive.addfile(member, io.BytesIO(bytes(member.size)))
            other = tarfile.TarInfo(f"other{k}")
            other.type, other.linkname = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)[k % 3], "0001.png"
            archive.addfile(other)
    return file.getvalue()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(format: int) -> None:
    data = made(format)
    found = reference(data)
    assert isinstance(found, list) and [member[0] for member in found if member[3]] == NAMES
    assert read(data) == found


def test_headers_for_all_that_follow_are_obeyed() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"path": "renamed.png"}) as archive:
        for name in ("1.png", "2.png"):
            archive.addfile(tarfile.TarInfo(name))
    assert read(file.getvalue()) == reference(file.getvalue())


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_damaged_headers_are_what_tarfile_makes_of_them(format: int) -> None:
    whole = tar([(f"{k}.png", bytes(600)) for k in range(4)], format=format)
    rng = np.random.default_rng(0)
    for trial in range(400):
        damaged = bytearray(whole)
        # A header's own bytes, past the first member's: name, size, check sum, type, link's name, magic, prefix.
        fields = [*range(10), *range(124, 136), *range(148, 158), *range(257, 265), 345, 400]
        place = 3 * 512 * int(rng.integers(1, 4)) + int(rng.choice(fields))
        damaged[place] ^= 1 << int(rng.integers(8))
        if trial % 2:  # with the check sum that fits
            header = place // 512 * 512
            damaged[header + 148 : header + 156] = b" " * 8
            damaged[header + 148 : header + 156] = b"%06o\0 " % sum(damaged[header : header + 512])
        assert read(bytes(damaged)) == reference(bytes(damaged))
    for length in range(0, len(whole), 100):
        assert read(whole[:length]) == reference(whole[:length])


def test_plain_headers_are_read_without_tarfile(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tar([(f"{k}.png", bytes(600)) for k in range(50)])
    seen, original = [], tarfile.TarFile.next

    def counted(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
        seen.append(archive.offset)
        return original(archive)

    monkeypatch.setattr(tarfile.TarFile, "next", counted)
    assert len(read(data)) == 50
    # While it is opened, the first member again, and the end.
    assert len(seen) == 3
