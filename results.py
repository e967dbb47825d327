"""Leaf: the folder of an examination. Results lie aside until all are there, and one that was killed goes on."""

import hashlib
import json
import os
import shutil
import zipfile
import zlib
from pathlib import Path

import numpy as np

from checks import UsageError
from files import sha256, unsealed, write_atomically, write_binary, write_sealed_json
from radiographs.manifest import Record
from reporting.layers import PATTERNS, pictures_of
from reporting.report import REPORT

UNFINISHED = ".unfinished_phase4"  # where results lie until all of them are there
PATIENTS = "dicom_local_only"  # DICOM objects, which name the patient: its owner's alone to enter
RESULTS = (
    "config.json",
    "result_*.png",
    "maps/*.npy",
    f"{PATIENTS}/*.dcm",
    "metrics.json",
    "scores.csv",
    REPORT,
    *PATTERNS,
)
NOTE = "examination.json"  # of what, and how far; stays with the results
KEPT = "kept"  # maps and masks that the metrics need, until there are metrics


def refuse_to_write_among(records: list[Record], out: Path) -> None:
    """UsageError if radiographs or masks lie where results go: a new run removes old results by their names."""
    here = Path(os.path.realpath(out))
    files = (file for record in records for file in (record.path, record.mask) if file)
    if any(here in Path(os.path.realpath(file)).parents for file in files):  # of a loop of links, too
        raise UsageError(f"{out} holds radiographs or masks: choose another folder for the results")


def refuse_to_replace(out: Path) -> None:
    """UsageError if a folder has files under the names of results that no examination says it wrote."""
    known = _files_in(out)
    foreign = [path for path in _results_in(out) if known is not None and path not in known]
    if foreign:
        raise UsageError(
            f"{out} holds {foreign[0]}, which no examination of this version wrote: move it away, or choose another "
            "--inference.output"
        )


def _results_in(out: Path) -> list[str]:
    """Files under the names of results."""
    found = (path for pattern in RESULTS for path in out.glob(pattern))
    return sorted(path.relative_to(out).as_posix() for path in found)


def _files_in(out: Path) -> dict[str, int] | None:
    """What the last examination wrote, by size; None where its note is damaged, and all results may be its own."""
    if not (out / NOTE).is_file():
        return {}
    try:
        return unsealed(json.loads((out / NOTE).read_text(encoding="utf-8")))["files"]
    except (OSError, ValueError, AttributeError, KeyError):
        return None


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
    """The entries of just that examination, if the folder holds its results, and none was removed or rotted since."""
    note = _note_of(out, identity)
    if note is None or not all(_is_there(out / name, size) for name, size in note["files"].items()):
        return None
    whole = all(sha256(out / name) == known for name, known in note["tables"].items())
    return note["entries"] if whole else None


def _is_there(path: Path, size: int) -> bool:
    state = _state_of(path)
    return state is not None and state[0] == size


def remove_what_was_published(out: Path, identity: str) -> None:
    """What a run that was killed at its very end left beside the results; what goes on to another result stays."""
    folder = out / UNFINISHED
    if not (folder / NOTE).is_file() or _note_of(folder, identity) is not None:
        shutil.rmtree(folder, ignore_errors=True)


def left_by(out: Path, identity: str) -> dict | None:
    """What an unfinished examination of this identity noted last, if all its files are there: entries, done, files."""
    note = _note_of(out / UNFINISHED, identity)
    whole = note and all(_is_there(out / UNFINISHED / name, size) for name, size in note["files"].items())
    return note if whole else None


def _second_name(file: Path, place: Path) -> None:
    """The file under another name, too; as a copy where the disk knows no second names."""
    try:
        os.link(file, place)
    except OSError:
        write_atomically(place, lambda beside: shutil.copy(file, beside))


