"""Leaf: DICOM to grey levels, and what its header says."""

import logging
import struct
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.encaps import get_frame
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from config import MAKER
from radiographs.pixels import FIRST_FRAME_ONLY, MAX_PIXELS, check_size, luma

PIXEL_TAGS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
NEEDED = ("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated")  # without them nobody knows what pixels mean
LARGEST_INFLATED = 4 * MAX_PIXELS + 2**24  # bytes of a deflated file: 32 bits a pixel, and a long header

LOSSLESS_JPEG = (JPEGLossless, JPEGLosslessSV1)
DECODERS = {
    **dict.fromkeys((JPEGBaseline8Bit, JPEGExtended12Bit), "pillow"),
    **dict.fromkeys((JPEGLSLossless, JPEGLSNearLossless), "pyjpegls"),
    **dict.fromkeys(JPEG2000TransferSyntaxes, "pylibjpeg"),
}

# Archives are full of values pydicom finds odd (an invalid VR, a long string) that never touch the pixels.
warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
logging.getLogger("pydicom").setLevel(logging.ERROR)


class Header(NamedTuple):
    """What a file says of itself before its pixels are read."""

    patient: str | None  # DICOM PatientID
    # False for DICOM objects of another kind (reports, presentation states, plans, indexes), and for pictures of ours
    is_image: bool
    modality: str = ""  # of a DICOM image, such as PX or CT


def is_dicom(path: str | Path) -> bool:
    """Whether a file carries the DICOM marker, 'DICM' after a preamble of 128 bytes, or begins as those without do."""
    with open(path, "rb") as file:
        beginning = file.read(132)
    return _is_marked(beginning) or _begins_without_preamble(beginning)


def _is_marked(beginning: bytes) -> bool:
    return beginning[128:132] == b"DICM"


def _begins_without_preamble(beginning: bytes) -> bool:
    """Whether the first element is of group 2 or 8 and has a value representation, or else a short value.

    Files from before part 10 of the standard have neither preamble nor marker. No picture begins so.
    """
    little, big = beginning[:2] in (b"\x02\x00", b"\x08\x00"), beginning[:2] in (b"\x00\x02", b"\x00\x08")
    if len(beginning) < 132 or not (little or big):
        return False
    named = beginning[4:6].isalpha() and beginning[4:6].isupper()
    return named or int.from_bytes(beginning[4:8], "little" if little else "big") <= 64


def open_dicom(path: str | Path, **how: object) -> pydicom.Dataset:
    """pydicom.dcmread, of a file without preamble too; ValueError for one that inflates to more than anybody needs."""
    with open(path, "rb") as file:
        marked = _is_marked(file.read(132))
    if marked:
        _check_inflated(path)
    dataset = pydicom.dcmread(path, force=not marked, **how)
    if "TransferSyntaxUID" not in dataset.file_meta and not dataset.get("TransferSyntaxUID"):
        dataset.file_meta.TransferSyntaxUID = _uncompressed(dataset)
    return dataset


def _uncompressed(dataset: pydicom.Dataset) -> UID:
    """The coding of a file that does not name it: the one in which pydicom made sense of its elements."""
    implicit, little = dataset.original_encoding
    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def _check_inflated(path: str | Path) -> None:
    """Refuse a deflated file that would fill the memory, piece by piece and before anything is kept of it."""
    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with open(path, "rb") as file:
        file.seek(132 + 12 + int(meta.FileMetaInformationGroupLength))  # marker, and the element that says the length
        while piece := inflate.unconsumed_tail or file.read(2**16):
            size += len(inflate.decompress(piece, 2**22))
            if size > LARGEST_INFLATED:
                raise ValueError(f"it inflates to more than {LARGEST_INFLATED // 2**20} MiB, which no radiograph needs")


