"""Nonsense for the reader of radiographs, found by hypothesis: python benchmarks/fuzz.py --examples 20000

Takes valid files (a DICOM panoramic in six codings, without preamble, with odd tags; PNG, JPEG, TIFF, BMP), spoils
each at random in up to four places (bytes changed, removed, repeated, set to extremes, taken from another file), and
reads it in every way. Each must be read, or be refused with one short line that tells a user something, within
--seconds-each; whatever else happens is made as small as it can be, printed, and the end with exit code 1. A finding
belongs into tests/test_bad_input.py.

Prints how many were tried, read and refused, and the most memory that was needed. The seed is fixed: the same command
tries the same files.
"""

import argparse
import faulthandler
import resource
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as some

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from test_bad_input import COUNTS, judge, picture
from test_reading import noise, write_dicom

from runtime import run_script

UNCODED = (ImplicitVRLittleEndian, ExplicitVRLittleEndian)
CODINGS = (*UNCODED, RLELossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless)
PICTURES = {"PNG": "L", "TIFF": "L", "BMP": "RGB", "JPEG": "RGB"}
EXTREMES = b"\x00", b"\xff", b"\x7f\xff", b"\x80\x00", b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"1e308", b"nan", b"-1"
HEADER = 1200  # most of what says what a file is lies in its first bytes


def valid_files() -> dict[str, bytes]:
    """The contents that are spoilt, by the name of what they are."""
    pixels = noise(12, channels=()) % 4096
    with tempfile.TemporaryDirectory() as folder:
        found = {
            coding.name: write_dicom(Path(folder) / "x.dcm", pixels, coding, bits=12).read_bytes() for coding in CODINGS
        }
    found["no preamble"] = found[CODINGS[0].name][132:]
    return found | {kind: picture(mode, suffix=kind) for kind, mode in PICTURES.items()}


@some.composite
def edits(draw) -> list[tuple]:
    """Up to four: where (a share of the file, or of its header), what, and with which bytes."""
    place = some.tuples(some.booleans(), some.floats(0, 1, exclude_max=True))
    what = some.sampled_from(("set", "set", "set", "cut", "repeat", "end"))
    content = some.one_of(some.binary(min_size=1, max_size=8), some.sampled_from(EXTREMES))
    return draw(some.lists(some.tuples(place, what, content, some.integers(1, 64)), min_size=1, max_size=4))


def spoilt(content: bytes, changes: list[tuple]) -> bytes:
    """The content after all the edits."""
    made = bytearray(content)
    for (in_header, share), what, new, count in changes:
        start = int(share * (min(HEADER, len(made)) if in_header else len(made)))
        if what == "set":
            made[start : start + len(new)] = new
        elif what == "cut":
            del made[start : start + count]
        elif what == "repeat":
            made[start:start] = made[start : start + count]
        else:
            del made[start:]
    return bytes(made)


def main() -> None:
    """Try, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--seconds-each", type=int, default=20, help="longer than this is a file that hangs")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    known, began = valid_files(), time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, _too_long)

    with tempfile.TemporaryDirectory() as folder:

        @seed(0)
        @settings(
            max_examples=options.examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        @given(some.sampled_from(sorted(known)), edits())
        def every_file_is_read_or_refused(kind: str, changes: list[tuple]) -> None:
            path = Path(folder) / ("x.dcm" if kind in {coding.name for coding in CODINGS} else "x")
            path.write_bytes(spoilt(known[kind], changes))
            signal.alarm(options.seconds_each)
            faulthandler.dump_traceback_later(2 * options.seconds_each, exit=True)  # where no signal is heard
            try:
                judge(path)
            finally:
                signal.alarm(0)
                faulthandler.cancel_dump_traceback_later()

        every_file_is_read_or_refused()
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    minutes = (time.monotonic() - began) / 60
    print(f"{COUNTS}; {memory:.0f} MiB more than before, {minutes:.1f} minutes, numpy {np.__version__}")


class Hangs(BaseException):
    """No error of a file's: no reader turns it into a reason."""


def _too_long(number: int, frame: object) -> None:
    raise Hangs("a file hangs")


if __name__ == "__main__":
    run_script(main)
