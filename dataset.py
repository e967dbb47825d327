"""Part: files -> x in [-1, 1], mask, label; listed from a folder or a manifest.csv, split by patient, augmented reproducibly.

splits = split_records(list_records(config.root), config, seed)
data = open_datasets(splits, config, seed, report)      every file read once, bad files reported
train, val = data["train"].augmented(), data["val"]
test = RadiographDataset(records, config)               or streaming: each file is read when asked for
"""

import copy
import csv
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from config import DataConfig, UsageError
from radiograph_io import SUFFIXES, ImageReadError, find_radiographs, fit_image, fit_mask, read_mask, read_patient, read_radiograph, rescale

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


class Sample(NamedTuple):
    """One radiograph at the size of the model."""

    image: np.ndarray  # float32 (H, W) in [-1, 1]
    mask: np.ndarray | None  # bool (H, W), True on a lesion
    original_shape: tuple[int, int]  # rows, columns of the file


def list_records(root: str | Path, setting: str = "data.root") -> list[Record]:
    """List a folder (its manifest.csv if it has one, else every radiograph below it, sorted) or a manifest; UsageError if there is none."""
    root = Path(root)
    if not root.exists():
        raise UsageError(f"{root} does not exist: set {setting} to a folder of radiographs or to a manifest.csv")
    if root.is_file():
        if root.suffix.lower() != ".csv":
            raise UsageError(f"{root} is neither a folder nor a .csv manifest: set {setting} to the folder that holds it")
        return _read_manifest(root)
    if (root / "manifest.csv").exists():
        return _read_manifest(root / "manifest.csv")
    records = [Record(path, None, None, "", None, _patient_of(path, root)) for path in find_radiographs(root)]
    if not records:
        raise UsageError(f"{root} holds no radiographs: put files with one of {' '.join(SUFFIXES)} there, or DICOM files without a suffix")
    return records


def _patient_of(path: Path, folder: Path) -> str:
    """PatientID of a DICOM file, else the path in its folder without suffix: 000.png in two subfolders is two patients."""
    return read_patient(path) or path.relative_to(folder).with_suffix("").as_posix()


