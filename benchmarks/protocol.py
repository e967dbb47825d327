"""Who trains, who calibrates and who is tested in a comparison, and how a method is judged: the same for all of them.

A peer is one file in `peers/` with one class, made with a seed and the config of the four phases:

    fit(normals)        learns from the training normals, float32 (N, H, W) in [-1, 1]
    score(images)       maps (B, H, W) and scores (B,) of images (B, H, W), higher where more anomalous

Maps are judged at the size of the files, whatever size a method works at. Thresholds come from validation normals; the
labels and masks of the test split are seen by `judge` alone, and nothing is chosen by what it says.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from checks import UsageError
from config import DataConfig
from dataset import Sample, read_batches
from metrics import summarize
from radiographs.geometry import content, unfit_map
from radiographs.manifest import Record, list_records, split_records
from radiographs.reading import read_mask
from thresholds import threshold_from_normals

PIXEL_FPR = 0.001  # share of the pixels of validation normals above the threshold that Dice is taken at
BATCH = 8


class Peer(Protocol):
    """What a method from elsewhere offers."""

    def fit(self, normals: np.ndarray) -> None: ...

    def score(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass
class Verdicts:
    """What a method says of the test split, at the size of the files."""

    records: list[Record] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    maps: list[np.ndarray] = field(default_factory=list)
    pixel_threshold: float = 0.0

    def add(self, record: Record, score: float, anomaly_map: np.ndarray) -> None:
        """One labelled image."""
        self.records.append(record)
        self.scores.append(float(score))
        self.maps.append(anomaly_map)


def splits_of(config: DataConfig) -> dict[str, list[Record]]:
    """Training, validation and test records of data.root; UsageError without labelled normals and others to test."""
    splits = split_records(list_records(config.root, config.patient_from), config)
    splits["test"] = [record for record in splits["test"] if record.label is not None]
    if len({record.label for record in splits["test"]}) < 2:
        raise UsageError(f"{config.root} has no test split of images labelled 0 and 1: a comparison needs both")
    return splits


def read_all(
    records: list[Record], config: DataConfig, times: int = 1, finest: tuple[int, int] | None = None
) -> Iterator[list[tuple[int, Sample]]]:
    """Batches of (position, sample); UsageError for a file that cannot be read: a comparison leaves nothing out."""
    errors = []
    yield from read_batches(records, config, BATCH, errors, times, finest)
    if errors:
        number = [record.path for record in records].index(errors[0].path)
        raise UsageError(f"radiograph {number} of {len(records)} (counted from 0) cannot be read: {errors[0].reason}")


def images_of(records: list[Record], config: DataConfig) -> np.ndarray:
    """The radiographs of these records, float32 (N, H, W) in [-1, 1]."""
    return np.stack([sample.image for batch in read_all(records, config) for _, sample in batch])


def examine(peer: Peer, splits: dict[str, list[Record]], config: DataConfig) -> Verdicts:
    """Fit a peer to the training normals, take its threshold from the validation normals, ask it for the test split."""
    peer.fit(images_of(splits["train"], config))
    pixels = []
    for batch in read_all(splits["val"], config):
        maps = peer.score(np.stack([sample.image for _, sample in batch]))[0]
        for (_, sample), own in zip(batch, maps, strict=True):
            pixels.append(own[content(sample.original_shape, *own.shape, config.fit)].ravel())
    verdicts = Verdicts(pixel_threshold=threshold_from_normals(np.concatenate(pixels), PIXEL_FPR))
    with tqdm(total=len(splits["test"]), desc="test", unit="image") as progress:
        for batch in read_all(splits["test"], config):
            maps, scores = peer.score(np.stack([sample.image for _, sample in batch]))
            for (index, sample), anomaly_map, score in zip(batch, maps, scores, strict=True):
                verdicts.add(splits["test"][index], score, unfit_map(anomaly_map, sample.original_shape, config.fit))
            progress.update(len(batch))
    return verdicts


def judge(verdicts: Verdicts) -> dict:
    """Everything that `metrics.summarize` says of them: per kind, over all, and the mean of the kinds."""
    return summarize(
        verdicts.scores,
        [record.label for record in verdicts.records],
        [record.kind for record in verdicts.records],
        verdicts.maps,
        [read_mask(Path(record.mask)) if record.mask else None for record in verdicts.records],
        verdicts.pixel_threshold,
        [record.patient for record in verdicts.records],
    )
