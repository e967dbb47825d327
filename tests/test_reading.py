"""Files against the arrays they were written from, against pydicom's own decoder, and against damage of every kind."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pydicom.data
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from checks import UsageError
from radiographs.reading import (
    ImageReadError,
    Radiograph,
    find_radiographs,
    read_header,
    read_mask,
    read_radiograph,
    rescale,
)

# pytest resets the reader's filter
pytestmark = pytest.mark.filterwarnings("ignore:.*only the first is read", "ignore::UserWarning:pydicom")

BUNDLED = sorted(path for path in (Path(pydicom.data.__file__).parent / "test_files").iterdir() if path.is_file())
LOSSLESS = [
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLSLossless,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
]
HEIGHT, WIDTH = 40, 50


def noise(bits=16, signed=False, channels=()):
    """(HEIGHT, WIDTH, *channels) integers over the whole range of `bits` bits."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    values = np.random.default_rng(bits).integers(low, high, (HEIGHT, WIDTH, *channels))
    return values.astype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")


def ramp():
    """uint8 (HEIGHT, WIDTH), smooth, so that lossy codecs keep it."""
    return np.add.outer(np.arange(HEIGHT) * 2, np.arange(WIDTH) * 3).astype(np.uint8)


def write_dicom(path, pixels, syntax=ExplicitVRLittleEndian, bits=None, photometric="MONOCHROME2", data=None, **tags):
    """Write `pixels`, or the encapsulated `data` of them; pydicom or GDCM codes where syntax is a codec."""
    codec = syntax if syntax.is_encapsulated and data is None else None
    dataset, dataset.file_meta = Dataset(), FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if codec else syntax
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel, dataset.PlanarConfiguration = (1, None) if pixels.ndim == 2 else (3, 0)
    dataset.BitsAllocated = pixels.itemsize * 8
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PhotometricInterpretation = photometric
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    dataset.PixelData = data or pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    dataset["PixelData"].VR = "OB" if data or pixels.itemsize == 1 else "OW"
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    if codec in (JPEGLossless, JPEGLosslessSV1):
        transcode_with_gdcm(path, codec)
    elif codec:
        dataset = pydicom.dcmread(path)
        dataset.compress(codec)
        dataset.save_as(path)
    return path


def transcode_with_gdcm(path, syntax):
    gdcm = pytest.importorskip("gdcm")
    processes = {JPEGLossless: "JPEGLosslessProcess14", JPEGLosslessSV1: "JPEGLosslessProcess14_1"}
    process = getattr(gdcm.TransferSyntax, processes[syntax])
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(process))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


# --- DICOM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.name)
def test_every_file_bundled_with_pydicom_is_read_or_refused_in_one_short_line(path):
    try:
        radiograph = read_radiograph(path)
    except ImageReadError as error:
        assert "\n" not in str(error) and str(path.parent) not in str(error) and len(str(error)) < 400
    else:
        assert radiograph.pixels.dtype == np.float32 and radiograph.valid.shape == radiograph.pixels.shape
        assert np.isfinite(radiograph.pixels).all()


@pytest.mark.parametrize("coding", ["", "_RLE", "_bigendian", "_jp2klossless", "_jpeg_ls_lossless"])
def test_all_codings_of_the_bundled_slice_give_pydicoms_own_values(coding):
    folder = BUNDLED[0].parent
    expected = pydicom.dcmread(folder / "MR_small.dcm").pixel_array
    np.testing.assert_array_equal(read_radiograph(folder / f"MR_small{coding}.dcm").pixels, expected)


def test_the_modality_rescale_is_applied_and_the_patient_is_read():
    path = BUNDLED[0].parent / "CT_small.dcm"
    dataset, radiograph = pydicom.dcmread(path), read_radiograph(path)
    expected = dataset.pixel_array * dataset.RescaleSlope + dataset.RescaleIntercept
    np.testing.assert_array_equal(radiograph.pixels, expected)
    assert radiograph.patient == read_header(path).patient == dataset.PatientID


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MR_truncated.dcm", "less than expected"),
        ("no_meta.dcm", "neither a DICOM file"),
        ("ExplVR_LitEndNoMeta.dcm", "without pixel data"),
        ("rtplan.dcm", "without pixel data"),
        ("badVR.dcm", "too few"),
    ],
)
def test_a_bundled_file_without_a_usable_image_is_refused_with_its_reason(name, reason):
    with pytest.raises(ImageReadError, match=reason):
        read_radiograph(BUNDLED[0].parent / name)