def _read_manifest(manifest: Path) -> list[Record]:
    """Read image (required), split, label, kind, mask and patient (or source); UsageError names the row and the column."""
    try:
        with open(manifest, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [(name or "").strip().lower() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            rows = [(reader.line_num, {name: (cell or "").strip() for name, cell in row.items() if name}) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{manifest} is not a readable table ({error}): save it as comma-separated UTF-8 text") from error
    if "image" not in columns:
        raise UsageError(f"{manifest} has no column 'image': it needs a header line, comma-separated, with image and optionally split,label,kind,mask,patient")
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
        return manifest.parent / path.relative_to(folder) if path.is_relative_to(folder) else fail(column, f"{row[column]} leaves the folder of the manifest")

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
    patient = row.get("patient") or row.get("source") or _patient_of(path, manifest.parent)
    return Record(path, SPLITS[split], label, "normal" if label == 0 else kind, mask, patient)


def _check_rows(manifest: Path, numbers: list[int], records: list[Record]) -> None:
    """What one row alone cannot tell: a file listed twice, a split given to some rows only."""
    first: dict[Path, int] = {}
    some_split = any(record.split for record in records)
    for number, record in zip(numbers, records, strict=True):
        if first.setdefault(record.path, number) != number:
            raise UsageError(f"{manifest.name}, row {number}, column image: the same file as in row {first[record.path]}")
        if some_split and not record.split:
            raise UsageError(f"{manifest.name}, row {number}, column split: is empty while other rows have one")


def split_records(records: list[Record], config: DataConfig, seed: int) -> dict[str, list[Record]]:
    """Part records into "train", "val" (both without known abnormals) and "test", no patient in two of them.

    The splits of a manifest are kept; if it has no val, one is drawn from train. Without splits, patients with an abnormal image go
    to test together with test_share of the others, and val_share, at least one patient, to val; if nothing is known to be abnormal,
    test stays empty. UsageError if that cannot be done.
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
    patients = len({record.patient for record in splits["train"]})
    if not patients:
        raise UsageError("there is no normal radiograph to train on: add some with label 0 (or no label), in the split train if there are splits")
    if splits["test"] and not given and config.test_share > 0:
        splits["train"], normals = _hold_out(splits["train"], config.test_share * patients, seed, leave=2)
        splits["test"] += normals
    if not splits["val"]:
        splits["train"], splits["val"] = _hold_out(splits["train"], config.val_share * patients, seed, leave=1)
    if not splits["val"]:
        raise UsageError("all normal radiographs belong to one patient: training and validation need two; add a manifest.csv with a column patient")
    return splits


def _drop_abnormal(splits: dict[str, list[Record]]) -> None:
    for name in ("train", "val"):
        kept = [record for record in splits[name] if record.label != 1]
        if len(kept) < len(splits[name]):
            warnings.warn(f"{len(splits[name]) - len(kept)} abnormal radiographs of the split {name} are left out: only normals train", stacklevel=3)
        splits[name] = kept


def _check_patients(splits: dict[str, list[Record]]) -> None:
    train, val, test = ({record.patient for record in splits[name]} for name in ("train", "val", "test"))
    shared = len((train & val) | (train & test) | (val & test))
    if shared:
        raise UsageError(
            f"{shared} patients of the manifest are in more than one split, which would flatter every score: "
            "give all radiographs of a patient the same split (the column patient tells who is who)"
        )


def _hold_out(records: list[Record], wanted: float, seed: int, leave: int) -> tuple[list[Record], list[Record]]:
    """Draw that many patients, rounded, at least one, but leave at least `leave` -> (left, held out), each in the old order."""
    from sklearn.model_selection import GroupShuffleSplit

    patients = [record.patient for record in records]
    drawn = min(max(1, round(wanted)), len(set(patients)) - leave)
    if drawn < 1:
        return records, []
    left, held_out = next(GroupShuffleSplit(1, test_size=drawn, random_state=seed).split(patients, groups=patients))
    return [records[i] for i in sorted(left)], [records[i] for i in sorted(held_out)]


def read_sample(record: Record, config: DataConfig) -> Sample:
    """Read, rescale and fit one radiograph and its mask; ImageReadError if either cannot be used."""
    radiograph = read_radiograph(record.path)
    shape = radiograph.pixels.shape
    try:
        x = rescale(radiograph, config.percentile_low, config.percentile_high)
    except ValueError as error:
        raise ImageReadError(record.path, str(error)) from error
    mask = None
    if record.mask:
        mask = read_mask(record.mask)
        if mask.shape != shape:
            raise ImageReadError(record.mask, f"the mask has {mask.shape} pixels, its radiograph {shape}")
        mask = fit_mask(mask, config.height, config.width, config.fit)
    return Sample(fit_image(x, config.height, config.width, config.fit), mask, shape)


def open_datasets(splits: dict[str, list[Record]], config: DataConfig, seed: int, report: Path, quiet: bool = False) -> dict[str, "RadiographDataset"]:
    """Read every file once, drop and report the unreadable ones, keep the others in memory if they fit config.cache_gb.

    report is the skipped_files.csv to write; quiet (for all processes but the first) shows no bar and writes nothing. UsageError if
    more than config.max_bad_share of the files, or a whole split, cannot be read.
    """
    records = [record for split in splits.values() for record in split]
    fits = len(records) * config.height * config.width * 5 <= config.cache_gb * 2**30  # float32 image and bool mask
    samples: dict[Path, Sample | None] = {}
    errors: dict[Path, ImageReadError] = {}

    def attempt(record: Record) -> Sample | ImageReadError:
        try:
            return read_sample(record, config)
        except ImageReadError as error:
            return error

    pool = ThreadPoolExecutor(max(1, config.num_workers))
    try:
        results = tqdm(pool.map(attempt, records), "reading radiographs", len(records), disable=quiet)
        for record, result in zip(records, results, strict=True):
            if isinstance(result, ImageReadError):
                errors[record.path] = result
            elif fits:
                samples[record.path] = result
    finally:
        pool.shutdown(cancel_futures=True)
    if not quiet:
        _report_skipped(errors, len(records), report)
    readable = {name: [record for record in split if record.path not in errors] for name, split in splits.items()}
    emptied = any(split and not readable[name] for name, split in splits.items())
    if emptied or len(errors) > config.max_bad_share * len(records):
        raise UsageError(f"{len(errors)} of {len(records)} files cannot be read, see {report}: mend or remove them, or raise data.max_bad_share")
    return {name: RadiographDataset(split, config, False, seed, samples if fits else None) for name, split in readable.items()}


def _report_skipped(errors: dict[Path, ImageReadError], total: int, report: Path) -> None:
    """Write skipped_files.csv if there is anything to say, and remove that of an earlier run if not."""
    if not errors:
        report.unlink(missing_ok=True)
        return
    report.parent.mkdir(parents=True, exist_ok=True)
    beside = report.with_suffix(".tmp")
    with open(beside, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "reason"), *((path, str(error)) for path, error in errors.items())])
    os.replace(beside, report)
    warnings.warn(f"{len(errors)} of {total} files cannot be read and are left out: see {report}", stacklevel=3)


class RadiographDataset(Dataset):
    """Radiographs as tensors: dataset[index], or dataset[epoch, index] where augmentation shall differ from epoch to epoch.

    An item holds image (float32 (1, H, W) in [-1, 1]), mask (uint8 (1, H, W), zeros where there is none), label (-1 unknown),
    has_mask, index, original_height and original_width (of the file, in pixels). With augment, an item depends on seed, epoch
    and index alone. Without samples in memory each access reads the file, and raises ImageReadError where that fails.
    """

    def __init__(self, records: list[Record], config: DataConfig, augment: bool = False, seed: int = 0, samples: dict[Path, Sample] | None = None):
        self.records = records
        self.config = config
        self.augment = augment
        self.seed = seed
        self._samples = samples
        self._geometry = None

    def augmented(self) -> "RadiographDataset":
        """The same radiographs, and the same memory, with augmentation."""
        other = copy.copy(self)
        other.augment = True
        return other

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        record = self.records[index]
        image, mask, original_shape = self._samples[record.path] if self._samples is not None else read_sample(record, self.config)
        has_mask = mask is not None
        mask = mask.astype(np.uint8) if has_mask else np.zeros(image.shape, np.uint8)
        if self.augment:
            image, mask = self._augment(image, mask, np.random.default_rng((self.seed, epoch, index)))
        return {
            "image": torch.from_numpy(np.array(image[None])),  # a copy: the one in memory stays as it is
            "mask": torch.from_numpy(mask[None]),
            "label": -1 if record.label is None else record.label,
            "has_mask": has_mask,
            "index": index,
            "original_height": original_shape[0],
            "original_width": original_shape[1],
        }

    def _augment(self, image: np.ndarray, mask: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Move image and mask together, then change the grey levels of the image."""
        config = self.config
        if self._geometry is None:
            self._geometry = _geometry(config)
        self._geometry.set_random_seed(int(random.integers(2**31)))
        moved = self._geometry(image=image[..., None], mask=mask)
        x = moved["image"][..., 0] * random.uniform(1 - config.contrast, 1 + config.contrast) + random.uniform(-config.brightness, config.brightness)
        x = 2 * np.clip((x + 1) / 2, 0, 1) ** random.uniform(1 - config.gamma, 1 + config.gamma) - 1
        x = x + random.uniform(0, config.noise_std) * random.standard_normal(x.shape, np.float32)
        return np.clip(x, -1, 1).astype(np.float32), moved["mask"]


def _geometry(config: DataConfig):
    """Flip, rotation, shift and zoom. The uncovered border repeats the edge: black would draw an edge no radiograph has."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks the network for its newest version at import
    import albumentations
    import cv2

    shift, scale, rotate = config.shift_share, config.scale_share, config.rotate_degrees
    move = albumentations.Affine(
        scale=(1 - scale, 1 + scale), translate_percent=(-shift, shift), rotate=(-rotate, rotate), keep_ratio=True, border_mode=cv2.BORDER_REPLICATE, p=1
    )
    return albumentations.Compose([albumentations.HorizontalFlip(p=0.5 if config.flip else 0), move])
