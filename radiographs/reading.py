"""Leaf: one radiograph file to float pixels, and the files that look like one.

Grey levels stay raw and bright stays dense: whatever the file format, a filling is brighter than air. `rescale` then
maps robust percentiles to [-1, 1], which replaces a DICOM's display window. Shapes are (H, W), rows first, y down, and
pictures stand upright, as their EXIF orientation says.
"""

import logging
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pydicom
from PIL import Image, UnidentifiedImageError
from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
from pydicom.uid import UID, RLELossless

from checks import UsageError

MIN_SIDE = 16  # pixels; anything smaller is an icon
MAX_PIXELS = 100_000_000  # a panoramic has 2 to 10 million; beyond this a file is broken or hostile
SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
PICTURE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "DIB")  # Pillow opens no other: its EPS reader would start Ghostscript
PIXEL_TAGS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
LOSSY_BLACK = 127  # a JPEG's black is never clean: its masks are white beyond this
ORIENTATION = 0x0112  # the tag; its values are below (TIFF 6.0, Exif 2.3): what brings (H, W, ...) upright
UPRIGHT = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: np.swapaxes(stored, 0, 1),
    6: lambda stored: np.rot90(stored, -1),  # a quarter clockwise
    7: lambda stored: np.swapaxes(np.rot90(stored, 2), 0, 1),
    8: np.rot90,
}
FIRST_FRAME_ONLY = "a file has {} frames, only the first is read"  # unnamed: a file name may be a patient's

# Archives are full of values pydicom finds odd (an invalid VR, a long string) that never touch the pixels.
warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
logging.getLogger("pydicom").setLevel(logging.ERROR)


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


class Header(NamedTuple):
    """What a file says of itself before its pixels are read."""

    patient: str | None  # DICOM PatientID
    is_image: bool  # False for DICOM objects of another kind: reports, presentation states, plans, indexes


def read_radiograph(path: str | Path) -> Radiograph:
    """Read DICOM (recognized by content), PNG, JPEG, TIFF or BMP, 8 to 32 bits, grey or colour, at the file's size.

    ImageReadError for anything else.
    """
    with _read_errors(path):
        if is_dicom(path):
            pixels, valid, patient = _read_dicom(path)
        else:
            pixels, _ = _read_picture(path)
            valid, patient = np.ones(pixels.shape, bool), None
        finite = np.isfinite(pixels)
        return Radiograph(np.where(finite, pixels, 0).astype(np.float32), valid & finite, patient)


def read_mask(path: str | Path) -> np.ndarray:
    """Read a lesion mask as bool (H, W): True where not black (in a JPEG: where bright) and not transparent.

    In one colour with a varying alpha, the alpha is the mask. ImageReadError if it cannot be read.
    """
    with _read_errors(path):
        if is_dicom(path):
            levels, alpha = _read_dicom(path)[0], None
        else:
            levels, alpha = _read_picture(path)
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
            if not is_dicom(path):
                return Header(None, True)
            tags = ["PatientID", "SOPClassUID", "Rows"]
            dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
            return Header(_patient(dataset), _is_image(path, dataset))
    except ImageReadError:
        return Header(None, True)


def _is_image(path: str | Path, dataset: pydicom.Dataset) -> bool:
    """By the SOP class, where DICOM knows it (a truncated image is still one); else by having rows or pixels."""
    sop_class = UID(str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or ""))
    known = sop_class.name != sop_class
    if known:
        return "Image Storage" in sop_class.name
    return "Rows" in dataset or _has_pixels(pydicom.dcmread(path))


def is_dicom(path: str | Path) -> bool:
    """Whether the file carries the DICOM marker: 'DICM' after a preamble of 128 bytes."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def find_radiographs(root: str | Path) -> list[Path]:
    """Every file below root that looks like a radiograph, sorted: by suffix, or without one by the DICOM marker.

    Hidden files and folders are left alone, and so are linked folders, with a warning. UsageError if a folder cannot
    be read: its patients would be missing without a word. It is not named: it may be a patient's.
    """

    def refuse(error: OSError) -> None:
        raise UsageError(f"a folder of radiographs cannot be read ({error.strerror}): see to its rights") from error

    found = []
    linked = 0
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked += sum(Path(folder, name).is_symlink() for name in folders)
        visible = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [path for path in visible if _is_radiograph(path)]
    if linked:
        warnings.warn(f"{linked} linked folders are passed over: list their files in a manifest.csv", stacklevel=2)
    return sorted(found)


def _is_radiograph(path: Path) -> bool:
    suffix = path.suffix.lower()
    # Archives name files by their UID, so that 1.2.840.10008.5 ends in the "suffix" .5
    nameless = suffix == "" or suffix[1:].isdigit()
    return suffix in SUFFIXES or (nameless and path.is_file() and os.access(path, os.R_OK) and is_dicom(path))


@contextmanager
def _read_errors(path: str | Path) -> Iterator[None]:
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
    """(H, W, 3 or more), alpha ignored -> float (H, W). A matrix product would round as the memory happens to lie."""
    red, green, blue = (rgb[..., channel] * LUMA[channel] for channel in range(3))
    return red + green + blue


def _read_picture(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read a picture upright -> grey levels (H, W) with all their bits, alpha (H, W) or None."""
    # From an open file: Pillow maps a TIFF that it opens by name, and scrambles it where its orientation is sideways.
    with open(path, "rb") as file, Image.open(file, formats=PICTURE_FORMATS) as image:
        _check_size(image.height, image.width)
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            warnings.warn(FIRST_FRAME_ONLY.format(frames), stacklevel=2)
        deep_colour = image.mode in ("LA", "RGB", "RGBA") and _is_16_bit(image)
        stored = _read_16_bit_colour(path, image) if deep_colour else _read_channels(image)
        channels = UPRIGHT[_orientation(path, image)](stored)
    if channels.ndim == 2:
        return channels, None
    count = channels.shape[2]
    levels = channels[..., 0] if count == 2 else _luma(channels)
    return levels, channels[..., -1] if count in (2, 4) else None


