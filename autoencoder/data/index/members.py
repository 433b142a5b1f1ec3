"""The members of a tar: one pass over its headers, kept in the user's cache."""

import hashlib
import os
import re
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

import pyarrow as pa

from autoencoder.data import remote
from autoencoder.data.index.headers import BLOCK, Member, members
from autoencoder.data.index.listed import Listed
from autoencoder.data.index.table import VERSION, map_table, table_of, write_table
from autoencoder.runtime.errors import ConfigError

# fmt: off
TEXT = (
    "caption", "cls", "cls2", "csv", "id", "index", "inx", "json", "jsonl", "label", "md", "text", "transcript", "txt",
    "xml", "yaml", "yml",
)
# fmt: on
"""Endings of members that are text."""
SHORT = 64
"""Bytes of a text that is kept with its place: class names and numbers are no longer."""
_SCHEMA = pa.schema(
    [("key", pa.large_binary()), ("field", pa.string()), ("offset", pa.int64()), ("bytes", pa.int64()), ("text", pa.binary())]
)
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
WORTH_KEEPING = 0.5
"""Seconds that reading a tar's headers takes, below which its members are not kept in the cache."""
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


def members_of(tar: Listed, key: str) -> pa.Table:
    """Key, field, place and size of each file in a tar, in order, and the content of short texts.

    ConfigError under `key` where it is no whole tar, or a compressed one.
    The key of `dir/name.seg.png` is `dir/name`, its field `seg.png`: they part at the first dot, as WebDataset has it. Hidden files and
    those without an ending are left out.
    """
    kept = _kept(tar)
    if kept is not None:
        with suppress(OSError, pa.ArrowInvalid):
            return map_table(kept)
    with remote.open_file(tar.path) if remote.is_remote(tar.path) else open(tar.path, "rb") as file:
        start = time.monotonic()
        table = table_of(_members(file, tar, key), _SCHEMA)
    if kept is not None and time.monotonic() - start > WORTH_KEEPING:
        _keep(table, kept)
    return table


def parted(name: str) -> tuple[str, str] | None:
    """Key and field of a member's name; None for hidden files and those without an ending."""
    found = _NAME.fullmatch(name)
    return None if found is None or found[1].rpartition("/")[2].startswith("__") else (found[1], found[2])


@cache
def is_text(field: str) -> bool:
    """Whether a field is text, by its last ending."""
    return field.rpartition(".")[2].lower() in TEXT


def _members(file: IO[bytes], tar: Listed, key: str) -> Iterator[tuple[bytes, str, int, int, bytes | None]]:
    start = file.read(8)
    file.seek(0)
    if start.startswith(_COMPRESSED):
        raise ConfigError(key, tar.path, "is compressed, and images cannot be read from the middle of it; unpack it to a plain .tar")
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
            for member in members(file, archive):
                parts = parted(member.name)
                if parts is None:
                    continue
                if not member.whole:
                    remedy = "pack it anew with --dereference --hard-dereference and without --sparse"
                    raise ConfigError(key, tar.path, f"{member.name} is a link or stored as a sparse file; {remedy}")
                short = is_text(parts[1]) and member.bytes <= SHORT
                text = _content(file, member) if short else None
                yield parts[0].encode("utf-8", "surrogateescape"), parts[1], member.offset, member.bytes, text
            _check_end(file, archive.offset, tar, key)
    except tarfile.TarError as error:
        raise ConfigError(key, tar.path, f"is no whole tar: {error}; pack it again, or leave it out") from error


def _content(file: IO[bytes], member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.bytes)


def _check_end(file: IO[bytes], end: int, tar: Listed, key: str) -> None:
    """That the tar ends where its last header was found: tarfile takes a broken header in the middle for the end."""
    file.seek(end)
    block = file.read(BLOCK)
    if end > tar.bytes or any(block):
        raise ConfigError(key, tar.path, f"is no whole tar: no header at byte {end:,}, where one should be; pack it again, or leave it out")


def _kept(tar: Listed) -> Path | None:
    """Where the members of this version of a tar are kept; None where nothing tells a version from another."""
    if not tar.version:
        return None
    path = tar.path if remote.is_remote(tar.path) else os.path.abspath(tar.path)
    name = hashlib.sha256(f"{VERSION}\0{path}\0{tar.bytes}\0{tar.version}".encode("utf-8", "surrogateescape")).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "firststage" / "tars" / f"{name[:40]}.arrow"


def _keep(table: pa.Table, path: Path) -> None:
    """Write the table whole or not at all; a cache that cannot be written is done without."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(table, beside)
        os.replace(beside, path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
