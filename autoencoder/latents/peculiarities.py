"""What rows of latents are like: which are equal, which lie far off, and what each storage type would cost them."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

DEVIATIONS = 6.0
"""Robust standard deviations beyond which a row lies far off."""
SHOWN = 20
"""Rows that are listed of each kind."""
_CHUNK = 256
TYPES = {"fp32": (23, -126), "fp16": (10, -14), "bf16": (7, -126)}
"""Bits of the mantissa that are stored, and the exponent of the smallest normal number."""


@dataclass(frozen=True)
class Measured:
    """A few numbers of each row, (n,)."""

    digest: np.ndarray
    """uint64: 64 bits of the BLAKE2b digest of its moments' bytes."""
    norm: np.ndarray
    """float32: root mean square of its normalised means; about 1."""
    kl: np.ndarray
    """float32: KL to the standard normal in nats a latent value; without log-variances 0."""

    @classmethod
    def of(cls, mean: np.ndarray, logvar: np.ndarray | None, statistics: dict[str, Any]) -> "Measured":
        """Of rows (n, c, h, w), normalised by the data set's statistics."""
        digest, norm, kl = np.empty(len(mean), np.uint64), np.empty(len(mean), np.float32), np.zeros(len(mean), np.float32)
        centre, std = (np.array(statistics[name], np.float32)[:, None, None] for name in ("mean", "std"))
        std = np.where(std > 0, std, 1)
        for first in range(0, len(mean), _CHUNK):
            some = slice(first, first + _CHUNK)
            values = mean[some].astype(np.float32)
            norm[some] = np.sqrt(np.square((values - centre) / std).mean((1, 2, 3)))
            if logvar is not None:
                variance = logvar[some].astype(np.float32)
                kl[some] = 0.5 * (np.square(values) + np.exp(variance) - 1 - variance).mean((1, 2, 3))
        for row in range(len(mean)):
            state = hashlib.blake2b(mean[row].tobytes(), digest_size=8)
            if logvar is not None:
                state.update(logvar[row].tobytes())
            digest[row] = int.from_bytes(state.digest(), "little")
        return cls(digest, norm, kl)

    @classmethod
    def joined(cls, parts: list["Measured"]) -> "Measured":
        """Of the rows of all parts, in their order."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("digest", "norm", "kl")))


def duplicates(digest: np.ndarray) -> tuple[int, list[list[int]]]:
    """How many rows repeat an earlier one, and some groups of places with equal digests, largest first."""
    order = np.argsort(digest, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(digest[order]) != 0])) if len(order) else np.empty(0, np.int64)
    counts = np.diff(starts, append=len(order))
    groups = np.argsort(-counts, kind="stable")[:SHOWN]
    shown = [order[starts[group] : starts[group] + min(counts[group], SHOWN)].tolist() for group in groups if counts[group] > 1]
    return len(order) - len(starts), shown


def far_off(values: np.ndarray, deviations: float = DEVIATIONS) -> np.ndarray:
    """Signed distance of each value from the median in robust standard deviations (1.4826 times the median absolute deviation, which is
    the standard deviation of a normal distribution), 0 within `deviations` and everywhere where at least half of the values are equal."""
    if not len(values):
        return np.zeros(0)
    centred = values.astype(np.float64) - np.median(values)
    scale = 1.4826 * np.median(np.abs(centred))
    distance = centred / scale if scale > 0 else np.zeros(len(values))
    return np.where(np.abs(distance) > deviations, distance, 0.0)


def rounding_error(values: np.ndarray, type: str) -> np.ndarray:
    """Root mean square of the error that rounding to a storage type makes, by value, float64: spacing / sqrt(12).

    The spacing of numbers with p bits of mantissa at 2**e <= |x| < 2**(e + 1) is 2**(e - p); rounding errors are uniform within half of it.
    """
    bits, least = TYPES[type]
    # frexp has 0.5 <= fraction < 1, and 0 for the exponent of zero.
    _, exponent = np.frexp(values.astype(np.float64))
    exponent = np.where(values == 0, least, np.maximum(exponent - 1, least))
    return np.exp2(exponent.astype(np.float64) - bits) / np.sqrt(12)


def rounded(values: np.ndarray, type: str) -> np.ndarray:
    """float32 values as they come back from a storage type (bf16 to nearest, ties to even)."""
    if type == "fp16":
        return values.astype(np.float16).astype(np.float32)
    if type == "bf16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return values.astype(np.float32)