def _first_codestream(dataset: pydicom.Dataset, frames: int) -> bytes | None:
    """The first frame of compressed pixels; None where they are not compressed.

    ValueError for a JPEG of any kind whose own header says another size than a radiograph's: it is not decoded.
    """
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return None
    stream = get_frame(dataset.PixelData, 0, number_of_frames=frames)
    wavelets = b"\xff\x4f\xff\x51" in stream[:4096] and dataset.file_meta.TransferSyntaxUID in JPEG2000TransferSyntaxes
    size = _size_in_jpeg2000(stream) if wavelets else _size_in_jpeg(stream)
    if size is not None:
        check_size(*size)
    return stream


def _decode(dataset: pydicom.Dataset, stream: bytes | None) -> np.ndarray:
    """The first frame, YBR turned into RGB.

    Each coding has one decoder, that of its own library: GDCM, where it is installed, ends Python on broken streams.
    """
    coding = dataset.file_meta.TransferSyntaxUID
    deep = coding == JPEGExtended12Bit and _bits_stored(dataset) > 8
    if stream is None or not (deep or coding in LOSSLESS_JPEG):
        cut = _by_codec(dataset) or dataset.get("SamplesPerPixel") == 3  # else by us: unused bits may be the lower ones
        return pixel_array(dataset, index=0, decoding_plugin=DECODERS.get(coding, ""), correct_unused_bits=cut)
    import imagecodecs  # here: it takes a while to load, and few files need it

    values = imagecodecs.jpeg8_decode(stream)
    size = (int(dataset.Rows), int(dataset.Columns))
    if values.shape[:2] != size:
        raise ValueError(f"its pixels are {values.shape[0]} x {values.shape[1]}, its header says {size[0]} x {size[1]}")
    if dataset.get("PixelRepresentation") != 1 or values.ndim == 3:
        return values
    bits = _bits_stored(dataset)  # of the value, whose sign some writers repeat up to the last bit of a word
    return _as_signed(values.astype(np.int64) & (2**bits - 1), bits)


def _size_in_jpeg2000(stream: bytes) -> tuple[int, int] | None:
    """Height and width in the SIZ marker (ISO 15444-1, A.5.1); None if it is cut."""
    place = stream.index(b"\xff\x4f\xff\x51") + 8
    if len(stream) < place + 16:
        return None
    right, bottom, left, top = struct.unpack(">4I", stream[place : place + 16])
    return bottom - top, right - left


def _size_in_jpeg(stream: bytes) -> tuple[int, int] | None:
    """Height and width in the frame header (ISO 10918-1, B.2.2, and 14495-1 for JPEG-LS); None if there is none."""
    place = 2
    while stream[:2] == b"\xff\xd8" and place + 9 <= len(stream) and stream[place] == 0xFF:
        marker, length = stream[place + 1], int.from_bytes(stream[place + 2 : place + 4], "big")
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # nothing follows these
            place += 2
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = struct.unpack(">2H", stream[place + 5 : place + 9])
            return (height, width) if height else None  # it is said after the first scan
        else:
            place += 2 + length
    return None


def read_dicom_header(path: str | Path) -> Header:
    """Whose a DICOM file is, whether it is an image, and by what it was taken, without its pixels."""
    tags = ["PatientID", "SOPClassUID", "Rows", "Modality", "Manufacturer"]
    dataset = open_dicom(path, stop_before_pixels=True, specific_tags=tags)
    modality = str(dataset.get("Modality") or "").strip().upper()
    # a map of an earlier examination, back from an archive
    ours = str(dataset.get("Manufacturer") or "").strip() == MAKER
    return Header(_patient(dataset), not ours and _is_image(path, dataset), modality)


def _is_image(path: str | Path, dataset: pydicom.Dataset) -> bool:
    """By the SOP class, where DICOM knows it (a truncated image is still one); else by having rows or pixels."""
    sop_class = UID(str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or ""))
    known = sop_class.name != sop_class
    if known:
        return "Image Storage" in sop_class.name
    return "Rows" in dataset or _has_pixels(open_dicom(path))


