"""PNGs of 16-bit colour, of which Pillow keeps 8 bits (PNG specification, third edition, W3C 2025)."""

import struct
import zlib

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER = 29
"""Bytes up to the header's last field."""
_SAMPLES = {2: 3, 4: 2, 6: 4}
"""Samples of a pixel by colour type: RGB, grey with opacity, RGBA."""


def is_deep_png(start: bytes) -> bool:
    """Whether a file that starts so is a PNG of 16-bit colour or opacity that is not interlaced."""
    if not start.startswith(SIGNATURE) or len(start) < HEADER:
        return False
    depth, colour, _, _, interlaced = start[24:HEADER]
    return depth == 16 and colour in _SAMPLES and not interlaced


def read_deep_png(data: bytes) -> np.ndarray:
    """Samples (H, W, 2 to 4), uint16; ValueError or zlib's error for a broken file."""
    width, height = struct.unpack(">II", data[16:24])
    sample_bytes = 2 * _SAMPLES[data[25]]
    rows = zlib.decompress(b"".join(_chunks(data, b"IDAT")))
    if len(rows) != height * (1 + width * sample_bytes):
        raise ValueError(f"{len(rows)} bytes of pixels do not make {width} x {height}")
    filtered = np.frombuffer(rows, np.uint8).reshape(height, -1)
    plain = _unfilter(filtered[:, 0], filtered[:, 1:].reshape(height, width, sample_bytes))
    return plain.view(">u2").astype(np.uint16)


def _chunks(data: bytes, wanted: bytes) -> list[bytes]:
    """Contents of the chunks of one kind (section 5.3: length, kind, content, check sum)."""
    found, place = [], len(SIGNATURE)
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] == wanted:
            found.append(data[place + 8 : place + 8 + length])
        place += 12 + length
    return found


def _unfilter(kinds: np.ndarray, filtered: np.ndarray) -> np.ndarray:
    """Section 9.2: each byte (H, W, bytes of a pixel) plus, modulo 256, what its row's filter predicts from a (left), b (above), c (both).

    A pixel depends on those left of it and above it, so that all of an anti-diagonal are done at once.
    """
    if kinds.max() > 4:
        raise ValueError(f"filter {kinds.max()} does not exist")
    height, width, _ = filtered.shape
    plain = np.zeros((height + 1, width + 1, filtered.shape[2]), np.int16)
    for diagonal in range(height + width - 1):
        row = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        column = diagonal - row
        a, b, c = plain[row + 1, column], plain[row, column + 1], plain[row, column]
        by_kind = (np.zeros_like(a), a, b, (a + b) // 2, _paeth(a, b, c))
        plain[row + 1, column + 1] = (filtered[row, column] + np.choose(kinds[row, None], by_kind)) & 255
    return np.ascontiguousarray(plain[1:, 1:].astype(np.uint8))


def _paeth(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Section 9.4: of a, b, c the one nearest to a + b - c, the first at a tie."""
    to_a, to_b, to_c = abs(b - c), abs(a - c), abs(a + b - 2 * c)
    nearest: np.ndarray = np.where((to_a <= to_b) & (to_a <= to_c), a, np.where(to_b <= to_c, b, c))
    return nearest
