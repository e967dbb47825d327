"""Leaf: one radiograph file to float pixels, and the geometry between the size of the file and the size of the model.

Grey levels stay raw and bright stays dense: whatever the file format, a filling is brighter than air. `rescale` then maps
robust percentiles to [-1, 1], which replaces a DICOM's display window. Shapes are (H, W), rows first, y down.
"""

import logging
import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pydicom
from PIL import Image, UnidentifiedImageError
from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
from pydicom.uid import RLELossless

MIN_SIDE = 16  # pixels; anything smaller is an icon
MAX_PIXELS = 100_000_000  # a panoramic has 2 to 10 million; beyond this a file is broken or hostile
SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
PICTURE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "DIB")  # Pillow opens no other: its EPS reader would start Ghostscript
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
FIRST_FRAME_ONLY = "{}: {} frames, only the first is read"

# Archives are full of values pydicom finds odd (an invalid VR, a long string) that never touch the pixels.
warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
logging.getLogger("pydicom").setLevel(logging.ERROR)


class ImageReadError(Exception):
    """A file that cannot be used as a radiograph; str() is "file name: reason", without the folder, which may name a patient."""

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
    """Read DICOM (recognized by content), PNG, JPEG, TIFF or BMP, 8 to 32 bits, grey or colour; ImageReadError for anything else."""
    with _read_errors(path):
        if is_dicom(path):
            pixels, valid, patient = _read_dicom(path)
        else:
            pixels, patient = _read_picture(path), None
            valid = np.ones(pixels.shape, bool)
        finite = np.isfinite(pixels)
        return Radiograph(np.where(finite, pixels, 0).astype(np.float32), valid & finite, patient)


def read_mask(path: str | Path) -> np.ndarray:
    """Read a lesion mask as bool (H, W): True where not black (in a JPEG, whose black is never clean: where bright)."""
    with _read_errors(path):
        pixels = _read_dicom(path)[0] if is_dicom(path) else _read_picture(path)
        lossy = Path(path).suffix.lower() in (".jpg", ".jpeg")
        return pixels > (127 if lossy else 0)


def read_patient(path: str | Path) -> str | None:
    """The PatientID in a DICOM header; None where there is none or the file is not a readable DICOM. Reads no pixels."""
    try:
        with _read_errors(path):
            return (
                _patient(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"]))
                if is_dicom(path)
                else None
            )
    except ImageReadError:
        return None


def is_dicom(path: str | Path) -> bool:
    """Whether the file carries the DICOM marker: 'DICM' after a preamble of 128 bytes."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def find_radiographs(root: str | Path) -> list[Path]:
    """Every file below root that looks like a radiograph, sorted: by suffix, or without one by the DICOM marker. Hidden ones are skipped."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(folder, name) for name in names if not name.startswith(".") and _is_radiograph(Path(folder, name))
        ]
    return sorted(found)


def _is_radiograph(path: Path) -> bool:
    suffix = path.suffix.lower()
    # Archives name files by their UID, so that 1.2.840.10008.5 ends in the "suffix" .5; DICOMDIR is an index, not an image.
    nameless = (suffix == "" or suffix[1:].isdigit()) and path.name != "DICOMDIR"
    return suffix in SUFFIXES or (nameless and path.is_file() and os.access(path, os.R_OK) and is_dicom(path))


@contextmanager
def _read_errors(path):
    """Turn every failure into ImageReadError: the decoders behind pydicom and Pillow raise anything."""
    try:
        yield
    except ImageReadError:
        raise
    except UnidentifiedImageError as error:
        raise ImageReadError(path, "neither a DICOM file nor a PNG, JPEG, TIFF or BMP image") from error
    except Exception as error:
        text = getattr(error, "strerror", None) or str(error)
        text = " ".join(text.replace(str(path), Path(path).name).split())[:300]
        raise ImageReadError(path, text or type(error).__name__) from error