@pytest.mark.parametrize(
    ("bits", "signed"),
    [(8, False), (10, False), (12, False), (14, False), (16, False), (8, True), (12, True), (16, True)],
)
@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.name)
def test_lossless_dicom_gives_back_every_value(tmp_path, syntax, bits, signed):
    pixels = noise(bits, signed)
    np.testing.assert_array_equal(read_radiograph(write_dicom(tmp_path / "a.dcm", pixels, syntax, bits)).pixels, pixels)


def test_jpeg_baseline_dicom_is_close(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(ramp()).save(stream, "JPEG", quality=95)
    path = write_dicom(tmp_path / "a.dcm", ramp(), JPEGBaseline8Bit, data=encapsulate([stream.getvalue()]))
    np.testing.assert_allclose(read_radiograph(path).pixels, ramp(), atol=4)


def test_a_dicom_is_known_by_its_content_not_its_name(tmp_path):
    np.testing.assert_array_equal(read_radiograph(write_dicom(tmp_path / "a.png", noise())).pixels, noise())


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_bits_above_bits_stored_are_ignored(tmp_path, syntax):
    values, overlay = noise(12), (noise(16) & 0xF000).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", values | overlay, syntax, bits=12)
    np.testing.assert_array_equal(read_radiograph(path).pixels, values)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
def test_values_in_the_upper_bits_of_their_words_are_read_from_there(tmp_path, syntax, signed):
    values = noise(12, signed)
    path = write_dicom(tmp_path / "a.dcm", values << 4, syntax, bits=12, HighBit=15)
    np.testing.assert_array_equal(read_radiograph(path).pixels, values)


def test_bits_above_bits_stored_are_ignored_in_signed_values(tmp_path):
    values = noise(12, signed=True)
    path = write_dicom(tmp_path / "a.dcm", values & np.int16(0x0FFF), bits=12)
    np.testing.assert_array_equal(read_radiograph(path).pixels, values)


@pytest.mark.parametrize("tags", [{}, {"PresentationLUTShape": "INVERSE"}, {"RescaleSlope": 2, "RescaleIntercept": -7}])
@pytest.mark.parametrize("signed", [False, True])
def test_monochrome1_rescales_to_the_negative_of_monochrome2(tmp_path, signed, tags):
    def read(photometric):
        path = write_dicom(tmp_path / "a.dcm", noise(12, signed), bits=12, photometric=photometric, **tags)
        return rescale(read_radiograph(path), 2, 98)

    bright, dark = read("MONOCHROME2"), read("MONOCHROME1")
    np.testing.assert_allclose(dark, -bright, atol=1e-6)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_masked_becomes_black_and_leaves_the_percentiles_alone(tmp_path, photometric):
    pixels = noise(12)
    pixels[:, :20] = 4095  # beyond whatever the image holds
    pixels[:, 20:] //= 2
    path = write_dicom(tmp_path / "a.dcm", pixels, bits=12, photometric=photometric, PixelPaddingValue=4095)
    radiograph = read_radiograph(path)
    x = rescale(radiograph, 0, 100)
    assert not radiograph.valid[:, :20].any() and radiograph.valid[:, 20:].all()
    assert (x[:, :20] == -1).all() and (x[:, 20:].min(), x[:, 20:].max()) == (-1, 1)


def test_a_padding_range_is_masked_to_its_limit(tmp_path):
    pixels, padding = noise(12), {"PixelPaddingValue": 100, "PixelPaddingRangeLimit": 500}
    radiograph = read_radiograph(write_dicom(tmp_path / "a.dcm", pixels, bits=12, **padding))
    np.testing.assert_array_equal(radiograph.valid, (pixels < 100) | (pixels > 500))


@pytest.mark.parametrize(("vr", "value"), [("US", 65535), ("SS", -1), ("US", 32768)])
def test_padding_that_no_pixel_can_hold_is_no_metal_and_no_air(tmp_path, vr, value):
    pixels = noise(12)
    pixels[0], pixels[1], pixels[2] = 4095, 0, value % 2**16  # metal, air, and a filled line of whole words
    path = write_dicom(tmp_path / "a.dcm", pixels, bits=12)
    dataset = pydicom.dcmread(path)
    dataset.add_new("PixelPaddingValue", vr, value)
    dataset.save_as(path)
    valid = read_radiograph(path).valid
    assert valid[:2].all() and not valid[2].any() and valid[3:].all()


def test_signed_padding_is_masked_though_it_was_written_unsigned(tmp_path):
    pixels = noise(12, signed=True).astype(np.int16)
    pixels[0] = -2000
    path = write_dicom(tmp_path / "a.dcm", pixels)
    dataset = pydicom.dcmread(path)
    dataset.add_new("PixelPaddingValue", "US", 63536)
    dataset.save_as(path)
    np.testing.assert_array_equal(read_radiograph(path).valid, pixels != -2000)


def test_palette_colour_is_looked_up_not_read_as_indices(tmp_path):
    palette = np.random.default_rng(0).integers(0, 65536, 256).astype("<u2")
    lookup = {f"{colour}PaletteColorLookupTable{part}": value for colour in ("Red", "Green", "Blue")
              for part, value in (("Data", palette.tobytes()), ("Descriptor", [256, 0, 16]))}  # fmt: skip
    path = write_dicom(tmp_path / "a.dcm", noise(8), photometric="PALETTE COLOR", **lookup)
    np.testing.assert_allclose(read_radiograph(path).pixels, palette[noise(8)], rtol=1e-5)


def test_rgb_dicom_becomes_luma_and_so_does_ybr(tmp_path):
    rgb = noise(8, channels=(3,))
    luma = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    ybr = cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    for pixels, photometric, atol in ((rgb, "RGB", 0.6), (ybr, "YBR_FULL", 2)):
        path = write_dicom(tmp_path / "a.dcm", pixels, photometric=photometric)
        np.testing.assert_allclose(read_radiograph(path).pixels, luma, atol=atol)


def test_a_modality_lookup_table_is_applied(tmp_path):
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [256, 0, 16], (np.arange(256) ** 2 % 65521).astype("<u2").tobytes()
    table.add_new("LUTData", "OW", table.LUTData)
    path = write_dicom(tmp_path / "a.dcm", noise(8), ModalityLUTSequence=[table])
    np.testing.assert_array_equal(read_radiograph(path).pixels, noise(8).astype(int) ** 2 % 65521)


@pytest.mark.parametrize(("slope", "intercept"), [("", ""), ("2", ""), ("", "-7")])
def test_an_empty_rescale_is_a_slope_of_1_and_an_intercept_of_0(tmp_path, slope, intercept):
    path = write_dicom(tmp_path / "a.dcm", noise(12), RescaleSlope=slope, RescaleIntercept=intercept)
    expected = noise(12) * float(slope or 1) + float(intercept or 0)
    np.testing.assert_array_equal(read_radiograph(path).pixels, expected)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_a_film_of_several_frames_gives_the_first_and_a_warning(tmp_path, syntax):
    frames = np.concatenate([noise(16), noise(15)])
    path = write_dicom(tmp_path / "a.dcm", frames)
    dataset = pydicom.dcmread(path)
    dataset.NumberOfFrames, dataset.Rows = 2, HEIGHT
    if syntax == RLELossless:
        dataset.compress(RLELossless)
    dataset.save_as(path)
    with pytest.warns(UserWarning, match="2 frames"):
        np.testing.assert_array_equal(read_radiograph(path).pixels, noise(16))


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_pictures_are_not_clipped(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise()).save(path)
    np.testing.assert_array_equal(read_radiograph(path).pixels, noise())


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colour_keeps_all_its_bits_and_ignores_alpha(tmp_path, suffix, channels):
    path, bgr = tmp_path / f"a.{suffix}", noise(12, channels=(channels,))
    assert cv2.imwrite(str(path), bgr)
    luma = bgr[..., 2::-1] @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(read_radiograph(path).pixels, luma, rtol=1e-5)


@pytest.mark.parametrize(
    ("byteorder", "dtype", "photometric"),
    [
        ("<", "u2", "minisblack"),
        (">", "u2", "minisblack"),
        ("<", "i2", "minisblack"),
        (">", "f4", "minisblack"),
        ("<", "u2", "miniswhite"),
        (">", "f4", "miniswhite"),
        ("<", "u4", "minisblack"),
        ("<", "i4", "minisblack"),
        ("<", "i1", "minisblack"),
    ],  # fmt: skip
)
def test_tiff_reads_bright_as_dense(tmp_path, byteorder, dtype, photometric):
    tifffile = pytest.importorskip("tifffile")
    pixels = noise(15).astype(dtype) * np.array(2**17 if dtype == "u4" else 1, dtype)  # beyond what has a sign
    tifffile.imwrite(tmp_path / "a.tif", pixels, byteorder=byteorder, photometric=photometric)
    expected = pixels.max() - pixels if photometric == "miniswhite" else pixels
    np.testing.assert_array_equal(read_radiograph(tmp_path / "a.tif").pixels, expected)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "jpg"])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "LA", "RGBA", "CMYK"])
