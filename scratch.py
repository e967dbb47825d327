"""Leaf: arrays that lie on disk while they are worked on, for work that is larger than memory.

Their room is taken at once: writing into a mapped file on a full disk would kill Python without a word.
"""

import os
import tempfile
from pathlib import Path

import numpy as np


def array_at(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """An .npy of zeros that is written in place; OSError where the disk has no room for it."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "rb+") as file:
        _take(file.fileno(), path.stat().st_size)
    return array


def nameless_array(folder: str | Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """An array in a file without a name, whose room is free again once nobody holds it, however the process ends."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        _take(file.fileno(), max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize))
        return np.memmap(file, dtype, "r+", shape=shape)


def _take(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    elif os.fstat(descriptor).st_size < size:
        os.truncate(descriptor, size)
