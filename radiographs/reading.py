"""Leaf: one radiograph file to float pixels, and the files that look like one.

Grey levels stay raw and bright stays dense: whatever the file format, a filling is brighter than air. `rescale` then
maps robust percentiles to [-1, 1], which replaces a DICOM's display window. Shapes are (H, W), rows first, y down, and
pictures stand upright, as their EXIF orientation says.
"""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError

from checks import UsageError
from radiographs.dicom import Header, is_dicom, read_dicom, read_dicom_header
from radiographs.pictures import read_picture

SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
LOSSY_BLACK = 127  # a JPEG's black is never clean: its masks are white beyond this
RESULTS = {"checkpoint_last.pt", "checkpoint_best.pt", "latents.json", "examination.json", "reader.pt"}  # of a phase
LARGEST_FILE = 2**30  # bytes: a film of many frames, at most
PUZZLED = (AttributeError, TypeError, LookupError, AssertionError, ArithmeticError)


class ImageReadError(Exception):
    """A file that cannot be used as a radiograph.

    str() is "file name: reason", without the folder, which may name a patient.
    """

    def __init__(self, path: str | Path, reason: str):
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path.name}: {self.reason}"


@dataclass(frozen=True)
class Radiograph:
    """One radiograph at the size of its file."""

    pixels: np.ndarray  # float32 (H, W), raw intensity, bright = dense
    valid: np.ndarray  # bool (H, W), False on pixel padding
    patient: str | None  # DICOM PatientID


def read_radiograph(path: str | Path) -> Radiograph:
    """Read DICOM (recognized by content), PNG, JPEG, TIFF or BMP, 8 to 32 bits, grey or colour, at the file's size.

    ImageReadError for anything else.
    """
    with _read_errors(path):
        if is_dicom(path):
            pixels, valid, patient = read_dicom(path)
        else:
            pixels, _ = read_picture(path)
            valid, patient = np.ones(pixels.shape, bool), None
        with np.errstate(over="ignore"):  # of what no float32 holds, infinity is left
            pixels = pixels.astype(np.float32)
        finite = np.isfinite(pixels)
        return Radiograph(np.where(finite, pixels, 0), valid & finite, patient)


def read_mask(path: str | Path) -> np.ndarray:
    """Read a lesion mask as bool (H, W): True where not black (in a JPEG: where bright) and not transparent.

    In one colour with a varying alpha, the alpha is the mask. ImageReadError if it cannot be read.
    """
    with _read_errors(path):
        if is_dicom(path):
            levels, alpha = read_dicom(path)[0], None
        else:
            levels, alpha = read_picture(path)
        lossy = Path(path).suffix.lower() in (".jpg", ".jpeg")
        marked = levels > (LOSSY_BLACK if lossy else 0)
        if alpha is None or np.ptp(alpha) == 0:
            return marked
        one_colour = np.ptp(levels) < 0.5  # of a grey level
        return alpha > 0 if one_colour else marked & (alpha > 0)


def read_header(path: str | Path) -> Header:
    """Whose a file is and whether it is an image, without reading its pixels.

    What is no DICOM file, or a damaged one, counts as an image of nobody: reading it will say what is wrong with it.
    """
    try:
        with _read_errors(path):
            return read_dicom_header(path) if is_dicom(path) else Header(None, True)
    except ImageReadError:
        return Header(None, True)


def find_radiographs(root: str | Path) -> list[Path]:
    """Every file below root that looks like a radiograph, sorted: by suffix, or without one by the DICOM marker.

    Hidden files and folders are left alone, and so are, with a warning, linked folders and those that hold what the
    four phases wrote. UsageError if a folder cannot be read: its patients would be missing without a word. It is not
    named: it may be a patient's.
    """

    def refuse(error: OSError) -> None:
        raise UsageError(f"a folder of radiographs cannot be read ({error.strerror}): see to its rights") from error

    found = []
    linked = results = 0
    for folder, folders, names in os.walk(root, onerror=refuse):
        if RESULTS.intersection(names):
            results += 1
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked += sum(Path(folder, name).is_symlink() for name in folders)
        visible = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [path for path in visible if _is_radiograph(path)]
    if linked:
        warnings.warn(f"{linked} linked folders are passed over: list their files in a manifest.csv", stacklevel=2)
    if results:
        warnings.warn(f"{results} folders with results of the four phases are passed over", stacklevel=2)
    return sorted(found)


def _is_radiograph(path: Path) -> bool:
    suffix = path.suffix.lower()
    # Archives name files by their UID, so that 1.2.840.10008.5 ends in the "suffix" .5
    nameless = suffix == "" or suffix[1:].isdigit()
    return suffix in SUFFIXES or (nameless and path.is_file() and os.access(path, os.R_OK) and is_dicom(path))


def _check_file(path: Path) -> None:
    """Refuse what would hang or fill the memory: a pipe, a device, a file larger than any radiograph."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("a folder, a pipe or a device, not a file")
    if state.st_size > LARGEST_FILE:
        raise ValueError(f"{state.st_size / 2**30:.1f} GiB are too many: at most {LARGEST_FILE // 2**30}")


@contextmanager
def _read_errors(path: str | Path) -> Iterator[None]:
    """Turn every failure into ImageReadError: the decoders behind pydicom and Pillow raise anything."""
    try:
        _check_file(Path(path))
        yield
    except ImageReadError:
        raise
    except MemoryError as error:
        raise ImageReadError(path, "the machine has too little memory for it") from error
    except UnidentifiedImageError as error:
        raise ImageReadError(path, "neither a DICOM file nor a PNG, JPEG, TIFF or BMP image") from error
    except PUZZLED as error:  # in the words of a program, not of a file
        raise ImageReadError(
            path, f"damaged: what it says of itself makes no sense ({type(error).__name__})"
        ) from error
    except Exception as error:
        text = getattr(error, "strerror", None) or str(error)
        text = " ".join(text.replace(str(path), Path(path).name).split())[:300]
        raise ImageReadError(path, text or type(error).__name__) from error


def rescale(radiograph: Radiograph, low: float, high: float) -> np.ndarray:
    """Map the percentiles `low` and `high` (in [0, 100]) of the valid pixels to -1 and 1 -> x, float32 (H, W).

    Beyond them x is clipped, on padding it is -1. ValueError if there is no contrast to map.
    """
    inside = radiograph.pixels[radiograph.valid]
    black, white = np.percentile(inside, [low, high]) if inside.size else (0.0, 0.0)
    if not white > black:
        raise ValueError("no contrast: (almost) every pixel has the same grey level")
    x = np.clip((radiograph.pixels - black) / (white - black), 0, 1) * 2 - 1
    return np.where(radiograph.valid, x, -1).astype(np.float32)