def test_8_bit_pictures_of_every_mode_give_their_grey_levels(tmp_path, suffix, mode):
    picture = Image.fromarray(ramp()).convert("RGB").convert(mode)
    try:
        picture.save(tmp_path / f"a.{suffix}", quality=95)
    except OSError:
        pytest.skip(f"{suffix} has no mode {mode}")
    if mode in ("LA", "RGBA"):
        picture.putalpha(0)
    grey = np.asarray(picture.convert("L"))
    np.testing.assert_allclose(read_radiograph(tmp_path / f"a.{suffix}").pixels, grey, atol=4)


def test_a_tiff_of_several_pages_gives_the_first_and_a_warning(tmp_path):
    first, second = (Image.fromarray(noise(bits)) for bits in (16, 15))
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    with pytest.warns(UserWarning, match="2 frames, only the first"):
        np.testing.assert_array_equal(read_radiograph(tmp_path / "a.tif").pixels, noise(16))


# --- orientation -----------------------------------------------------------------------------------------------------

# Where row 0 and column 0 of the stored picture lie when it is seen upright (TIFF 6.0, tag 274)
SIDES = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left",
         5: "left top", 6: "right top", 7: "right bottom", 8: "left bottom"}  # fmt: skip


def stored_as(upright, orientation):
    """What a file of that orientation stores of an upright (H, W, ...)."""
    sides = SIDES[orientation].split()
    if "bottom" in sides:
        upright = upright[::-1]
    if "right" in sides:
        upright = upright[:, ::-1]
    first_row_lies_sideways = sides[0] in ("left", "right")
    return np.ascontiguousarray(upright.swapaxes(0, 1) if first_row_lies_sideways else upright)


