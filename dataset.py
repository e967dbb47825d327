"""Part: records -> x in [-1, 1], mask, label; read once or as a stream, augmented reproducibly.

data = open_normals(config, seed, report)                   every file read once, bad files reported
train, val = data["train"].augmented(), data["val"]
for batch in read_batches(records, config, 8, errors):      or as a stream: each file is read when its turn comes
"""

import copy
import hashlib
import itertools
import math
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from augmentation import Augmentation
from checks import UsageError
from config import DataConfig
from decoded import cache_of, reading_told
from files import write_csv
from progress import bar
from radiographs.geometry import fit_detail, fit_mask
from radiographs.likeness import fingerprint, twins
from radiographs.manifest import Record, describe_patients, list_records, split_records
from radiographs.reading import ImageReadError, read_mask, read_radiograph, rescale
from results import refuse_to_write_among
from shelf import Sample

TWINS = "twins_local_only.csv"


def read_sample(record: Record, config: DataConfig, times: int = 1, finest: tuple[int, int] | None = None) -> Sample:
    """Read, rescale and fit one radiograph and its mask to `times` the size of the model, no finer than `finest`.

    ImageReadError if either cannot be used.
    """
    radiograph = read_radiograph(record.path)
    shape, height, width, fit = radiograph.pixels.shape, config.height, config.width, config.fit
    try:
        x = rescale(radiograph, config.percentile_low, config.percentile_high)
    except ValueError as error:
        raise ImageReadError(record.path, str(error)) from error
    mask = None
    if record.mask:
        try:
            mask = read_mask(record.mask)
        except ImageReadError as error:
            raise ImageReadError(record.path, f"its mask {error.path.name} cannot be used: {error.reason}") from error
        if mask.shape != shape:
            raise ImageReadError(record.path, f"its mask {record.mask.name} has {mask.shape} pixels, not {shape}")
        mask = fit_mask(mask, height, width, fit, times)
    content = repr(shape).encode() + radiograph.pixels.tobytes()
    if not radiograph.valid.all():
        content += np.packbits(radiograph.valid).tobytes()
    digest = hashlib.sha256(content).hexdigest()
    image = fit_detail(x, height, width, fit, times, finest)
    return Sample(image, mask, shape, digest, fingerprint(x))


def kept_sample(record: Record, config: DataConfig, times: int = 1, finest: tuple[int, int] | None = None) -> Sample:
    """What `read_sample` gives, from the disk where an earlier look has left it there (decoded.py)."""
    cache, read = cache_of(config), partial(read_sample, record, config, times, finest)
    return read() if cache is None else cache.sample(record, config, times, finest, read)


def open_datasets(
    splits: dict[str, list[Record]], config: DataConfig, seed: int, report: Path, quiet: bool = False
) -> dict[str, "RadiographDataset"]:
    """Read every file once, drop and report the unreadable ones, keep the others in memory if they fit config.cache_gb.

    Those that do not fit are read from the disk at each access, where config.cache_disk_gb has kept them decoded.

    report is the skipped_local_only.csv to write; quiet (for all processes but the first) shows no bar and writes
    nothing. UsageError if more than config.max_bad_share of the files, or a whole split, cannot be read.
    """
    records = [record for split in splits.values() for record in split]
    fits = len(records) * config.height * config.width * 5 <= config.cache_gb * 2**30  # float32 image and bool mask
    samples: dict[Path, Sample] = {}
    digests: dict[Path, str] = {}
    prints: dict[Path, np.ndarray] = {}
    errors: list[ImageReadError] = []
    for record, result in _attempts(records, config, quiet):
        if isinstance(result, ImageReadError):
            errors.append(result)
            continue
        digests[record.path] = result.digest
        prints[record.path] = result.fingerprint
        if fits:
            samples[record.path] = result
    if not quiet:
        report_skipped(errors, len(records), report)
    readable = {name: [record for record in split if record.path in digests] for name, split in splits.items()}
    emptied = any(split and not readable[name] for name, split in splits.items())
    refuse_too_many_bad(len(errors), len(records), config, report, emptied)
    if not quiet:
        report_twins(readable, prints, report.with_name(TWINS))
    datasets = {}
    for name, split in readable.items():
        theirs = [digests[record.path] for record in split], [prints[record.path] for record in split]
        datasets[name] = RadiographDataset(split, config, seed, *theirs, samples if fits else None)
    return datasets


