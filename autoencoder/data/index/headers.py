"""The members of a tar by its headers: plain ones read here, all others by `tarfile`, which takes several times as long for each."""

import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

BLOCK = 512
_PLAIN = (b"0", b"\0")
_USTAR, _GNU = b"ustar\x0000", b"ustar  \0"


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    """Of its content."""
    bytes: int
    whole: bool
    """Whether its content stands there as it is: it is no link, and not sparse."""


def members(file: IO[bytes], archive: tarfile.TarFile) -> Iterator[Member]:
    """The files of an open tar, in order, without its folders; `archive.offset` then is where its end was found. Raises TarError."""
    first = archive.next()
    if first is None:
        return
    yield from _of(first)
    while True:
        # It would keep every member that it has seen.
        archive.members.clear()  # type: ignore[attr-defined]
        file.seek(archive.offset)
        # Headers for all that follow change what plain ones say.
        member = None if archive.pax_headers else _plain(file.read(BLOCK), archive.offset)
        if member is not None:
            archive.offset = member.offset + -(-member.bytes // BLOCK) * BLOCK
            yield member
            continue
        # Only from elsewhere `tarfile` looks whether the file goes so far.
        file.seek(0)
        found = archive.next()
        if found is None:
            return
        yield from _of(found)


def _of(found: tarfile.TarInfo) -> Iterator[Member]:
    if not found.isdir():
        yield Member(found.name, found.offset_data, found.size, found.isreg() and not found.issparse())


def _plain(block: bytes, place: int) -> Member | None:
    """The member of a header of 512 bytes at `place` (POSIX.1-1988, ustar); None for all but a regular file of a name of at most 100 bytes
    and a size in octal digits, whose check sum is right."""
    if len(block) < BLOCK or block[156:157] not in _PLAIN or block[257:265] not in (_USTAR, _GNU) or block[345]:
        return None
    name, size, told = block[:100].rstrip(b"\0"), block[124:136].rstrip(b" \0"), block[148:156].rstrip(b" \0")
    if not name or b"\0" in name or name.endswith(b"/") or not (size.isdigit() and told.isdigit()):
        return None
    try:
        if int(told, 8) != _sum(block[:148]) + 8 * ord(" ") + _sum(block[156:384]) + _sum(block[384:]):
            return None
        return Member(name.decode("utf-8", "surrogateescape"), place + BLOCK, int(size, 8), True)
    except ValueError:
        return None


def _sum(data: bytes) -> int:
    """The sum of at most 256 bytes: what Adler-32 (RFC 1950) has in its lower half, less 1, modulo 65521."""
    return (zlib.adler32(data) & 0xFFFF) - 1
