"""What the C library does with memory that is freed."""

import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_KEPT = 2**30
"""Blocks below this many bytes are kept (glibc takes an int)."""


def keep_freed() -> None:
    """Have glibc keep what is freed for the next allocation, in one arena that all threads share; elsewhere this does nothing.

    By default each feature map of some MiB is mapped anew and unmapped after use. The kernel clears its pages every time, which costs a
    network of narrow convolutions as much as its arithmetic. No value changes; the process stays at the most memory that it has needed.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Other arenas consist of heaps of 64 MiB, which are unmapped as soon as they are empty.
        for parameter, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, _KEPT), (_TRIM_THRESHOLD, 2 * _KEPT - 1)):
            mallopt(parameter, value)