def _check_size(height: int, width: int) -> None:
    """Refuse a size no radiograph has, before memory is allocated for it."""
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"{height} x {width} pixels are too few: at least {MIN_SIDE} a side")
    if height * width > MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels are too many: at most {MAX_PIXELS // 10**6} million")


def _luma(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3 or more), alpha ignored -> float (H, W)."""
    return rgb[..., :3] @ LUMA


def _read_picture(path) -> np.ndarray:
    """Read a picture as (H, W) with all its bits: `convert("L")` would clip 16 bits at 255."""
    with Image.open(path, formats=PICTURE_FORMATS) as image:
        _check_size(image.height, image.width)
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            warnings.warn(FIRST_FRAME_ONLY.format(Path(path).name, frames), stacklevel=2)
        if image.mode in ("LA", "RGB", "RGBA") and _is_16_bit(image):
            return _read_16_bit_colour(path, image)
        white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0
        if image.mode == "LA":
            return np.asarray(image)[..., 0]
        if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
            pixels = np.asarray(image).astype(np.float64)
            # Pillow inverts a white-is-zero TIFF of up to 8 bits itself.
            return pixels.max() - pixels if white_is_zero and image.mode not in ("1", "L") else pixels
        return _luma(np.asarray(image if image.mode in ("RGB", "RGBA") else image.convert("RGB")))


def _is_16_bit(image: Image.Image) -> bool:
    return ";16" in str(image.tile) or (image.format == "TIFF" and 16 in image.tag_v2.get(258, ()))


def _read_16_bit_colour(path, image: Image.Image) -> np.ndarray:
    """OpenCV for what Pillow cuts to 8 bits: colour, or grey with alpha, at 16 bits each."""
    if image.format == "TIFF" and image.tag_v2.get(284) == 2:
        raise ValueError(
            "16-bit colour in separate planes is not supported: save it as grey, or with interleaved colours"
        )
    bgr = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if bgr is None:
        raise ValueError("damaged image data")
    return _luma(bgr[..., 2::-1])


def _read_dicom(path) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Read the first frame -> pixels (H, W), valid (H, W), patient."""
    dataset = pydicom.dcmread(path)
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ValueError("a DICOM file without pixel data")
    _check_size(int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0))
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        warnings.warn(FIRST_FRAME_ONLY.format(Path(path).name, frames), stacklevel=2)
    photometric = dataset.PhotometricInterpretation
    decoded = pixel_array(dataset, index=0)  # also turns YBR into RGB
    if decoded.ndim == 3:
        return _luma(decoded), np.ones(decoded.shape[:2], bool), _patient(dataset)
    stored = _stored_values(dataset, decoded)
    if photometric == "PALETTE COLOR":
        return _luma(apply_color_lut(stored, dataset)), np.ones(stored.shape, bool), _patient(dataset)
    valid = ~_padding(dataset, stored)
    pixels = apply_modality_lut(stored, dataset).astype(np.float64)
    # Inverted here and nowhere else: PresentationLUTShape INVERSE says the same thing a second time.
    if photometric == "MONOCHROME1":
        pixels = pixels.max(where=valid, initial=-np.inf) - pixels
    return pixels, valid, _patient(dataset)


def _patient(dataset: pydicom.Dataset) -> str | None:
    return str(dataset.get("PatientID") or "").strip() or None


def _stored_values(dataset: pydicom.Dataset, values: np.ndarray) -> np.ndarray:
    """Keep the BitsStored bits up to HighBit, as int64: above them, old files carry overlays. Floats pass through."""
    if values.dtype.kind == "f":
        return values
    values = values.astype(np.int64)
    syntax = dataset.file_meta.TransferSyntaxUID
    bits = int(dataset.BitsStored)
    if bits == dataset.BitsAllocated or (syntax.is_compressed and syntax.is_encapsulated and syntax != RLELossless):
        return values  # a codec holds the values alone
    values = (values >> max(0, int(dataset.HighBit) + 1 - bits)) & (2**bits - 1)
    return _as_signed(values, bits) if dataset.PixelRepresentation == 1 else values


def _as_signed(values: np.ndarray, bits: int) -> np.ndarray:
    """Read the lowest `bits` bits as two's complement."""
    return values - ((values & 2 ** (bits - 1)) << 1)


def _padding(dataset: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
    """True where the scanner filled a canvas, PixelPaddingValue up to PixelPaddingRangeLimit -> bool (H, W)."""
    if dataset.get("PixelPaddingValue") is None or stored.dtype.kind == "f":
        return np.zeros(stored.shape, bool)
    bits = int(dataset.BitsStored)
    limits = [dataset.PixelPaddingValue, dataset.get("PixelPaddingRangeLimit")]
    limits = np.array([int(limit) for limit in limits if limit is not None]) & (2**bits - 1)
    if dataset.PixelRepresentation == 1:
        limits = _as_signed(limits, bits)  # writers mix up US and SS: -2000 arrives as 63536
    return (stored >= limits.min()) & (stored <= limits.max())


def rescale(radiograph: Radiograph, low: float, high: float) -> np.ndarray:
    """Map the percentiles `low` and `high` (in [0, 100]) of the valid pixels to -1 and 1, clip, padding to -1 -> float32 (H, W).

    ValueError if there is no contrast to map.
    """
    inside = radiograph.pixels[radiograph.valid]
    black, white = np.percentile(inside, [low, high]) if inside.size else (0.0, 0.0)
    if not white > black:
        raise ValueError("no contrast: (almost) every pixel has the same grey level")
    x = np.clip((radiograph.pixels - black) / (white - black), 0, 1) * 2 - 1
    return np.where(radiograph.valid, x, -1).astype(np.float32)
