"""Leaf: which radiographs there are, whose they are, and who trains, validates or tests.

A folder or a manifest.csv becomes records, and records become splits.
"""

import csv
import dataclasses
import hashlib
import os
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NoReturn

from checks import UsageError
from config import DataConfig
from radiographs.reading import SUFFIXES, find_radiographs, read_header

SPLITS = {"": None, "train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
LABELS = {"": None, "0": 0, "0.0": 0, "1": 1, "1.0": 1}  # pandas writes whole columns as floats if one cell is empty
FILES_PER_PATIENT = 5  # a panoramic, or a few over the years; folders that hold more are classes, years or clinics
LARGEST_PATIENT = 50  # files; nobody has more panoramics, so that a larger folder is a collection of patients
# modalities that a panoramic may carry: the right one, and what scanners and archives write instead; "" says nothing
RADIOGRAPHY = ("PX", "IO", "DX", "CR", "RG", "RF", "XA", "SC", "OT", "DR", "")
RULES = {
    "header": "by PatientID",
    "manifest": "by the manifest",
    "folder": "by folder (data.patient_from file makes each file its own)",
    "file": "by file",
}  # who said whose a radiograph is, the most reliable first


@dataclass(frozen=True)
class Record:
    """One radiograph: a row of the manifest, or a file in a folder."""

    path: Path
    split: str | None  # "train", "val", "test"; None if still to be drawn
    label: int | None  # 0 normal, 1 abnormal, None unknown
    kind: str  # "normal", the kind of lesion, or ""
    mask: Path | None
    patient: str
    patient_rule: str  # who said so, a key of RULES


def list_records(root: str | Path, patient_from: str = "auto", setting: str = "data.root") -> list[Record]:
    """List a manifest, a folder with a manifest.csv, or else every radiograph below a folder, sorted.

    A PatientID in a DICOM header or a manifest's column says whose a radiograph is. Where neither does, its patient is
    the file's folder (patient_from "folder"), the file itself ("file"), or the folder if those look like one patient
    each ("auto": see _patient_folders). UsageError, naming the config's `setting`, if there is nothing to list.
    """
    root = Path(root)
    if not root.exists():
        raise UsageError(f"{root} does not exist: set {setting} to a folder of radiographs or to a manifest.csv")
    if root.is_file() and root.suffix.lower() != ".csv":
        raise UsageError(f"{root} is neither a folder nor a .csv manifest: set {setting} to the folder that holds it")
    manifest = root if root.is_file() else root / "manifest.csv"
    records = _read_manifest(manifest) if manifest.exists() else _list_folder(root)
    return _name_the_rest(records, manifest.parent, patient_from)


def describe_patients(records: list[Record]) -> str:
    """One line for people: how many patients there are, and who said so; each counts under the best of its rules."""
    counted: set[str] = set()
    parts = []
    for rule, words in RULES.items():
        patients = {record.patient for record in records if record.patient_rule == rule} - counted
        counted |= patients
        if patients:
            parts.append(f"{len(patients)} {words}")
    return f"{len(counted)} patient{'' if len(counted) == 1 else 's'}: {', '.join(parts)}"


def _list_folder(root: Path) -> list[Record]:
    """A record for every image below root; its patient stays empty where no header names one."""
    found = [(path, read_header(path)) for path in find_radiographs(root)]
    images = [(path, header) for path, header in found if header.is_image]
    others = len(found) - len(images)
    if others:
        message = f"{others} DICOM files are not images (reports, presentation states, indexes ...) and are passed over"
        warnings.warn(message, stacklevel=3)
    foreign = Counter(header.modality for _, header in images if header.modality not in RADIOGRAPHY)
    if foreign:
        named = ", ".join(f"{count} {modality}" for modality, count in sorted(foreign.items()))
        message = f"some DICOM files say that they are no radiographs ({named}): see whether they belong here"
        warnings.warn(message, stacklevel=3)
    if not images:
        suffixes = " ".join(SUFFIXES)
        raise UsageError(f"{root} holds no radiographs: put {suffixes} files there, or DICOM files without a suffix")
    return [Record(path, None, None, "", None, header.patient or "", "header") for path, header in images]


def _name_the_rest(records: list[Record], root: Path, patient_from: str) -> list[Record]:
    """Give a patient to the records that have none, by the place of their files below root.

    Where the named files of a patient's folder all belong to one patient, so do the others: they may be exports of the
    same radiograph.
    """
    places = [record.path.relative_to(root) for record in records]
    unnamed = [place for place, record in zip(places, records, strict=True) if not record.patient]
    folders = _patient_folders(unnamed, patient_from)
    owners: dict[Path, set[str]] = defaultdict(set)
    for place, record in zip(places, records, strict=True):
        folder = _nearest(place, folders)
        if record.patient and folder is not None:
            owners[folder].add(record.patient)

    def named(place: Path, record: Record) -> Record:
        if record.patient:
            return record
        folder = _nearest(place, folders)
        if folder is None:
            known_suffix = place.suffix.lower() in SUFFIXES  # the .5 of 1.2.840.5 is none, and all that tells it apart
            own = place.with_suffix("") if known_suffix else place
            return dataclasses.replace(record, patient=own.as_posix(), patient_rule="file")
        patient = min(owners[folder]) if len(owners[folder]) == 1 else folder.as_posix()
        return dataclasses.replace(record, patient=patient, patient_rule="folder")

    return [named(place, record) for place, record in zip(places, records, strict=True)]


def _patient_folders(places: list[Path], patient_from: str) -> set[Path]:
    """Which folders are one patient each, for files at these places below the root.

    "auto" takes the shallowest depth at which folders look like patients: there are at least two, half of them or more
    hold at most FILES_PER_PATIENT files, and at least half of the files lie in them. Files beside them are nobody's but
    their own: those that lie less deep, and those in a folder of more than LARGEST_PATIENT. When in doubt this joins
    files: patients joined by mistake make a coarser split, one taken for two would leak from training into testing.
    """
    if patient_from == "folder":
        return {place.parent for place in places}
    if patient_from == "file":
        return set()
    deepest = max((len(place.parent.parts) for place in places), default=0)
    for depth in range(1, deepest + 1):
        deep_enough = [place for place in places if len(place.parent.parts) >= depth]
        sizes = Counter(Path(*place.parts[:depth]) for place in deep_enough)
        patients = {folder: size for folder, size in sizes.items() if size <= LARGEST_PATIENT}
        most = 2 * sum(patients.values()) >= len(places)
        if len(patients) >= 2 and most and median(patients.values()) <= FILES_PER_PATIENT:
            return set(patients)
    return set()


def _nearest(place: Path, folders: set[Path]) -> Path | None:
    """The innermost of the folders that holds the file, if any does."""
    return next((parent for parent in place.parents if parent in folders), None)


def _read_manifest(manifest: Path) -> list[Record]:
    """Read image (required), split, label, kind, mask and patient (or source), one radiograph per row.

    UsageError names the row and the column. A patient stays empty where neither the manifest nor a header names one.
    """
    try:
        with open(manifest, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            reader.fieldnames = [(name or "").strip().lower() for name in reader.fieldnames or []]
            columns = reader.fieldnames
            rows = [(reader.line_num, _stripped(row)) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{manifest} is not a readable table ({error}): save it as comma-separated UTF-8") from error
    if "image" not in columns:
        raise UsageError(
            f"{manifest} has no column 'image': it needs a header line, comma-separated, with image and optionally "
            "split,label,kind,mask,patient"
        )
    if not rows:
        raise UsageError(f"{manifest} has no rows: list one radiograph per row")
    records = [_parse_row(manifest, number, row) for number, row in rows]
    _check_rows(manifest, [number for number, _ in rows], records)
    return records


def _stripped(row: dict[str, str]) -> dict[str, str]:
    """A row of a table without the spaces around its cells, and without cells that stand in no column."""
    return {name: (cell or "").strip() for name, cell in row.items() if name}


def _parse_row(manifest: Path, number: int, row: dict[str, str]) -> Record:
    def fail(column: str, reason: str) -> NoReturn:
        raise UsageError(f"{manifest.name}, row {number}, column {column}: {reason}")

    def inside(column: str) -> Path:
        folder = Path(os.path.abspath(manifest.parent))
        path = Path(os.path.normpath(folder / row[column]))
        if not path.is_relative_to(folder):
            fail(column, f"{row[column]} leaves the folder of the manifest")
        return manifest.parent / path.relative_to(folder)

    split = row.get("split", "").lower()
    label = row.get("label", "")
    kind = row.get("kind", "").lower()
    if not row["image"]:
        fail("image", "is empty: give the file, relative to the manifest")
    if split not in SPLITS:
        fail("split", f"'{split}' is unknown: write train, val or test")
    if label not in LABELS:
        fail("label", f"'{label}' is unknown: write 0 for normal, 1 for abnormal, nothing for unknown")
    label = LABELS[label]
    if label is None and kind:
        label = int(kind != "normal")
    if kind and label != int(kind != "normal"):
        fail("label", f"{label} contradicts the kind '{kind}': 0 belongs to normal, 1 to every other kind")
    mask = inside("mask") if row.get("mask") else None
    if mask and label is None:
        fail("label", "is empty beside a mask: write 1, or 0 for an empty mask")
    path = inside("image")
    kind = "normal" if label == 0 else kind
    named = row.get("patient") or row.get("source")
    if named:
        return Record(path, SPLITS[split], label, kind, mask, named, "manifest")
    return Record(path, SPLITS[split], label, kind, mask, read_header(path).patient or "", "header")


def _check_rows(manifest: Path, numbers: list[int], records: list[Record]) -> None:
    """What one row alone cannot tell: a file listed twice, a split given to some rows only."""
    first: dict[Path, int] = {}
    some_split = any(record.split for record in records)
    for number, record in zip(numbers, records, strict=True):
        if first.setdefault(record.path, number) != number:
            raise UsageError(
                f"{manifest.name}, row {number}, column image: the same file as in row {first[record.path]}"
            )
        if some_split and not record.split:
            raise UsageError(f"{manifest.name}, row {number}, column split: is empty while other rows have one")


def split_records(records: list[Record], config: DataConfig, trains: bool = True) -> dict[str, list[Record]]:
    """Part records into "train", "val" (both without known abnormals) and "test", no patient in two of them.

    The splits of a manifest are kept; if it has no val, one is drawn from train. Without splits, patients with an
    abnormal image go to test together with about test_share of the others, and about val_share of the rest to val; if
    nothing is known to be abnormal, test stays empty. Where a patient goes depends on the patient's name and split_seed
    alone: others may come and go. UsageError if that cannot be done. Who does not train needs no normals in the split
    train of a manifest: those of elsewhere may say what is usual.
    """
    splits: dict[str, list[Record]] = {"train": [], "val": [], "test": []}
    given = any(record.split for record in records)
    if given:
        for record in records:
            splits[record.split].append(record)
        _drop_abnormal(splits)
        _check_patients(splits)
    else:
        abnormal = {record.patient for record in records if record.label == 1}
        splits["test"] = [record for record in records if record.patient in abnormal]
        splits["train"] = [record for record in records if record.patient not in abnormal]
    if not splits["train"]:
        if trains or not given:
            raise UsageError(
                "there is no normal radiograph to train on: add some with label 0 (or no label), in the split train if "
                "there are splits"
            )
        _tell_unlabelled(splits)
        return splits
    if splits["test"] and not given and config.test_share > 0:
        salt = f"test/{config.split_seed}"
        splits["train"], normals = _hold_out(splits["train"], config.test_share, salt, leave=2)
        splits["test"] += normals
    if not splits["val"]:
        salt = f"val/{config.split_seed}"
        splits["train"], splits["val"] = _hold_out(splits["train"], config.val_share, salt, leave=1)
    if not splits["val"]:
        remedy = _remedy(splits["train"])
        raise UsageError(f"all normal radiographs belong to one patient: training and validation need two; {remedy}")
    _tell_unlabelled(splits)
    return splits


def _tell_unlabelled(splits: dict[str, list[Record]]) -> None:
    """Where some know, say who is taken for normal though nobody said so; a folder of normals needs no label."""
    if all(record.label is None for own in splits.values() for record in own):
        return
    unknown = {name: sum(record.label is None for record in splits[name]) for name in ("train", "val")}
    told = [f"{count} of {len(splits[name])} in {name}" for name, count in unknown.items() if count]
    if told:
        message = f"radiographs without a label are taken for normal beside those that have one: {', '.join(told)}"
        warnings.warn(message, stacklevel=3)


def _drop_abnormal(splits: dict[str, list[Record]]) -> None:
    for name in ("train", "val"):
        normal = [record for record in splits[name] if record.label != 1]
        dropped = len(splits[name]) - len(normal)
        if dropped:
            message = f"{dropped} abnormal radiographs of the split {name} are left out: only normals train"
            warnings.warn(message, stacklevel=3)
        splits[name] = normal


def _check_patients(splits: dict[str, list[Record]]) -> None:
    train, val, test = ({record.patient for record in splits[name]} for name in ("train", "val", "test"))
    shared = (train & val) | (train & test) | (val & test)
    if shared:
        theirs = [record for split in splits.values() for record in split if record.patient in shared]
        raise UsageError(
            f"{len(shared)} patients of the manifest are in more than one split, which would flatter every score: "
            f"give all radiographs of a patient the same split, or {_remedy(theirs)}"
        )


def _remedy(records: list[Record]) -> str:
    """What to do if these radiographs do not belong to one patient."""
    guessed = any(record.patient_rule == "folder" for record in records)
    column = "say who is who in the column patient of a manifest.csv"
    return f"{column}, or set data.patient_from file" if guessed else column


def _hold_out(records: list[Record], share: float, salt: str, leave: int) -> tuple[list[Record], list[Record]]:
    """Draw about that share of the patients -> (left, held out), each in the old order.

    At least one patient is drawn and at least `leave` are left, those nearest to the border changing sides; with too
    few patients for both, nobody is drawn.
    """
    place = {record.patient: _place(record.patient, salt) for record in records}
    ranked = sorted(place, key=place.get)
    count = sum(value < share for value in place.values())
    count = min(max(1, count), len(ranked) - leave)
    if count < 1:
        return records, []
    drawn = set(ranked[:count])
    left = [record for record in records if record.patient not in drawn]
    return left, [record for record in records if record.patient in drawn]


def _place(patient: str, salt: str) -> float:
    """A number in [0, 1), uniform over patients, that depends on the name and the salt alone."""
    digest = hashlib.sha256(f"{salt}/{patient}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
