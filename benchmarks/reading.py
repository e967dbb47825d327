"""How fast radiographs are read, decoded anew and from the cache: python benchmarks/reading.py --data DATA/ufba_bench

Reads the same files on one thread: without a cache, into an empty one, and from it (the fastest of five). Compares
every value, to the last bit. Prints seconds, images per second and how many times as fast as decoding each is. The last
line is what rows of half the bytes (uint16, which would not be equal) would save.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import DataConfig
from dataset import kept_sample
from radiographs.manifest import Record, list_records
from shelf import Sample


def main() -> None:
    """One table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder of radiographs or a manifest.csv")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--size", type=int, default=512, help="height and width of the model, pixels")
    parser.add_argument("--times", type=int, default=1, help="2 is what the reader looks at")
    options = parser.parse_args()
    records = list_records(options.data)[: options.images]
    with tempfile.TemporaryDirectory() as folder:
        kept = DataConfig(height=options.size, width=options.size, cache_folder=f"{folder}/cache")
        anew = replace(kept, cache_disk_gb=0)
        decoded, reference = timed(lambda: read(records, anew, options.times))
        filling, first = timed(lambda: read(records, kept, options.times))
        again = [timed(lambda: read(records, kept, options.times)) for _ in range(5)]
    equal = all(all(map(same, reference, found)) for found in (first, *(found for _, found in again)))
    hits = min(seconds for seconds, _ in again)
    print(f"{len(records)} radiographs at {options.times} x {options.size} px, one thread")
    for name, seconds in (("decoded anew", decoded), ("into the cache", filling), ("from the cache", hits)):
        speed = f"{len(records) / seconds:8.0f} images/s {decoded / seconds:7.1f} times as fast"
        print(f"{name:15} {seconds:7.3f} s {speed}")
    whole, half = (least_seconds(dtype, reference[0].image.size) for dtype in (np.float32, np.uint16))
    print(f"rows of float32 {1e3 * whole:.2f} ms each, of uint16 {1e3 * half:.2f} ms; equal to the last bit: {equal}")
    sys.exit(not equal)


def read(records: list[Record], config: DataConfig, times: int) -> list[Sample]:
    """All of them, one after the other."""
    return [kept_sample(record, config, times) for record in records]


def timed(work: Callable[[], list[Sample]]) -> tuple[float, list[Sample]]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def same(one: Sample, other: Sample) -> bool:
    """Whether two samples are equal to the last bit."""
    arrays = zip((one.image, one.mask, one.fingerprint), (other.image, other.mask, other.fingerprint), strict=True)
    equal = (a is b or (a is not None and b is not None and a.tobytes() == b.tobytes()) for a, b in arrays)
    return all(equal) and (one.original_shape, one.digest) == (other.original_shape, other.digest)


def least_seconds(dtype: type, size: int) -> float:
    """To read so many values from a file and have them as float32 in [-1, 1]."""
    with tempfile.NamedTemporaryFile() as file:
        np.zeros(size, dtype).tofile(file)
        file.flush()
        found = []
        for _ in range(5):
            began = time.perf_counter()
            values = np.fromfile(file.name, dtype)
            if dtype != np.float32:
                values = values.astype(np.float32) * np.float32(2 / 65535) - np.float32(1)
            found.append(time.perf_counter() - began)
    return min(found)


if __name__ == "__main__":
    main()