def write_oriented(path, upright, orientation):
    """A PNG, JPEG or TIFF of 8 or 16 bits, grey or colour, that says how to turn it."""
    stored = stored_as(upright, orientation)
    if path.suffix == ".tif":
        tifffile = pytest.importorskip("tifffile")
        photometric = "minisblack" if stored.ndim == 2 else "rgb"
        tifffile.imwrite(path, stored, photometric=photometric, extratags=[(274, "H", 1, orientation, True)])
        return path
    exif = Image.Exif()
    exif[274] = orientation
    if stored.ndim == 2:
        Image.fromarray(stored).save(path, exif=exif, quality=95)
        return path
    cv2.imwrite(str(path), stored[..., ::-1])  # Pillow writes no 16-bit colour; its Exif chunk goes before the pixels
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    content = path.read_bytes()
    path.write_bytes(content[:33] + chunk + content[33:])  # 33 bytes: the signature and IHDR
    return path


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize(
    ("suffix", "bits", "channels"),
    [("png", 8, ()), ("png", 16, ()), ("png", 16, (3,)), ("tif", 8, ()), ("tif", 16, ()), ("tif", 16, (3,))],
)
def test_a_picture_stands_upright_whatever_its_exif_orientation(tmp_path, suffix, bits, channels, orientation):
    upright = noise(bits, channels=channels)
    path = write_oriented(tmp_path / f"a.{suffix}", upright, orientation)
    expected = upright @ [0.299, 0.587, 0.114] if channels else upright
    np.testing.assert_allclose(read_radiograph(path).pixels, expected, rtol=1e-6)