class Unfinished:
    """An examination on its way: what is known of the first so many records, one entry each.

    An entry is a dict of plain values; a record with a label has arrays beside it (its map, and its mask where there is
    one) for the metrics.
    """

    def __init__(self, out: Path, identity: str, resume: bool):
        self.out, self.folder, self.identity = out, out / UNFINISHED, identity
        note = _note_of(self.folder, identity) if resume else None
        if note and not all(self._is_kept(name, size, note["moved"]) for name, size in note["files"].items()):
            print("something of the interrupted examination is gone: all images are examined anew")
            note = None
        self.entries: list[dict] = note["entries"] if note else []
        self.done: int = note["done"] if note else 0  # of the records, the first so many
        if note is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.out.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700)  # what is said of a file that cannot be read may name it
        # what is in place, or will be, and its size
        self.moved: dict[str, int] = note["moved"] if note else {}

    def _is_kept(self, name: str, size: int, moved: dict[str, int]) -> bool:
        """Whether a file that was whole when the note was written still is, here or where it was moved to."""
        return _is_there(self.folder / name, size) or (name in moved and _is_there(self.out / name, size))

    def _sizes(self) -> dict[str, int]:
        """Of every file but the note."""
        found = (path for path in self.folder.rglob("*") if path.is_file() and path.name != NOTE)
        found = (path for path in found if path.suffix != ".tmp")  # of one that was killed
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in found}

    def keep(self, index: int, anomaly_map: np.ndarray, mask: np.ndarray | None) -> None:
        """The arrays of a labelled record."""
        arrays = {"map": anomaly_map} | ({} if mask is None else {"mask": mask})
        write_binary(self.folder / KEPT / f"{index}.npz", lambda file: np.savez(file, **arrays))

    def kept(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """What `keep` was given."""
        path = self.folder / KEPT / f"{index}.npz"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return arrays["map"], arrays.get("mask")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UsageError(f"{path} is damaged: give the command again with --runtime.resume False") from error

    def take(self, source: Path, note: dict) -> None:
        """What another examination left, by its note: its files (`source` keeps its own) and its entries."""
        for name in note["files"]:
            place = self.folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            _second_name(source / UNFINISHED / name, place)
        self.entries += note["entries"]

    def save(self, done: int) -> None:
        """Of the first `done` records everything is written: from here a killed examination goes on.

        UsageError if something that was written is there no more.
        """
        self.done, sizes = done, self._sizes() | self.moved
        lost = sorted(name for entry in self.entries for name in _files_of(entry) if name not in sizes)
        if lost:
            raise UsageError(
                f"{self.folder / lost[0]} was removed while it was needed ({len(lost)} files in all): give the same "
                "command again, images are examined anew"
            )
        note = {"identity": self.identity, "done": done, "entries": self.entries, "moved": self.moved}
        write_sealed_json(self.folder / NOTE, note | {"files": sizes})

    def publish(self) -> None:
        """Put the new results in place, file by file, then remove what an earlier examination left.

        One that is killed here goes on here: what is to be moved is noted before the first file is.
        """
        mine = {name: size for name, size in self._sizes().items() if not name.startswith(f"{KEPT}/")}
        self.moved |= mine
        self.save(self.done)
        old = _files_in(self.out)
        old = dict.fromkeys(_results_in(self.out), 0) if old is None else old
        # until all are in place, nothing says that they are, and those that are to be removed are known
        write_sealed_json(self.out / NOTE, {"identity": "", "files": old | self.moved, "tables": {}, "entries": []})
        for name in sorted(mine):
            place = self.out / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.parent.name == PATIENTS:
                place.parent.chmod(0o700)  # before anything is in it, and where somebody else made it, too
            os.replace(self.folder / name, place)
        for name in set(old) - set(self.moved):
            (self.out / name).unlink(missing_ok=True)
            parent = (self.out / name).parent
            if parent != self.out and parent.is_dir() and not any(parent.iterdir()):  # it may have been moved away
                parent.rmdir()
        entries = [entry if "error" not in entry else entry | {"error": ""} for entry in self.entries]  # may name one
        tables = {name: sha256(self.out / name) for name in self.moved if Path(name).suffix in (".csv", ".json")}
        note = {"identity": self.identity, "files": self.moved, "tables": tables, "entries": entries}
        write_sealed_json(self.out / NOTE, note)
        shutil.rmtree(self.folder)


def _files_of(entry: dict) -> list[str]:
    """What was written of one record, beside the tables."""
    pictures = pictures_of(entry["index"], entry["report"]["outlined"]) if "report" in entry else []
    return [*(name for name in (entry.get("figure"), entry.get("map")) if name), *pictures]


def _note_of(folder: Path, identity: str) -> dict | None:
    """What a folder says of the examination of this identity; None if it is of another, or says nothing."""
    try:
        note = unsealed(json.loads((folder / NOTE).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        return None
    return note if note.get("identity") == identity else None