def _read_channels(image: Image.Image) -> np.ndarray:
    """(H, W) if grey, else (H, W, 2 to 4), alpha last. Not by `convert("L")`, which would clip 16 bits at 255."""
    white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.float64)
        # Pillow inverts a white-is-zero TIFF of up to 8 bits itself.
        return pixels.max() - pixels if white_is_zero and image.mode not in ("1", "L") else pixels
    if image.mode not in ("LA", "RGB", "RGBA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return np.asarray(image)


def _orientation(path: str | Path, image: Image.Image) -> int:
    """How the picture that was read still has to be turned, a key of UPRIGHT."""
    if image.format == "TIFF":
        return 1  # Pillow and OpenCV have turned it
    try:
        image.load()  # the data may stand behind the pixels
        orientation = image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error) as error:
        warnings.warn(f"a file has damaged EXIF data ({error}) and is taken as upright", stacklevel=3)
        return 1
    return orientation if orientation in UPRIGHT else 1


def _is_16_bit(image: Image.Image) -> bool:
    return ";16" in str(image.tile) or (image.format == "TIFF" and 16 in image.tag_v2.get(258, ()))


def _read_16_bit_colour(path: str | Path, image: Image.Image) -> np.ndarray:
    """OpenCV for what Pillow cuts to 8 bits: colour, or grey with alpha, at 16 bits each -> (H, W, 3 or 4)."""
    if image.format == "TIFF" and image.tag_v2.get(284) == 2:
        raise ValueError("16-bit colour in separate planes is not supported: save it as grey, or interleaved")
    bgr = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if bgr is None:
        raise ValueError("damaged image data")
    return np.dstack([bgr[..., 2::-1], bgr[..., 3:]])


def _read_dicom(path: str | Path) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Read the first frame -> pixels (H, W), valid (H, W), patient."""
    dataset = pydicom.dcmread(path)
    if not _has_pixels(dataset):
        raise ValueError("a DICOM file without pixel data")
    _check_size(int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0))
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        warnings.warn(FIRST_FRAME_ONLY.format(frames), stacklevel=2)
    photometric = dataset.PhotometricInterpretation
    decoded = pixel_array(dataset, index=0)  # also turns YBR into RGB
    if decoded.ndim == 3:
        return _luma(decoded), np.ones(decoded.shape[:2], bool), _patient(dataset)
    stored = _stored_values(dataset, decoded)
    if photometric == "PALETTE COLOR":
        return _luma(apply_color_lut(stored, dataset)), np.ones(stored.shape, bool), _patient(dataset)
    valid = ~_padding(dataset, stored)
    _fill_rescale(dataset)
    pixels = apply_modality_lut(stored, dataset).astype(np.float64)
    # Inverted here and nowhere else: PresentationLUTShape INVERSE says the same thing a second time.
    if photometric == "MONOCHROME1":
        pixels = pixels.max(where=valid, initial=-np.inf) - pixels
    return pixels, valid, _patient(dataset)


def _has_pixels(dataset: pydicom.Dataset) -> bool:
    return any(name in dataset for name in PIXEL_TAGS)


def _fill_rescale(dataset: pydicom.Dataset) -> None:
    """Give an absent or empty modality rescale its neutral value: pydicom fails on an empty one."""
    for name, neutral in (("RescaleSlope", 1), ("RescaleIntercept", 0)):
        if dataset.get(name) in (None, ""):
            setattr(dataset, name, neutral)


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
    """Map the percentiles `low` and `high` (in [0, 100]) of the valid pixels to -1 and 1 -> x, float32 (H, W).

    Beyond them x is clipped, on padding it is -1. ValueError if there is no contrast to map.
    """
    inside = radiograph.pixels[radiograph.valid]
    black, white = np.percentile(inside, [low, high]) if inside.size else (0.0, 0.0)
    if not white > black:
        raise ValueError("no contrast: (almost) every pixel has the same grey level")
    x = np.clip((radiograph.pixels - black) / (white - black), 0, 1) * 2 - 1
    return np.where(radiograph.valid, x, -1).astype(np.float32)