@pytest.mark.parametrize("orientation", SIDES)
def test_a_jpeg_and_a_mask_stand_upright_too(tmp_path, orientation):
    picture = write_oriented(tmp_path / "a.jpg", ramp(), orientation)
    np.testing.assert_allclose(read_radiograph(picture).pixels, ramp(), atol=4)
    mask = write_oriented(tmp_path / "m.png", noise(8) // 128, orientation)
    np.testing.assert_array_equal(read_mask(mask), noise(8) >= 128)


def test_damaged_exif_data_costs_a_warning_not_the_picture(tmp_path):
    Image.fromarray(noise(8)).save(tmp_path / "a.png", exif=b"Exif\0\0garbage")
    with pytest.warns(UserWarning, match="a file has damaged EXIF data"):
        np.testing.assert_array_equal(read_radiograph(tmp_path / "a.png").pixels, noise(8))


# --- masks -----------------------------------------------------------------------------------------------------------


def test_a_mask_is_true_where_not_black_and_in_a_jpeg_where_bright(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:20, 5:30] = 1
    Image.fromarray(mask).save(tmp_path / "a.png")
    Image.fromarray(mask * 255).save(tmp_path / "a.jpg", quality=100)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), mask > 0)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.jpg"), mask > 0)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("grey", [0, 255])
def test_a_mask_in_one_colour_is_read_from_its_alpha(tmp_path, mode, grey):
    alpha = noise(8) * (noise(8) > 128)
    picture = Image.new(mode[:-1], (WIDTH, HEIGHT), grey if mode == "LA" else (grey, 0, 0))
    picture.putalpha(Image.fromarray(alpha))
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), alpha > 0)


def test_a_mask_of_16_bits_in_one_colour_is_read_from_its_alpha(tmp_path):
    bgra = np.dstack([np.full((HEIGHT, WIDTH, 3), 40000, np.uint16), noise(16) * (noise(8) > 128)])
    assert cv2.imwrite(str(tmp_path / "a.png"), bgra)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), bgra[..., 3] > 0)


def test_a_palette_mask_in_one_colour_is_read_from_its_alpha(tmp_path):
    picture = Image.fromarray(noise(8) // 128).convert("P")
    picture.putpalette([255, 0, 0] * 256)
    picture.save(tmp_path / "a.png", transparency=bytes([0, 255]))
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), noise(8) >= 128)


def test_a_mask_in_several_colours_is_marked_where_neither_black_nor_transparent(tmp_path):
    levels, alpha = noise(8) // 128 * 255, noise(16) // 32768 * 255
    Image.merge("LA", [Image.fromarray(levels), Image.fromarray(alpha.astype(np.uint8))]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), (levels > 0) & (alpha > 0))


@pytest.mark.parametrize("opacity", [0, 255])
def test_an_even_alpha_says_nothing_about_a_mask(tmp_path, opacity):
    picture = Image.fromarray(noise(8) // 128)
    picture.putalpha(opacity)
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), noise(8) >= 128)


# --- refusals --------------------------------------------------------------------------------------------------------


