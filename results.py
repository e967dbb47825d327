"""Leaf: the folder of an examination. Results lie aside until all are there, and one that was killed goes on."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from checks import UsageError
from files import unsealed, write_binary, write_sealed_json
from radiographs.manifest import Record
from reporting.layers import PATTERNS
from reporting.report import REPORT

UNFINISHED = ".unfinished_phase4"  # where results lie until all of them are there
RESULTS = ("result_*.png", "maps/*.npy", "metrics.json", "scores.csv", REPORT, *PATTERNS)
NOTE = "examination.json"  # of what, and how far; stays with the results
KEPT = "kept"  # maps and masks that the metrics need, until there are metrics


def refuse_to_write_among(records: list[Record], out: Path) -> None:
    """UsageError if radiographs lie where results go: a new examination removes old results by their names."""
    if any(out.resolve() in record.path.resolve().parents for record in records):
        raise UsageError(f"{out} holds radiographs to examine: choose another --inference.output for the results")


def identity_of(records: list[Record], **shaping: object) -> str:
    """A hash of what an examination follows from: files by place, size and time of change, and everything in `shaping`.

    The same again gives the same results.
    """
    found = [json.dumps(shaping, sort_keys=True)]
    for record in records:
        files = [(file, _state_of(file)) for file in (record.path, record.mask) if file]
        found.append(repr((files, record.label, record.kind, record.patient)))
    return hashlib.sha256("\n".join(found).encode(errors="backslashreplace")).hexdigest()


def _state_of(file: Path) -> tuple[int, int] | None:
    """Size and time of change; None where it is missing."""
    try:
        state = file.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def finished_entries(out: Path, identity: str) -> list[dict] | None:
    """The entries of just that examination, if the folder holds its results and none of them was removed since."""
    note = _note_of(out, identity)
    if note is None:
        return None
    states = [(_state_of(out / name), size) for name, size in note["files"].items()]
    return note["entries"] if all(state is not None and state[0] == size for state, size in states) else None


class Unfinished:
    """An examination on its way: what is known of the first so many records, one entry each.

    An entry is a dict of plain values; a record with a label has arrays beside it (its map, and its mask where there is
    one) for the metrics.
    """

    def __init__(self, out: Path, identity: str, resume: bool):
        self.out, self.folder, self.identity = out, out / UNFINISHED, identity
        note = _note_of(self.folder, identity) if resume else None
        self.entries: list[dict] = note["entries"] if note else []
        self.done: int = note["done"] if note else 0  # of the records, the first so many
        if note is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.out.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700)  # what is said of a file that cannot be read may name it
        # what is in place, or will be, and its size
        self.moved: dict[str, int] = note.get("moved", {}) if note else {}

    def keep(self, index: int, anomaly_map: np.ndarray, mask: np.ndarray | None) -> None:
        """The arrays of a labelled record."""
        arrays = {"map": anomaly_map} | ({} if mask is None else {"mask": mask})
        write_binary(self.folder / KEPT / f"{index}.npz", lambda file: np.savez(file, **arrays))

    def kept(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """What `keep` was given."""
        with np.load(self.folder / KEPT / f"{index}.npz", allow_pickle=False) as arrays:
            return arrays["map"], arrays.get("mask")

    def save(self, done: int) -> None:
        """Of the first `done` records everything is written: from here a killed examination goes on."""
        self.done = done
        note = {"identity": self.identity, "done": done, "entries": self.entries, "moved": self.moved}
        write_sealed_json(self.folder / NOTE, note)

    def publish(self) -> None:
        """Put the new results in place, file by file, then remove what an earlier examination left.

        One that is killed here goes on here: what is to be moved is noted before the first file is.
        """
        mine = [path for path in self.folder.rglob("*") if path.is_file() and path.parent.name != KEPT]
        mine = [path for path in mine if path.name != NOTE and path.suffix != ".tmp"]  # .tmp: of one that was killed
        self.moved |= {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in mine}
        self.save(self.done)
        (self.out / NOTE).unlink(missing_ok=True)  # until all are in place, nothing says that they are
        for path in sorted(mine):
            place = self.out / path.relative_to(self.folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
        for pattern in RESULTS:
            for path in self.out.glob(pattern):
                if path.relative_to(self.out).as_posix() not in self.moved:
                    path.unlink()
        entries = [entry if "error" not in entry else entry | {"error": ""} for entry in self.entries]  # may name one
        write_sealed_json(self.out / NOTE, {"identity": self.identity, "files": self.moved, "entries": entries})
        shutil.rmtree(self.folder)


def _note_of(folder: Path, identity: str) -> dict | None:
    """What a folder says of the examination of this identity; None if it is of another, or says nothing."""
    try:
        note = unsealed(json.loads((folder / NOTE).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        return None
    return note if note.get("identity") == identity else None
