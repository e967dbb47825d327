"""Leaf: samples as rows of one .npy, found by their keys; a row is believed by its checksum and its key alone.

    {"checksum", "key", "digest", "fingerprint", "shape", "image" float32 (k H, k W), "mask" bits of (k H, k W), ...}

Rows are read by their position, not mapped: memory stays constant, and a file that is cut short under a map kills
Python without a word. Writers keep others from writing meanwhile; readers need no lock.
"""

import os
import shutil
import threading
import weakref
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from holding import take
from ledger import KEY, Ledger, private

BINARY = getattr(os, "O_BINARY", 0)  # Windows would turn every newline into two bytes
HEADER = 1024  # bytes before the first row
CHECKSUM = 4  # bytes at the beginning of a row


class Sample(NamedTuple):
    """One radiograph at the size of the model, or k times as large."""

    image: np.ndarray  # float32 (k H, k W) in [-1, 1]
    mask: np.ndarray | None  # bool (k H, k W), True on a lesion
    original_shape: tuple[int, int]  # rows, columns of the file
    digest: str  # of the file's grey levels and padding, whatever its format and its name
    fingerprint: np.ndarray  # uint8 (32,), what it looks like (radiographs.likeness) before it is fitted


class Shelf:
    """The samples (H, W) that are kept in a folder."""

    def __init__(self, folder: Path, size: tuple[int, int]):
        self.folder, self.path, self.size = folder, folder / "rows.npy", size
        self.index = Ledger(folder / "index.bin", 8)
        self.row = np.dtype(
            [
                *(("checksum", "<u4"), ("has_mask", "<u4"), ("key", "u1", KEY), ("digest", "u1", 32)),
                *(("fingerprint", "u1", 32), ("shape", "<i8", 2), ("image", "<f4", size)),
                ("mask", "u1", -(-size[0] * size[1] // 8)),
            ]
        )
        self.touched: set[int] = set()  # rows that this process has read or written
        self.damaged = 0  # rows that were not what was written
        self.lock, self.in_use = threading.Lock(), None

    def get(self, key: bytes) -> Sample | None:
        """The sample of a key; None where there is none, or no whole one."""
        with self.lock:
            self._take()
            value = self.index.get(key)
        if value is None:
            return None
        number = int.from_bytes(value, "little")
        row = self._read(number)
        if row is None:
            self.damaged += 1
            return None
        if row["key"].tobytes() != key:  # its room was given to another
            return None
        self.touched.add(number)
        return self._sample(row)

    def put(self, key: bytes, sample: Sample, may_grow: bool) -> bool:
        """Keep a sample; False where there is no room. For one writer at a time."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        with self.lock:
            self._take()
            self.index.refresh()
        if self.get(key) is not None:  # another process was faster
            return True
        count = self._count()
        if count and not self.index.known:  # rows that nobody can find
            self.damaged += count > 1  # not where a first writer was killed between row and record
            self._empty()
            count = 0
        number = count if may_grow else self._free_row(count)
        if number is None:
            return False
        with os.fdopen(private(self.path, os.O_RDWR | os.O_CREAT | BINARY), "r+b") as file:
            if number == count:
                file.write(_header(self.row, count + 1))
            file.seek(HEADER + number * self.row.itemsize)
            file.write(self._sealed(key, sample))
        with self.lock:
            self.index.append(key, number.to_bytes(8, "little"))
        self.touched.add(number)
        return True

    def clear(self) -> bool:
        """Give all rows away; False where another process uses them."""
        alone = self._alone()
        if alone:
            self._empty()
        return alone

    def _empty(self) -> None:
        for path in (self.index.path, self.path):
            path.unlink(missing_ok=True)
        self.touched.clear()
        with self.lock:
            self.index.refresh()

    def _count(self) -> int:
        """Rows in the file; half a row at its end is none."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        return max(0, size - HEADER) // self.row.itemsize

    def _free_row(self, count: int) -> int | None:
        """A row that this process has not needed, where no other process uses the shelf."""
        free = next((number for number in range(count) if number not in self.touched), None)
        return free if free is not None and self._alone() else None

    def _sealed(self, key: bytes, sample: Sample) -> np.ndarray:
        """A sample as the bytes of a row."""
        row = np.zeros(1, self.row)
        row["key"], row["digest"] = np.frombuffer(key, np.uint8), np.frombuffer(bytes.fromhex(sample.digest), np.uint8)
        row["fingerprint"], row["shape"], row["image"] = sample.fingerprint, sample.original_shape, sample.image
        if sample.mask is not None:
            row["has_mask"], row["mask"] = 1, np.packbits(sample.mask)
        content = row.view(np.uint8)
        row["checksum"] = zlib.crc32(content[CHECKSUM:])
        return content

    def _read(self, number: int) -> np.void | None:
        """A row, None where it is not whole."""
        try:
            rows = np.fromfile(self.path, self.row, 1, offset=HEADER + number * self.row.itemsize)
        except OSError:
            return None
        whole = len(rows) and zlib.crc32(rows.view(np.uint8)[CHECKSUM:]) == rows["checksum"][0]
        return rows[0] if whole else None

    def _sample(self, row: np.void) -> Sample:
        mask = None
        if row["has_mask"]:
            bits = np.unpackbits(row["mask"], count=self.size[0] * self.size[1])
            mask = bits.reshape(self.size).astype(bool)
        shape = (int(row["shape"][0]), int(row["shape"][1]))
        return Sample(row["image"], mask, shape, row["digest"].tobytes().hex(), row["fingerprint"].copy())

    # ---------------------------------------------------------------- who else is here

    def _take(self) -> None:
        """Tell others that this shelf is in use, from the first look on; what may not be written to can be read."""
        if self.in_use is not None:
            return
        try:
            self.in_use = private(self.folder / ".use", os.O_RDWR | os.O_CREAT)
        except OSError:  # it has not been made yet, or is somebody else's
            return
        weakref.finalize(self, os.close, self.in_use)
        take(self.in_use, alone=False)
        os.utime(self.folder / ".use")  # the longest unused shelf gives way first

    def _alone(self) -> bool:
        """Whether no other process uses this shelf; False where that cannot be known."""
        if self.in_use is None:
            return False
        try:
            return take(self.in_use, alone=True)
        finally:
            take(self.in_use, alone=False)


def last_used(folder: Path) -> int:
    """When a process last began to use a shelf, in ns."""
    note = folder / ".use"
    return note.stat().st_mtime_ns if note.is_file() else 0


def drop(folder: Path) -> bool:
    """Remove a shelf that nobody uses."""
    descriptor = os.open(folder / ".use", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not take(descriptor, alone=True):
            return False
        shutil.rmtree(folder)
        return True
    finally:
        os.close(descriptor)


def _header(row: np.dtype, count: int) -> bytes:
    """What makes an .npy of rows, at a length that stays as they grow."""
    shown = {"descr": np.lib.format.dtype_to_descr(row), "fortran_order": False, "shape": (count,)}
    start = np.lib.format.magic(1, 0) + (HEADER - 10).to_bytes(2, "little")
    return start + repr(shown).encode().ljust(HEADER - 11) + b"\n"