def damaged(folder, kind):
    """A file of that kind of damage."""
    good = write_dicom(folder / "good.dcm", noise())
    dataset, path = pydicom.dcmread(good), folder / "bad.png"
    if kind == "html":
        path.write_text("<html>404 Not Found</html>")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "truncated png":
        Image.fromarray(noise()).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "truncated dicom":
        path.write_bytes(good.read_bytes()[:2000])
    elif kind == "truncated jpeg 2000":
        path.write_bytes(write_dicom(good, noise(), JPEG2000Lossless).read_bytes()[:2000])
    elif kind == "zero rows":
        dataset.Rows = 0
        dataset.save_as(path)
    elif kind == "huge rows":
        dataset.Rows = dataset.Columns = 65535
        dataset.save_as(path)
    elif kind == "no pixel data":
        del dataset.PixelData
        dataset.save_as(path)
    elif kind == "no photometric":
        del dataset.PhotometricInterpretation
        dataset.save_as(path)
    elif kind == "bomb":
        Image.new("1", (20_000, 20_000)).save(path)
    elif kind == "icon":
        Image.fromarray(noise()[:15]).save(path)
    elif kind == "postscript":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n")
    return path


KINDS = ["absent", "html", "empty", "folder", "truncated png", "truncated dicom", "truncated jpeg 2000", "zero rows",
         "huge rows", "no pixel data", "no photometric", "bomb", "icon", "postscript"]  # fmt: skip


@pytest.mark.parametrize("read", [read_radiograph, read_mask])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_is_refused_by_name_and_without_its_folder(tmp_path, kind, read):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ImageReadError) as caught:
            read(damaged(tmp_path, kind))
    assert str(caught.value).startswith("bad.png: ") and str(tmp_path) not in str(caught.value) and caught.value.reason


def test_radiographs_are_found_by_suffix_or_marker_and_hidden_ones_are_not(tmp_path):
    for name in ("b.PNG", "a/c.dcm", ".hidden.png", ".cache/d.png", "notes.txt", "README", "a/._c.dcm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("export", "1.2.840.5"):
        write_dicom(tmp_path / name, noise())
    found = [path.relative_to(tmp_path).as_posix() for path in find_radiographs(tmp_path)]
    assert found == ["1.2.840.5", "a/c.dcm", "b.PNG", "export"]


# --- rescale ---------------------------------------------------------------------------------------------------------


def test_rescale_maps_numpys_percentiles_of_the_valid_pixels_to_the_ends():
    pixels, valid = noise().astype(np.float32), np.random.default_rng(1).random((HEIGHT, WIDTH)) < 0.7
    low, high = np.percentile(pixels[valid], [3, 95])
    expected = np.where(valid, np.interp(pixels, [low, high], [-1, 1]), -1)
    np.testing.assert_allclose(rescale(Radiograph(pixels, valid, None), 3, 95), expected, atol=1e-6)


@pytest.mark.parametrize("valid", [True, False])
def test_rescale_refuses_an_image_without_contrast(valid):
    with pytest.raises(ValueError, match="no contrast"):
        rescale(Radiograph(np.full((20, 20), 7, np.float32), np.full((20, 20), valid), None), 0.5, 99.5)


def test_linked_folders_are_passed_over_with_a_warning(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "there" / "a.png")
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "there")
    with pytest.warns(UserWarning, match="1 linked folders are passed over"):
        assert find_radiographs(tmp_path / "here") == []


def test_a_folder_that_cannot_be_read_is_an_error_not_a_gap(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(UsageError, match="Permission denied") as refused:
        find_radiographs(tmp_path)
    assert str(tmp_path) not in str(refused.value)


def test_folders_with_results_of_a_phase_are_passed_over_and_told(tmp_path):
    for name in ("a.png", "outputs/phase1_vae/val_000003.png", "outputs/phase4_inference/maps/x.png", "b/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ramp()).save(tmp_path / name)
    (tmp_path / "outputs/phase1_vae/checkpoint_last.pt").write_text("")
    (tmp_path / "outputs/phase4_inference/examination.json").write_text("")
    with pytest.warns(UserWarning, match="2 folders with results of the four phases are passed over"):
        found = find_radiographs(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.png", "b/c.png"]
