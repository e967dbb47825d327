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
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from config import DataConfig, UsageError
from radiographs.geometry import fit_image, fit_mask
from radiographs.manifest import Record
from radiographs.reading import (
    ImageReadError,
    read_mask,
    read_radiograph,
    rescale,
)


class Sample(NamedTuple):
    """One radiograph at the size of the model."""

    image: np.ndarray  # float32 (H, W) in [-1, 1]
    mask: np.ndarray | None  # bool (H, W), True on a lesion
    original_shape: tuple[int, int]  # rows, columns of the file


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


def open_datasets(
    splits: dict[str, list[Record]], config: DataConfig, seed: int, report: Path, quiet: bool = False
) -> dict[str, "RadiographDataset"]:
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
        raise UsageError(
            f"{len(errors)} of {len(records)} files cannot be read, see {report}: mend or remove them, or raise data.max_bad_share"
        )
    return {
        name: RadiographDataset(split, config, False, seed, samples if fits else None)
        for name, split in readable.items()
    }


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

    def __init__(
        self,
        records: list[Record],
        config: DataConfig,
        augment: bool = False,
        seed: int = 0,
        samples: dict[Path, Sample] | None = None,
    ):
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
        image, mask, original_shape = (
            self._samples[record.path] if self._samples is not None else read_sample(record, self.config)
        )
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

    def _augment(
        self, image: np.ndarray, mask: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Move image and mask together, then change the grey levels of the image."""
        config = self.config
        if self._geometry is None:
            self._geometry = _geometry(config)
        self._geometry.set_random_seed(int(random.integers(2**31)))
        moved = self._geometry(image=image[..., None], mask=mask)
        x = moved["image"][..., 0] * random.uniform(1 - config.contrast, 1 + config.contrast) + random.uniform(
            -config.brightness, config.brightness
        )
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
        scale=(1 - scale, 1 + scale),
        translate_percent=(-shift, shift),
        rotate=(-rotate, rotate),
        keep_ratio=True,
        border_mode=cv2.BORDER_REPLICATE,
        p=1,
    )
    return albumentations.Compose([albumentations.HorizontalFlip(p=0.5 if config.flip else 0), move])
