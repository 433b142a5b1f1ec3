"""Randomness as a function of progress: a generator for (seed, stream, position), never a state that travels.

The draw for the i-th image of a run is the same whatever the process, the batch split, the number of
loader workers or the point where a run was resumed.
"""

import zlib

import numpy as np


def generator(seed: int, stream: str, position: int) -> np.random.Generator:
    """An independent NumPy generator for one position of one named stream.

    Philox (Salmon et al. 2011) is counter-based: seed and stream make its key, the position the high
    words of its counter, so that each position has 2**128 draws of its own.
    """
    key = np.array([seed, zlib.crc32(stream.encode())], dtype=np.uint64)
    counter = np.array([0, 0, position, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
