"""Leaf: a file of short records that only grows, which processes share; what is half written is not believed.

A record is a key, a value of a fixed size and a checksum of both; the last one of a key counts.
"""

import hashlib
import os
import zlib
from pathlib import Path

KEY = 16  # bytes
CHECKSUM = 4


def key_of(*parts: object) -> bytes:
    """A key of everything that `parts` say; no part can be read from it."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=KEY).digest()


class Ledger:
    """The records of a file: key -> value, of `size` bytes. Whoever appends keeps others from appending meanwhile."""

    def __init__(self, path: Path, size: int):
        self.path, self.size = path, KEY + size + CHECKSUM
        self.known: dict[bytes, bytes] = {}
        self.seen, self.inode = 0, None
        self.damaged, self.rotten = 0, False  # records that were not what was written, and whether any is in the file

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, if anybody has written one."""
        if key not in self.known:
            self.refresh()
        return self.known.get(key)

    def refresh(self) -> None:
        """Take in what others appended; begin anew where the file is another one, or gone."""
        try:
            with open(self.path, "rb") as file:
                state = os.fstat(file.fileno())
                if state.st_ino != self.inode or state.st_size < self.seen:
                    self._forget(state.st_ino)
                if state.st_size - self.seen < self.size:
                    return
                file.seek(self.seen)
                new = file.read()
        except OSError:  # it was removed, or has not been made yet
            self._forget(None)
            return
        for start in range(0, len(new) - self.size + 1, self.size):
            record = new[start : start + self.size]
            self.seen += self.size
            if _sealed(record[:-CHECKSUM]) == record:
                self.known[record[:KEY]] = record[KEY:-CHECKSUM]
            else:
                self.damaged, self.rotten = self.damaged + 1, True

    def append(self, key: bytes, value: bytes) -> None:
        """A record at the end; what a killed writer left of its own there is cut off first, what rotted is left out."""
        if self.rotten:
            beside = self.path.with_suffix(".tmp")
            with open(beside, "wb", opener=private) as file:
                file.writelines(_sealed(known + value) for known, value in self.known.items())
            os.replace(beside, self.path)
        with open(self.path, "ab", opener=private) as file:
            end = file.seek(0, os.SEEK_END)
            file.truncate(end - end % self.size)
            file.write(_sealed(key + value))
        self.refresh()

    def _forget(self, inode: int | None) -> None:
        self.known.clear()
        self.seen, self.inode, self.rotten = 0, inode, False


def _sealed(content: bytes) -> bytes:
    return content + zlib.crc32(content).to_bytes(CHECKSUM, "little")


def private(path: str, flags: int) -> int:
    """For open(..., opener=private): what is made is its owner's alone."""
    return os.open(path, flags, 0o600)