def open_normals(config: DataConfig, seed: int, report: Path, quiet: bool = False) -> dict[str, "RadiographDataset"]:
    """The normal radiographs of config.root that train and validate, as `open_datasets` reads them."""
    records = list_records(config.root, config.patient_from)
    if not quiet:
        print(describe_patients(records))
    refuse_to_write_among(records, report.parent)
    splits = split_records(records, config)
    normals = {name: splits[name] for name in ("train", "val")}
    return open_datasets(normals, config, seed, report, quiet)


def attempt_sample(
    record: Record, config: DataConfig, times: int = 1, finest: tuple[int, int] | None = None
) -> Sample | ImageReadError:
    """The radiograph, or why it cannot be used."""
    try:
        return kept_sample(record, config, times, finest)
    except ImageReadError as error:
        return error


def _attempts(
    records: list[Record], config: DataConfig, quiet: bool
) -> Iterator[tuple[Record, Sample | ImageReadError]]:
    """All of them, in order, read by threads."""
    pool = ThreadPoolExecutor(max(1, config.num_workers))
    try:
        with reading_told(len(records), config, quiet):
            attempts = pool.map(partial(attempt_sample, config=config), records)
            attempts = bar(attempts, desc="reading radiographs", total=len(records), unit="file", disable=quiet)
            yield from zip(records, attempts, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def report_skipped(errors: list[ImageReadError], total: int, report: Path) -> None:
    """Write skipped_local_only.csv if there is anything to say, and remove that of an earlier run if not.

    It names files without their folders, which may name patients.
    """
    if not errors:
        report.unlink(missing_ok=True)
        return
    write_csv(report, ["file", "reason"], [[error.path.name, error.reason] for error in errors], private=True)
    warnings.warn(f"{len(errors)} of {total} files cannot be read and are left out: see {report}", stacklevel=3)


def report_twins(splits: dict[str, list[Record]], prints: dict[Path, np.ndarray], report: Path) -> None:
    """Write twins_local_only.csv if radiographs of several patients, or of several splits, are one picture.

    What trains and validates at once flatters every score, and so does one patient under two names.
    """
    placed = [(name, record) for name, split in splits.items() for record in split]
    everyone = np.stack([prints[record.path] for _, record in placed])
    found = ((*placed[one], *placed[other]) for one, other in twins(everyone))
    told = (
        [split, record.path.name, other_split, twin.path.name]
        for split, record, other_split, twin in found
        if split != other_split or record.patient != twin.patient
    )
    rows = list(itertools.islice(told, 10_000))  # nobody reads more
    if not rows:
        report.unlink(missing_ok=True)
        return
    write_csv(report, ["split", "file", "split of its twin", "its twin"], rows, private=True)
    warnings.warn(
        f"{len(rows)} pairs of radiographs of different patients or splits look like one picture: see {report}, and "
        "give one picture one patient",
        stacklevel=3,
    )


def refuse_too_many_bad(
    bad: int, total: int, config: DataConfig, report: Path, emptied: bool = False, broken_off: bool = False
) -> None:
    """UsageError if more than config.max_bad_share of the files cannot be read, or if that `emptied` a split.

    `broken_off` says that not all files were tried.
    """
    if emptied or bad > config.max_bad_share * total:
        raise UsageError(
            f"{'at least ' * broken_off}{bad} of {total} files cannot be read, see {report}: mend or remove them, or "
            "raise data.max_bad_share"
        )


def read_batches(
    records: list[Record],
    config: DataConfig,
    batch_size: int,
    errors: list[ImageReadError],
    times: int = 1,
    finest: tuple[int, int] | None = None,
) -> Iterator[list[tuple[int, Sample]]]:
    """Batches of (position in records, sample as `read_sample` makes it), in order, read by threads one batch ahead.

    More batches where there are more threads than files in one: they read while the device computes. What cannot be
    read goes to `errors`; a batch of which nothing can be read is left out. Any other exception ends it.
    """
    threads = max(1, config.num_workers)
    pool, starts = ThreadPoolExecutor(threads), range(0, len(records), batch_size)
    depth = math.ceil(threads / batch_size)  # batches, so that every thread has a file

    def begin(start: int) -> list[Future]:
        batch = records[start : start + batch_size]
        return [pool.submit(attempt_sample, record, config, times, finest) for record in batch]

    try:
        ahead = deque(map(begin, starts[:depth]))
        for start in starts:
            results = [future.result() for future in ahead.popleft()]
            ahead.append(begin(start + depth * batch_size))
            batch = []
            for position, result in enumerate(results, start):
                if isinstance(result, ImageReadError):
                    errors.append(result)
                else:
                    batch.append((position, result))
            if batch:
                yield batch
    finally:
        pool.shutdown(cancel_futures=True)


class RadiographDataset(Dataset):
    """Radiographs as tensors: dataset[index], or dataset[epoch, index] where augmentation differs from epoch to epoch.

    An item holds image (float32 (1, H, W) in [-1, 1]), mask (uint8 (1, H, W), zeros where there is none), label (-1
    unknown), has_mask, index, original_height and original_width (of the file, in pixels). With augmentation an item
    depends on seed, epoch and index alone; where a device is to do it, the item is plain and has `numbers` beside it.
    Without samples in memory each access reads the file, and raises UsageError where that fails. `digests` says of
    every record what its file holds, `prints` what it looks like.
    """

    def __init__(
        self,
        records: list[Record],
        config: DataConfig,
        seed: int,
        digests: list[str],
        prints: list[np.ndarray],
        samples: dict[Path, Sample] | None,
    ):
        self.records = records
        self.config = config
        self.seed = seed
        self.digests = digests
        self.prints = prints
        self._samples = samples
        self._augmentation: Augmentation | None = None
        self._on_device = False

    def augmented(self, on_device: bool = False) -> "RadiographDataset":
        """The same radiographs, and the same memory, with augmentation; or plain, with its numbers, `on_device`."""
        other = copy.copy(self)
        other._augmentation, other._on_device = Augmentation(self.config), on_device
        return other

    @property
    def digest(self) -> str:
        """Of what all the files hold, in order: the same for a moved folder, another for a changed file."""
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    @property
    def patients_digest(self) -> str:
        """Of whose they are, in order: it changes when a file is found to be somebody else's."""
        patients = "\n".join(record.patient for record in self.records)
        return hashlib.sha256(patients.encode(errors="surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        record = self.records[index]
        sample = self._samples[record.path] if self._samples is not None else self._read_again(index)
        image, mask = sample.image, sample.mask
        has_mask = mask is not None
        mask = mask.astype(np.uint8) if has_mask else np.zeros(image.shape, np.uint8)
        more = {}
        if self._augmentation:
            draws = self._augmentation.draw(image.shape, np.random.default_rng((self.seed, epoch, index)))
            if self._on_device:
                more = {"numbers": self._augmentation.numbers(draws)}
            else:
                image, mask = self._augmentation.on_host(image, mask, draws)
        return {
            "image": torch.from_numpy(np.array(image[None])),  # a copy: the one in memory stays as it is
            "mask": torch.from_numpy(mask[None]),
            "label": -1 if record.label is None else record.label,
            "has_mask": has_mask,
            "index": index,
            "original_height": sample.original_shape[0],
            "original_width": sample.original_shape[1],
            **more,
        }

    def _read_again(self, index: int) -> Sample:
        """What was read when the dataset was opened, and nothing else under its name."""
        try:
            sample = kept_sample(self.records[index], self.config)
        except ImageReadError as error:
            raise UsageError(f"{error}, though it could be read at first: give the same command again") from error
        if sample.digest != self.digests[index]:
            raise UsageError(f"{self.records[index].path.name} changed while it was used: give the same command again")
        return sample
