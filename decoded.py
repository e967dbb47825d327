"""Leaf: radiographs as `dataset.read_sample` made them, kept on disk: no later epoch, phase or run decodes them again.

    cache = cache_of(config)                                     None where data.cache_disk_gb is 0
    sample = cache.sample(record, config, times, finest, make)   make() is called for what is not there

Below data.cache_folder each preprocessing has a shelf (shelf.py) with its rows and an index: what a file and its mask
hold, as a hash, to the number of a row. Values are kept as they were made, in float32: a hit equals a miss to the last
bit.

What is trusted. A file whose device, inode, size and times of change (mtime, ctime) are as they were when it was hashed
holds what it held: no program of a user changes a content and leaves its ctime. A file that changed less than SETTLED
ago, or by a clock ahead of ours, is hashed at every look; one that was moved, touched or copied is hashed once and
known again by its content. The versions of what decodes and fits are part of the preprocessing, and so is the kind of
machine. What reading a file warns of is said when it is decoded, and not again.

Nothing here names a patient or a place: keys are hashes of numbers and of contents. But rows are pixels: the folder is
its owner's alone. It may be removed at any time. Rows of files that changed or went are never found again, and their
room is given to others when it is needed.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from config import DataConfig
from files import says_full, sha256
from holding import take
from ledger import Ledger, key_of, private
from progress import warn
from radiographs.manifest import Record
from radiographs.reading import LARGEST_FILE
from shelf import Sample, Shelf, drop, last_used

RECIPE = 2  # raise it when code changes what read_sample makes of the same file and settings
SETTLED = 2 * 10**9  # ns: a file may change twice within one tick of a file system's clock
LEFT_FREE = 2**30  # bytes of a disk that are left to others
MAKERS = ("numpy", "opencv-python-headless", "opencv-python", "pillow", "pydicom")
MAKERS += ("pylibjpeg", "pylibjpeg-openjpeg", "pyjpegls", "imagecodecs")


def cache_of(config: DataConfig) -> "DecodedCache | None":
    """The cache of this process at data.cache_folder; None where it is switched off."""
    if not config.cache_disk_gb:
        return None
    return _opened(Path(config.cache_folder), int(config.cache_disk_gb * 2**30), os.getpid())


@functools.lru_cache(maxsize=8)
def _opened(folder: Path, limit: int, process: int) -> "DecodedCache":
    return DecodedCache(folder, limit)  # of one process: a lock means nothing in one that is forked off


@contextmanager
def reading_told(count: int, config: DataConfig, quiet: bool = False) -> Iterator[None]:
    """Say of what is read within how long it took, and how much of it lay in the cache."""
    cache, began = cache_of(config), time.perf_counter()
    before = cache.hits if cache else 0
    yield
    if not quiet:
        kept = f", {cache.hits - before} of them from {cache.folder}" if cache else ""
        print(f"{count} radiographs read in {time.perf_counter() - began:.1f} s{kept}")


class DecodedCache:
    """Samples on disk below a folder, at most `limit` bytes of them."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.hits = 0
        self.files = Ledger(folder / "files.bin", 32)  # a file's state to the hash of its content
        self.shelves: dict[str, Shelf] = {}
        self.lock = threading.RLock()
        self.told: set[str] = set()

    def sample(
        self, record: Record, config: DataConfig, times: int, finest: tuple[int, int] | None, make: Callable[[], Sample]
    ) -> Sample:
        """What `make` makes of a record, from the disk where it lies there."""
        contents = self._contents(record)
        if contents is None:  # whoever reads it will say why
            return make()
        key, shelf = key_of(contents), self._shelf(config, times, finest)
        found = shelf.get(key)
        if found is not None:
            with self.lock:
                self.hits += 1
        else:
            found = make()
            if self._contents(record) == contents:  # and not another file by now
                self._write(lambda: self._keep(shelf, key, found))
        if shelf.damaged or shelf.index.damaged:
            self._say("damaged", f"a part of {self.folder} was damaged: it is made anew")
        return found

    def _keep(self, shelf: Shelf, key: bytes, made: Sample) -> None:
        if not shelf.put(key, made, self._has_room(shelf)):
            more = "raise data.cache_disk_gb, or make room on its disk"
            self._say("full", f"{self.folder} is full: other radiographs are decoded at every look ({more})")

    def _has_room(self, shelf: Shelf) -> bool:
        """Whether a row may be added, once shelves that nobody uses have gone: the longest unused ones first."""
        others = [folder for folder in self.folder.iterdir() if folder.is_dir() and folder != shelf.folder]
        others.sort(key=last_used, reverse=True)
        while True:
            kept = sum(path.stat().st_size for path in self.folder.glob("*/rows.npy"))
            free = shutil.disk_usage(self.folder).free - LEFT_FREE
            if kept + shelf.row.itemsize <= self.limit and free >= shelf.row.itemsize:
                return True
            while others and not drop(others[-1]):
                others.pop()
            if others:
                others.pop()
            elif kept <= self.limit or not shelf.clear():  # it is above where the limit was lowered
                return False

    def _contents(self, record: Record) -> tuple[str, ...] | None:
        """Hashes of what a record's files hold; None where one cannot be read."""
        try:
            return tuple(self._content(Path(path)) for path in (record.path, record.mask) if path)
        except (OSError, ValueError):
            return None

    def _content(self, path: Path) -> str:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode) or state.st_size > LARGEST_FILE:
            raise ValueError("no file to be read")
        key = key_of(state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        settled = time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > SETTLED
        with self.lock:
            known = self.files.get(key) if settled else None
        if known is None:
            known = bytes.fromhex(sha256(path))
            if settled:
                self._write(lambda: self.files.append(key, known))
        return known.hex()

    def _write(self, write: Callable[[], None]) -> None:
        """Write into the cache while nobody else does; what cannot be written is decoded again, and that is said."""
        try:
            with self.lock, _alone_in(self.folder):
                write()
        except OSError as error:
            why = "its disk is full" if says_full(error) else error.strerror or str(error)
            self._say("unwritable", f"{self.folder} cannot be written ({why}): radiographs are decoded at every look")

    def _say(self, what: str, text: str) -> None:
        """A line, once, and by one of the processes that read."""
        first = multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0"
        with self.lock:
            if first and what not in self.told:
                warn(text)
            self.told.add(what)

    def _shelf(self, config: DataConfig, times: int, finest: tuple[int, int] | None) -> Shelf:
        name = shelf_name(tuple(config.preprocessing.items()), times, finest and tuple(finest))
        with self.lock:
            if name not in self.shelves:
                self.shelves[name] = Shelf(self.folder / name, (times * config.height, times * config.width))
            return self.shelves[name]


@functools.lru_cache(maxsize=64)
def shelf_name(preprocessing: tuple, times: int, finest: tuple[int, int] | None) -> str:
    """Everything beside the files that a sample follows from, as a hash."""
    made_by = {found.name: found.version for name in MAKERS for found in metadata.distributions(name=name)}
    whole = [RECIPE, preprocessing, times, finest, made_by, platform.machine(), sys.byteorder]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other process writes into the cache meanwhile, where its disk has such locks."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)  # it was there before
    with open(folder / ".lock", "a", opener=private) as file:
        take(file.fileno(), alone=True, wait=True)  # without locks two may write one row, and its checksum says so
        yield
