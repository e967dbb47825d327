"""Leaf: an .npy file that grows row by row, and goes on where a killed run left it."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from files import unsealed, write_sealed_json


class GrowingArray:
    """Rows of a float32 array (N, ...) on their way to `path`, which appears when all of them are there.

    Until then they lie beside it, with a note of how many are whole and what they were made from. The note stays until
    `forget`: a run that has several arrays to write takes those that are finished as they are.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], made_from: dict, resume: bool):
        self.path, self.shape = path, shape
        self.part, self.note = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.json")
        self.made_from = _hash_of(made_from, shape)
        self.row_bytes = 4 * int(np.prod(shape[1:]))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows, self.digest = 0, hashlib.sha256()
        if resume and self.note.is_file() and path.is_file() and not self.part.is_file():
            os.replace(path, self.part)  # finished, and not yet forgotten
        known = self._known() if resume else None
        if known is None:
            self.note.unlink(missing_ok=True)  # first: it must not speak of what comes now
            with open(self.part, "wb") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
        self.file = open(self.part, "r+b")
        self.begins = _header_size(self.part)
        if known is not None:
            self.rows, self.digest = known
        self.file.truncate(self.begins + self.rows * self.row_bytes)
        self.file.seek(0, os.SEEK_END)

    def _known(self):
        """How many rows an interrupted run left whole, and their hash so far; None where there is nothing to trust."""
        try:
            note = unsealed(json.loads(self.note.read_text()))
            digest, left = hashlib.sha256(), note["rows"] * self.row_bytes
            with open(self.part, "rb") as file:
                file.seek(_header_size(self.part))
                while left and (piece := file.read(min(left, 2**24))):
                    digest.update(piece)
                    left -= len(piece)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        whole = left == 0 and digest.hexdigest() == note["sha256"] and self.made_from == note["made_from"]
        return (note["rows"], digest) if whole else None

    def append(self, rows: np.ndarray) -> None:
        """The next rows (n, ...)."""
        content = rows.astype("<f4").tobytes()
        self.file.write(content)
        self.digest.update(content)
        self.rows += len(rows)

    def save(self) -> None:
        """From here a killed run goes on."""
        self.file.flush()
        os.fsync(self.file.fileno())
        note = {"rows": self.rows, "sha256": self.digest.hexdigest(), "made_from": self.made_from}
        write_sealed_json(self.note, note)

    def finish(self) -> None:
        """All rows are there: the file takes its place."""
        self.save()
        self.file.close()
        os.replace(self.part, self.path)

    def forget(self) -> None:
        """Whatever was to be made of the rows is made."""
        self.note.unlink(missing_ok=True)


def finished_rows(path: Path, shape: tuple[int, ...], made_from: dict) -> np.ndarray | None:
    """All rows of an array that another process finished and did not forget, mapped from disk; None before that."""
    try:
        note = unsealed(json.loads(path.with_name(f".{path.name}.json").read_text()))
        whole = note["rows"] == shape[0] and note["made_from"] == _hash_of(made_from, shape)
        rows = np.load(path, mmap_mode="r", allow_pickle=False) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return rows if rows is not None and rows.shape == shape else None


def _hash_of(made_from: dict, shape: tuple[int, ...]) -> str:
    return hashlib.sha256(json.dumps([made_from, shape], sort_keys=True).encode()).hexdigest()


def _header_size(path: Path) -> int:
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        return file.tell()
