"""Leaf: which radiographs there are, whose they are, and who trains, validates or tests: a folder or a manifest.csv to records."""

import csv
import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from config import DataConfig, UsageError
from radiographs.reading import SUFFIXES, find_radiographs, read_header

SPLITS = {"": None, "train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
LABELS = {"": None, "0": 0, "0.0": 0, "1": 1, "1.0": 1}  # pandas writes whole columns as floats if one cell is empty


@dataclass(frozen=True)
class Record:
    """One radiograph: a row of the manifest, or a file in a folder."""

    path: Path
    split: str | None  # "train", "val", "test"; None if still to be drawn
    label: int | None  # 0 normal, 1 abnormal, None unknown
    kind: str  # "normal", the kind of lesion, or ""
    mask: Path | None
    patient: str
    patient_rule: str  # who said so: "header" (PatientID), "manifest", "folder" or "file"


def list_records(root: str | Path, patient_from: str = "auto", setting: str = "data.root") -> list[Record]:
    """List a folder (its manifest.csv if it has one, else every radiograph below it, sorted) or a manifest; UsageError if there is none."""
    root = Path(root)
    if not root.exists():
        raise UsageError(f"{root} does not exist: set {setting} to a folder of radiographs or to a manifest.csv")
    if root.is_file():
        if root.suffix.lower() != ".csv":
            raise UsageError(
                f"{root} is neither a folder nor a .csv manifest: set {setting} to the folder that holds it"
            )
        return _read_manifest(root)
    if (root / "manifest.csv").exists():
        return _read_manifest(root / "manifest.csv")
    records = [Record(path, None, None, "", None, *_patient_of(path, root)) for path in find_radiographs(root)]
    if not records:
        raise UsageError(
            f"{root} holds no radiographs: put files with one of {' '.join(SUFFIXES)} there, or DICOM files without a suffix"
        )
    return records


def _patient_of(path: Path, folder: Path) -> tuple[str, str]:
    """PatientID of a DICOM file, else the path in its folder without suffix; and which of the two rules said so."""
    named = read_header(path).patient
    return (named, "header") if named else (path.relative_to(folder).with_suffix("").as_posix(), "file")


def _read_manifest(manifest: Path) -> list[Record]:
    """Read image (required), split, label, kind, mask and patient (or source); UsageError names the row and the column."""
    try:
        with open(manifest, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [(name or "").strip().lower() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            rows = [
                (reader.line_num, {name: (cell or "").strip() for name, cell in row.items() if name}) for row in reader
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(
            f"{manifest} is not a readable table ({error}): save it as comma-separated UTF-8 text"
        ) from error
    if "image" not in columns:
        raise UsageError(
            f"{manifest} has no column 'image': it needs a header line, comma-separated, with image and optionally split,label,kind,mask,patient"
        )
    if not rows:
        raise UsageError(f"{manifest} has no rows: list one radiograph per row")
    records = [_parse_row(manifest, number, row) for number, row in rows]
    _check_rows(manifest, [number for number, _ in rows], records)
    return records


def _parse_row(manifest: Path, number: int, row: dict[str, str]) -> Record:
    def fail(column: str, reason: str):
        raise UsageError(f"{manifest.name}, row {number}, column {column}: {reason}")

    def inside(column: str) -> Path:
        folder = Path(os.path.abspath(manifest.parent))
        path = Path(os.path.normpath(folder / row[column]))
        return (
            manifest.parent / path.relative_to(folder)
            if path.is_relative_to(folder)
            else fail(column, f"{row[column]} leaves the folder of the manifest")
        )

    split, label, kind = row.get("split", "").lower(), row.get("label", ""), row.get("kind", "").lower()
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
    named = row.get("patient") or row.get("source")
    patient, rule = (named, "manifest") if named else _patient_of(path, manifest.parent)
    return Record(path, SPLITS[split], label, "normal" if label == 0 else kind, mask, patient, rule)


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


def split_records(records: list[Record], config: DataConfig) -> dict[str, list[Record]]:
    """Part records into "train", "val" (both without known abnormals) and "test", no patient in two of them.

    The splits of a manifest are kept; if it has no val, one is drawn from train. Without splits, patients with an abnormal
    image go to test together with about test_share of the others, and about val_share to val; if nothing is known to be
    abnormal, test stays empty. Where a patient goes depends on the patient's name and split_seed alone: others may come and
    go. UsageError if that cannot be done.
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
        raise UsageError(
            "there is no normal radiograph to train on: add some with label 0 (or no label), in the split train if there "
            "are splits"
        )
    if splits["test"] and not given and config.test_share > 0:
        splits["train"], normals = _hold_out(splits["train"], config.test_share, f"test/{config.split_seed}", leave=2)
        splits["test"] += normals
    if not splits["val"]:
        splits["train"], splits["val"] = _hold_out(
            splits["train"], config.val_share, f"val/{config.split_seed}", leave=1
        )
    if not splits["val"]:
        raise UsageError(
            "all normal radiographs belong to one patient: training and validation need two; add a manifest.csv with a "
            "column patient, or set data.patient_from file"
        )
    return splits


def _drop_abnormal(splits: dict[str, list[Record]]) -> None:
    for name in ("train", "val"):
        kept = [record for record in splits[name] if record.label != 1]
        if len(kept) < len(splits[name]):
            warnings.warn(
                f"{len(splits[name]) - len(kept)} abnormal radiographs of the split {name} are left out: only normals train",
                stacklevel=3,
            )
        splits[name] = kept


def _check_patients(splits: dict[str, list[Record]]) -> None:
    train, val, test = ({record.patient for record in splits[name]} for name in ("train", "val", "test"))
    shared = len((train & val) | (train & test) | (val & test))
    if shared:
        raise UsageError(
            f"{shared} patients of the manifest are in more than one split, which would flatter every score: "
            "give all radiographs of a patient the same split (the column patient tells who is who)"
        )


def _hold_out(records: list[Record], share: float, salt: str, leave: int) -> tuple[list[Record], list[Record]]:
    """Draw about that share of the patients -> (left, held out), each in the old order.

    At least one patient is drawn and at least `leave` are left, those nearest to the border changing sides; with too few
    patients for both, nobody is drawn.
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
    digest = hashlib.sha256(f"{salt}/{patient}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
