"""Leaf: PNG, JPEG, TIFF and BMP to grey levels, upright, with all their bits."""

import struct
import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from radiographs.pixels import FIRST_FRAME_ONLY, check_size, luma

PICTURE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "DIB")  # Pillow opens no other: its EPS reader would start Ghostscript
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


def read_picture(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read a picture upright -> grey levels (H, W) with all their bits, alpha (H, W) or None."""
    # From an open file: Pillow maps a TIFF that it opens by name, and scrambles it where its orientation is sideways.
    with open(path, "rb") as file, Image.open(file, formats=PICTURE_FORMATS) as image:
        check_size(image.height, image.width)
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            warnings.warn(FIRST_FRAME_ONLY.format(frames), stacklevel=2)
        deep_colour = image.mode in ("LA", "RGB", "RGBA") and _is_16_bit(image)
        stored = _read_16_bit_colour(path, image) if deep_colour else _read_channels(image)
        channels = UPRIGHT[_orientation(path, image)](stored)
    if channels.ndim == 2:
        return channels, None
    count = channels.shape[2]
    levels = channels[..., 0] if count == 2 else luma(channels)
    return levels, channels[..., -1] if count in (2, 4) else None


def _read_channels(image: Image.Image) -> np.ndarray:
    """(H, W) if grey, else (H, W, 2 to 4), alpha last. Not by `convert("L")`, which would clip 16 bits at 255."""
    white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        pixels = _numbers_of(image)
        # Pillow inverts a white-is-zero TIFF of up to 8 bits itself.
        return pixels.max() - pixels if white_is_zero and image.mode not in ("1", "L") else pixels
    if image.mode not in ("LA", "RGB", "RGBA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return np.asarray(image)


def _numbers_of(image: Image.Image) -> np.ndarray:
    """The values of a grey picture, float64. A TIFF says if they have a sign; Pillow takes 32 bits with, 8 without."""
    pixels = np.asarray(image)
    if image.format == "TIFF":
        signed, bits = 2 in image.tag_v2.get(339, ()), image.tag_v2.get(258, (1,))[0]
        if image.mode == "I" and bits == 32 and not signed:
            pixels = pixels.view(np.uint32)
        elif image.mode == "L" and bits == 8 and signed:
            pixels = pixels.view(np.int8)
    return pixels.astype(np.float64)


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
