"""Hundreds of files nobody should have to think about: each is read, or refused with a reason, and nothing else.

The last test counts them. What hangs, fills the memory or dies would show as a test that fails, not as a count.
"""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import data_store  # of pydicom-data
import numpy as np
import pydicom
import pytest
from PIL import Image
from pipeline import ROOT
from pydicom.data import get_testdata_file
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)
from test_reading import BUNDLED, noise, ramp, write_dicom

from checks import UsageError
from radiographs.dicom import LARGEST_INFLATED, _size_in_jpeg, is_dicom
from radiographs.manifest import list_records
from radiographs.reading import PUZZLED, ImageReadError, find_radiographs, read_header, read_mask, read_radiograph

pytestmark = pytest.mark.filterwarnings("ignore")
COUNTS = {"tried": 0, "read": 0, "refused with a reason": 0, "anything else": 0}
VAGUE = ("error -", "errno", "traceback", "nonetype", "object has no attribute", " at 0x")


def raised_here(error):
    """Whether code of this repository raised it, and no decoder's."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return Path(trace.tb_frame.f_code.co_filename).parent.parent == ROOT


def judge(path, readers=(read_radiograph, read_mask)):
    """Read a file in every way; an error is ImageReadError with one short line that tells a user something."""
    COUNTS["tried"] += 1
    COUNTS["anything else"] += 1
    outcome = "read"
    for read in readers:
        try:
            found = read(path)
        except ImageReadError as error:
            outcome, text = "refused with a reason", error.reason
            assert not (isinstance(error.__cause__, PUZZLED) and raised_here(error.__cause__)), error.__cause__
            assert text.strip() and len(text) <= 300 and "\n" not in text, text
            assert str(path.parent) not in text and not any(word in text.lower() for word in VAGUE), text
        else:
            if read is read_radiograph:
                assert found.pixels.dtype == np.float32 and np.isfinite(found.pixels).all()
                assert found.pixels.shape == found.valid.shape and found.pixels.ndim == 2
    read_header(path)
    COUNTS[outcome] += 1
    COUNTS["anything else"] -= 1
    return outcome


# ---------------------------------------------------------------- 150 mutations of a DICOM panoramic


@pytest.fixture(scope="module")
def panoramic(tmp_path_factory):
    """A small valid file, as bytes."""
    return write_dicom(tmp_path_factory.mktemp("px") / "px.dcm", noise(12, channels=()) % 4096, bits=12).read_bytes()


@pytest.mark.parametrize("seed", range(60))
def test_bytes_that_flipped(seed, panoramic, tmp_path):
    random, content = np.random.default_rng(seed), bytearray(panoramic)
    header = 132 + 700
    for place in random.integers(128, header if seed % 2 else len(content), 1 + seed % 7):
        content[place] = random.integers(256)
    (tmp_path / "x.dcm").write_bytes(content)
    judge(tmp_path / "x.dcm")


@pytest.mark.parametrize("share", np.linspace(0, 0.99, 30).round(3))
def test_files_that_were_cut(share, panoramic, tmp_path):
    (tmp_path / "x.dcm").write_bytes(panoramic[: int(share * len(panoramic))])
    judge(tmp_path / "x.dcm")


@pytest.mark.parametrize("coding", [JPEG2000Lossless, JPEGLSLossless, RLELossless], ids=lambda coding: coding.keyword)
def test_compressed_pixels_that_no_decoder_makes_sense_of(coding, tmp_path):
    """Found by benchmarks/fuzz.py: decoders told of their own insides."""
    content = bytearray(write_dicom(tmp_path / "x.dcm", noise(12, channels=()) % 4096, coding, bits=12).read_bytes())
    place = content.index(b"\xfe\xff\x00\xe0", content.index(b"\xe0\x7f\x10\x00") + 20) + 60
    content[place : place + 400] = bytes(range(200)) * 2
    (tmp_path / "x.dcm").write_bytes(content)
    judge(tmp_path / "x.dcm")


TAGS = {
    "Rows": (0, 1, 15, 39, 41, 60000, None),
    "Columns": (0, 1, 15, 49, 51, 60000, None),
    "BitsAllocated": (1, 8, 12, 32, 64, None),
    "BitsStored": (0, 1, 8, 16, 17, None),
    "HighBit": (0, 7, 15, 31, None),
    "PixelRepresentation": (1, 2, None),
    "SamplesPerPixel": (0, 2, 3, 4, None),
    "PhotometricInterpretation": ("MONOCHROME1", "RGB", "YBR_FULL", "PALETTE COLOR", "", "NONSENSE", None),
    "NumberOfFrames": ("0", "-1", "2", "1000000", "", None),
    "RescaleSlope": ("0", "-1", "1e300", "", None),
    "RescaleIntercept": ("nan", "1e30", "", None),
    "PixelPaddingValue": (0, 65535, None),
    "WindowWidth": ("0", "", None),
    "TransferSyntaxUID": ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5", "1.2.3", "", None),
    "PatientID": ("", "x" * 400, "\u00e4\u00f6\u00fc", None),
    "PixelData": (b"", b"\0", b"\xff" * 10, None),
}


@pytest.mark.parametrize(("tag", "value"), [(tag, value) for tag, values in TAGS.items() for value in values])
def test_tags_that_say_something_odd(tag, value, panoramic, tmp_path):
    dataset = pydicom.dcmread(io.BytesIO(panoramic))
    holder = dataset.file_meta if tag == "TransferSyntaxUID" else dataset
    if value is None and tag in holder:
        delattr(holder, tag)
    elif value is not None:
        setattr(holder, tag, value)
    try:
        dataset.save_as(tmp_path / "x.dcm", implicit_vr=False, little_endian=True)
    except (ValueError, TypeError, AttributeError, OverflowError, struct.error):
        pytest.skip("pydicom does not write this")
    judge(tmp_path / "x.dcm")


# ---------------------------------------------------------------- files of pydicom, pictures, names


MORE = sorted(path for path in Path(data_store.__file__).parent.rglob("*") if path.suffix not in (".py", ".pyc"))


@pytest.mark.parametrize("path", [*BUNDLED, *filter(Path.is_file, MORE)], ids=lambda path: path.name)
def test_files_of_pydicom(path):
    judge(path)


def picture(mode="L", size=(60, 50), suffix="PNG", **how):
    made = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (size[1], size[0], 4), np.uint8)).convert(mode).save(
        made, suffix, **how
    )
    return made.getvalue()


PICTURES = {f"{mode}.{suffix}": picture(mode, suffix=suffix) for suffix in ("PNG", "TIFF") for mode in ("1", "L", "P")}
PICTURES |= {f"{mode}.JPEG": picture(mode, suffix="JPEG") for mode in ("L", "RGB", "CMYK")}
PICTURES |= {
    "progressive.JPEG": picture("RGB", suffix="JPEG", progressive=True),
    "LZW.TIFF": picture("L", suffix="TIFF"),
}
PICTURES |= {"BMP.BMP": picture("RGB", suffix="BMP"), "GIF.PNG": picture("L", suffix="GIF"), "PDF.PNG": b"%PDF-1.4\n"}
PICTURES |= {
    "html.JPEG": b"<html>404</html>",
    "empty.PNG": b"",
    "svg.PNG": b"<svg/>",
    "zip.PNG": b"PK\x03\x04" + 60 * b"\0",
}
PICTURES |= {"tiny.PNG": picture(size=(3, 3)), "thin.PNG": picture(size=(400, 1)), "zeros.BMP": 500 * b"\0"}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("damage", ["none", "cut", "flipped", "doubled"])
def test_pictures_whole_and_damaged(name, damage, tmp_path):
    content = PICTURES[name]
    if damage == "cut":
        content = content[: 2 * len(content) // 3]
    elif damage == "flipped":
        spoilt = bytearray(content)
        for place in np.random.default_rng(3).integers(0, max(1, len(content)), 12 if content else 0):
            spoilt[place] ^= 0x55
        content = bytes(spoilt)
    elif damage == "doubled":
        content = content + content
    path = tmp_path / name
    path.write_bytes(content)
    judge(path)


NAMES = (
    "a b.png",
    "\u00e4.png",
    "x" * 200 + ".png",
    "-rf.png",
    "=1+1.png",
    "a\tb.png",
    "\u202egnp.png",
    "%s.png",
    "'.png",
)


@pytest.mark.parametrize("name", [*(name.encode() for name in NAMES), b"caf\xe9.png", b"\xff\xfe.png"], ids=repr)
def test_names_of_any_bytes(name, tmp_path):
    path = os.path.join(os.fsencode(tmp_path), name)
    try:
        with open(path, "wb") as file:
            file.write(picture())
    except OSError:
        pytest.skip("the file system does not take this name")
    (found,) = find_radiographs(tmp_path)
    assert judge(found) == "read" and len(list_records(tmp_path)) == 1


# ---------------------------------------------------------------- manifests


MANIFESTS = [
    *("", "\n", "image", "image\n", "file\nx.png\n", "image,label\nx.png,2\n", "image,split\nx.png,training?\n"),
    *("image\n../x.png\n", "image\n/etc/passwd\n", "image\n\n", "image,label\nx.png,0,9,9\n", "image,label\nx.png\n"),
    *("image,kind,label\nx.png,cyst,0\n", "image,mask\nx.png,m.png\n", "image;label\nx.png;0\n", 'image\n"x.png\n'),
    *("image,image\nx.png,x.png\n", "IMAGE , Label\nx.png,1\n", "image\nx.png\nx.png\n", "image\nmissing.png\n"),
    *(
        "image,label\nx.png,nan\n",
        "image,label\nx.png,1.0\n",
        "image,patient\nx.png,=cmd\n",
        "image\n" + 9000 * "a" + "\n",
    ),
    "image,split\nx.png,train\ny.png,\n",
]


@pytest.mark.parametrize("text", [*MANIFESTS, "\ufeffimage\nx.png\n", "image\r\nx.png\r\n", "image\tlabel\nx.png\t0\n"])
@pytest.mark.parametrize("coding", ["utf-8", "utf-16", "latin-1"])
def test_manifests_are_read_or_say_what_is_wrong(text, coding, tmp_path):
    for name in ("x.png", "y.png", "m.png"):
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "manifest.csv").write_bytes(text.encode(coding, errors="replace"))
    COUNTS["tried"] += 1
    COUNTS["anything else"] += 1
    try:
        records = list_records(tmp_path)
    except UsageError as error:
        assert len(str(error)) > 20 and "\n" not in str(error)
        COUNTS["refused with a reason"] += 1
    else:
        assert records
        COUNTS["read"] += 1
    COUNTS["anything else"] -= 1


# ---------------------------------------------------------------- what would hang, or fill the memory


def test_a_pipe_in_the_folder_is_refused_and_waited_for_by_nobody(tmp_path):
    for name in ("pipe.png", "1.2.3"):
        os.mkfifo(tmp_path / name)
    assert [path.name for path in find_radiographs(tmp_path)] == ["pipe.png"]
    assert judge(tmp_path / "pipe.png") == "refused with a reason"
    with pytest.raises(ImageReadError, match="a folder, a pipe or a device, not a file"):
        read_radiograph(tmp_path / "pipe.png")


def test_a_file_larger_than_any_radiograph_is_not_read(tmp_path):
    with open(tmp_path / "x.dcm", "wb") as file:
        file.truncate(2**31)  # takes no room
    with pytest.raises(ImageReadError, match="2.0 GiB are too many"):
        read_radiograph(tmp_path / "x.dcm")


def peak_memory(path):
    """What a fresh process that reads this file says, and its peak memory beyond what importing takes, in MiB."""
    code = (
        "import resource, sys; from radiographs.reading import *\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: print(read_radiograph(sys.argv[1]).pixels.shape)\n"
        "except ImageReadError as error: print(error.reason)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said, memory = done.stdout.splitlines()[-2:]
    return said, int(memory) / (1024 if sys.platform != "darwin" else 2**20)


def test_a_bomb_that_inflates_is_refused_before_it_fills_the_memory(tmp_path):
    """2 GiB of zeros in 2 MiB."""
    path = write_dicom(tmp_path / "x.dcm", ramp(), DeflatedExplicitVRLittleEndian)
    head = path.read_bytes()
    begin = 132 + 12 + int(pydicom.filereader.read_file_meta_info(path).FileMetaInformationGroupLength)
    inner = zlib.decompress(head[begin:], -zlib.MAX_WBITS)
    squeeze = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    with open(path, "wb") as file:
        file.write(head[:begin] + squeeze.compress(inner))
        for _ in range(128):
            file.write(squeeze.compress(bytes(2**24)))
        file.write(squeeze.flush())
    assert path.stat().st_size < 2**22
    said, memory = peak_memory(path)
    assert "inflates to more than" in said and memory < 60


def test_a_codestream_that_claims_more_than_its_header_is_not_decoded(tmp_path):
    path = write_dicom(tmp_path / "x.dcm", ramp(), JPEG2000Lossless)
    content = bytearray(path.read_bytes())
    place = content.index(b"\xff\x4f\xff\x51") + 8
    content[place : place + 8] = struct.pack(">2I", 60_000, 60_000)
    path.write_bytes(content)
    said, memory = peak_memory(path)
    assert "60000 x 60000 pixels are too many" in said and memory < 60


def test_runs_of_rle_that_look_like_a_codestream_are_none(tmp_path):
    """Two values of 0x4f and then two of 0x51 are ff 4f ff 51 in RLE."""
    pixels = np.tile(np.repeat(np.array([0x4F, 0x51], np.uint8), 2), (40, 10))
    path = write_dicom(tmp_path / "x.dcm", pixels, RLELossless)
    assert b"\xff\x4f\xff\x51" in path.read_bytes()
    np.testing.assert_array_equal(read_radiograph(path).pixels, pixels)


@pytest.mark.parametrize("before", [b"", b"\xff\x01", b"\xff\xd0\xff\xff"])
def test_the_size_in_a_jpeg_is_found_behind_markers_that_stand_alone(before):
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 11, 8, 40, 50, 1) + b"\1\x11\0"
    assert _size_in_jpeg(b"\xff\xd8" + before + b"\xff\xe0\x00\x04ab" + frame) == (40, 50)
    unsaid = frame.replace(struct.pack(">HH", 40, 50), struct.pack(">HH", 0, 50))
    assert _size_in_jpeg(b"\xff\xd8" + unsaid) is None  # its height follows after the scan


def test_a_picture_that_claims_a_billion_pixels_is_not_decoded(tmp_path):
    header = struct.pack(">2I5B", 40_000, 40_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "x.png").write_bytes(content + 100 * b"\0")
    said, memory = peak_memory(tmp_path / "x.png")
    assert memory < 60 and said


# ---------------------------------------------------------------- odd, and read


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "JPEG-lossy.dcm"])
def test_a_jpeg_of_12_bits_is_read(name):
    """The smallest and the largest value of the file, as two decoders of other makers give them."""
    pixels = read_radiograph(get_testdata_file(name)).pixels
    assert pixels.shape == (1024, 256) and (pixels.min(), pixels.max()) == (0, 264)


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("little", [True, False])
def test_a_dicom_without_preamble_is_read(implicit, little, tmp_path):
    if implicit and not little:
        pytest.skip("there is no such coding")
    whole = write_dicom(tmp_path / "whole.dcm", noise(12) % 4096, bits=12, PatientID="P1")
    dataset = pydicom.dcmread(whole)
    bare = pydicom.Dataset()
    bare.update({element.tag: element for element in dataset})
    if not little:
        bare.PixelData = dataset.pixel_array.astype(">u2").tobytes()
    with open(tmp_path / "bare", "wb") as file:
        pydicom.dcmwrite(file, bare, implicit_vr=implicit, little_endian=little)
    assert (tmp_path / "bare").read_bytes()[:2] in (b"\x08\x00", b"\x00\x08") and is_dicom(tmp_path / "bare")
    assert [path.name for path in find_radiographs(tmp_path)] == ["bare", "whole.dcm"]
    np.testing.assert_array_equal(read_radiograph(tmp_path / "bare").pixels, read_radiograph(whole).pixels)
    assert read_header(tmp_path / "bare").patient == "P1"


def test_a_deflated_radiograph_is_read(tmp_path):
    path = write_dicom(tmp_path / "x.dcm", ramp(), DeflatedExplicitVRLittleEndian)
    np.testing.assert_array_equal(read_radiograph(path).pixels, ramp())
    assert LARGEST_INFLATED > 2 * 40_000_000


def test_the_largest_radiograph_stays_within_its_memory(tmp_path):
    """30 million pixels of 16 bits: some 30 bytes of memory for each."""
    path = tmp_path / "x.dcm"
    pixels = np.broadcast_to(np.arange(6000, dtype=np.uint16), (5000, 6000))
    said, memory = peak_memory(write_dicom(path, pixels, ExplicitVRLittleEndian))
    assert said == "(5000, 6000)" and memory < 36 * 30_000_000 / 2**20


# ---------------------------------------------------------------- the table


def test_nothing_else_happened():
    """Run last in this file: how many were tried here, and what became of them."""
    print(COUNTS)
    assert COUNTS["anything else"] == 0
    assert COUNTS["tried"] == COUNTS["read"] + COUNTS["refused with a reason"]