def read_dicom(path: str | Path) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Read the first frame -> pixels (H, W), valid (H, W), patient."""
    dataset = open_dicom(path)
    if not any(dataset.get(name) for name in PIXEL_TAGS):
        raise ValueError("a DICOM file without pixel data")
    missing = [name for name in NEEDED if dataset.get(name) in (None, "")]
    if missing:
        raise ValueError(f"its header lacks {', '.join(missing)}")
    if not dataset.file_meta.get("TransferSyntaxUID"):
        raise ValueError("its header does not say how the pixels are coded (TransferSyntaxUID)")
    check_size(int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0))
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        warnings.warn(FIRST_FRAME_ONLY.format(frames), stacklevel=2)
    stream = _first_codestream(dataset, frames)
    photometric = dataset.PhotometricInterpretation
    try:
        decoded = _decode(dataset, stream)
    except RuntimeError as error:  # of a decoder, in its own words
        if "dependencies" in str(error):  # it is not installed
            raise
        coding = dataset.file_meta.TransferSyntaxUID.name
        raise ValueError(f"no decoder makes sense of its pixels, which claim to be {coding}: damaged") from error
    if decoded.ndim == 3:
        return luma(decoded), np.ones(decoded.shape[:2], bool), _patient(dataset)
    stored = _stored_values(dataset, decoded)
    if photometric == "PALETTE COLOR":
        return luma(apply_color_lut(stored, dataset)), np.ones(stored.shape, bool), _patient(dataset)
    valid = ~_padding(dataset, stored, decoded)
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
    bits = _bits_stored(dataset)
    if bits == dataset.BitsAllocated or _by_codec(dataset):
        return values
    highest = dataset.get("HighBit")
    values = (values >> max(0, (bits - 1 if highest is None else int(highest)) + 1 - bits)) & (2**bits - 1)
    return _as_signed(values, bits) if dataset.get("PixelRepresentation") == 1 else values


def _by_codec(dataset: pydicom.Dataset) -> bool:
    """Whether its pixels are coded by one that holds the values alone, and not the words that they stand in."""
    syntax = dataset.file_meta.TransferSyntaxUID
    return syntax.is_compressed and syntax.is_encapsulated and syntax != RLELossless


def _bits_stored(dataset: pydicom.Dataset) -> int:
    """Of a value; all that are allocated where the header does not say."""
    return int(dataset.get("BitsStored") or dataset.BitsAllocated)


def _as_signed(values: np.ndarray, bits: int) -> np.ndarray:
    """Read the lowest `bits` bits as two's complement."""
    return values - ((values & 2 ** (bits - 1)) << 1)


def _padding(dataset: pydicom.Dataset, stored: np.ndarray, words: np.ndarray) -> np.ndarray:
    """True where the scanner filled a canvas, PixelPaddingValue up to PixelPaddingRangeLimit -> bool (H, W).

    Of unsigned pixels, a value that their bits cannot hold, such as 65535 of 12, is one of the words they stand in, if
    any: cut to 12 bits it would be that of saturated metal.
    """
    if dataset.get("PixelPaddingValue") is None or stored.dtype.kind == "f":
        return np.zeros(stored.shape, bool)
    bits = _bits_stored(dataset)
    limits = [dataset.PixelPaddingValue, dataset.get("PixelPaddingRangeLimit")]
    limits = np.array([int(limit) for limit in limits if limit is not None])
    if dataset.get("PixelRepresentation") == 1:
        limits = _as_signed(limits & (2**bits - 1), bits)  # writers mix up US and SS: -2000 arrives as 63536
    else:
        word = 2**dataset.BitsAllocated - 1
        limits = limits & word  # -1 is the highest word
        stored = stored if limits.max() < 2**bits else words.astype(np.int64) & word
    return (stored >= limits.min()) & (stored <= limits.max())
