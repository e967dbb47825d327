"""Leaf: arrays that lie on disk while they are worked on, for work that is larger than memory.

Their room is taken at once: writing into a mapped file on a full disk would kill Python without a word.
"""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from checks import UsageError
from files import says_full


def array_at(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """An .npy of zeros that is written in place; UsageError where the disk has no room for it."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "rb+") as file:
        _take(file.fileno(), path.stat().st_size, path.parent)
    return array


def nameless_array(folder: str | Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """An array in a file without a name, whose room is free again once nobody holds it, however the process ends.

    UsageError where the disk has no room for it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        _take(file.fileno(), max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize), Path(folder))
        return np.memmap(file, dtype, "r+", shape=shape)


def _take(descriptor: int, size: int, folder: Path) -> None:
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        elif os.fstat(descriptor).st_size < size:
            os.truncate(descriptor, size)
    except OSError as error:
        if not says_full(error):
            raise
        free = shutil.disk_usage(folder).free / 2**20
        raise UsageError(
            f"{folder} needs {size / 2**20:.0f} MiB for a while and has {free:.0f}: make room there, or name another "
            "folder with --inference.calibration"
        ) from error
