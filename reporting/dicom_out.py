"""DICOM objects that an archive keeps beside a radiograph: what phase 4 found in it, in the study of the original.

capture     Secondary Capture, 8-bit RGB: the radiograph, tinted and outlined where the map lies above its threshold,
            and beneath it a strip with a note that belongs to the pixels; nothing of the radiograph lies under the note

binary      Segmentation of one bit: where the map lies above its threshold

fractional  Segmentation of eight bits: fraction = 1 / (1 + exp(-(map - threshold) / width)), width = scale_end / 8.
            Strictly monotone until eight bits round it; stored values of 128 and more are the binary one; not a
            probability, though DICOM's word for a fraction that is no share of a pixel is that

All have the rows and columns of the original, the capture with its strip below them, and pixel (r, c) is pixel (r, c).

What a panoramic lacks. A projection has no plane in the patient, so no frame of reference, position or orientation is
claimed, and none is copied from a file that has some (the standard would then ask for a slice's thickness, which a
projection has not): highdicom asks for them only where a source has a frame of reference and a position in it, and the
standard only where no Derivation Image says which image a frame was made from; ours say so, with its spatial locations
preserved. PixelSpacing is copied into the capture where the source has it, since the grid is the same; a segment says
none, since readers, highdicom's among them, refuse a spacing without the thickness of a slice, and it lies on the
source's pixels anyway. ImagerPixelSpacing is a distance on the detector, which a panoramic magnifies differently
everywhere, and becomes no distance in the patient. PatientOrientation and laterality are copied, or empty: unknown. A
segment is coded as an image region and nothing more: what differs from normals may be a filling as well as a lesion.

Patient and study modules are copied as they are, in the character set of the source: keep these files as the original.
UIDs follow from the source and its patient, the checkpoints, the settings and the pixels of the object (2.25., ISO/IEC
9834-8), so the same examination gives the same objects, at another time of creation, and an archive keeps them once.
"""

import copy
import hashlib
import io
import json
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import cv2
import highdicom
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import (
    UID,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
)

from config import MAKER, VERSION
from files import write_atomically

NOTE = "RESEARCH ONLY: NOT A MEDICAL DEVICE, NOT FOR DIAGNOSIS"
LABEL = "differs from normals"
SERIES = {"capture": (9001, "Anomaly map, research only"), "segmentation": (9002, "Anomaly segments, research only")}
NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
TYPE_2 = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID")
TYPE_2 += ("AccessionNumber", "ReferringPhysicianName")  # they must be there, and may be empty
LOSSY = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless)
OUTLINE, WEAK, STRONG = (0, 229, 255), (255, 221, 0), (255, 60, 0)  # RGB: cyan, and from yellow to red
FAINTEST, DENSEST = 0.15, 0.35  # opacity of the tint: teeth show through
LESS = 127 / 255  # the largest fraction of what does not lie above the threshold, once it is rounded
SMALLEST_LETTER = 11  # pixels; smaller ones cannot be read


@dataclass(frozen=True)
class Algorithm:
    """What made a map, as far as its objects say it."""

    method: str
    threshold: float  # of the map, in its own unit: standard deviations of normals, or of the plain formula
    scale_end: float  # above 0, in the same unit: where the colours end
    hashes: dict[str, str]  # names and SHA-256 of the checkpoints and whatever else a map follows from

    @property
    def width(self) -> float:
        """Of the fraction, in the unit of the map: so much above the threshold it is 1 / (1 + 1 / e)."""
        return self.scale_end / 8

    @property
    def parameters(self) -> dict[str, str]:
        """Names and values for people and programs, free of commas."""
        numbers = {"threshold": f"{self.threshold:.9g}", "width": f"{self.width:.9g}"}
        return {"method": self.method, **numbers, **self.hashes}


def missing_in(source: Dataset) -> str:
    """What a source lacks to be referred to by name, such as "StudyInstanceUID"; "" if nothing."""
    return ", ".join(name for name in NEEDED if not str(source.get(name) or "").strip())


def fraction_of(anomaly_map: NDArray, algorithm: Algorithm) -> NDArray:
    """The map squeezed into [0, 1], monotone, 1/2 at the threshold -> float64, its shape."""
    steps = (np.asarray(anomaly_map, np.float64) - algorithm.threshold) / algorithm.width
    return 1 / (1 + np.exp(-np.clip(steps, -700, 700)))


def captured(grey: NDArray, anomaly_map: NDArray, algorithm: Algorithm) -> NDArray:
    """The picture of a Secondary Capture: grey (H, W) in [-1, 1] under its map -> uint8 (H + strip, W, 3)."""
    levels = np.round((np.clip(grey, -1, 1) + 1) * 127.5).astype(np.uint8)
    picture = np.repeat(levels[..., None], 3, axis=2)
    above = np.asarray(anomaly_map, np.float64) > algorithm.threshold
    room = max(algorithm.scale_end - algorithm.threshold, 1e-9)
    share = np.clip((anomaly_map[above] - algorithm.threshold) / room, 0, 1)[:, None]
    colour = (1 - share) * np.array(WEAK) + share * np.array(STRONG)
    opacity = FAINTEST + (DENSEST - FAINTEST) * share
    picture[above] = np.round((1 - opacity) * picture[above] + opacity * colour)
    thick = max(1, round(min(above.shape) / 500))
    grown = cv2.dilate(above.astype(np.uint8), np.ones((2 * thick + 1, 2 * thick + 1), np.uint8))
    picture[(grown > 0) & ~above] = OUTLINE
    legend = f"{LABEL}: outlined where the map ({algorithm.method}) exceeds {algorithm.threshold:.3g}"
    strip = _strip((NOTE, f"{legend}, yellow to red up to {algorithm.scale_end:.3g}"), above.shape[1])
    return np.concatenate([picture, strip])


def _strip(sentences: tuple[str, ...], width: int) -> NDArray:
    """White sentences on black, broken where they do not fit -> uint8 (h, width, 3)."""
    size = max(SMALLEST_LETTER, width // 60)
    font, room = ImageFont.load_default(size), width - size
    lines = []
    for sentence in sentences:
        line = ""
        for word in sentence.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > room:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    pitch = round(1.4 * size)
    strip = Image.new("RGB", (width, pitch * len(lines) + size), "black")
    draw = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        draw.text((size // 2, size // 2 + pitch * number), line, "white", font)
    return np.asarray(strip)


def make_objects(
    source: Dataset, grey: NDArray, anomaly_map: NDArray, algorithm: Algorithm, made_at: datetime
) -> dict[str, Dataset]:
    """The objects of one radiograph by name: capture, binary, fractional.

    source is its header (pixels are not looked at), grey (H, W) in [-1, 1] its first frame, bright where dense, and
    anomaly_map (H, W) in the unit of the threshold. ValueError, TypeError or a LookupError where an element of the
    header makes no sense; `missing_in` says before whether a source can have objects at all.
    """
    shape = (int(source.get("Rows") or 0), int(source.get("Columns") or 0))
    if not shape == np.shape(grey) == np.shape(anomaly_map):
        raise ValueError(f"a header of {shape}, pixels of {np.shape(grey)}, a map of {np.shape(anomaly_map)}")
    above = (np.asarray(anomaly_map, np.float64) > algorithm.threshold).astype(np.uint8)
    made = {"capture": _capture(source, captured(grey, anomaly_map, algorithm), algorithm)}
    made["binary"] = _segmentation(source, above, "BINARY", algorithm)
    fraction = np.where(
        above, fraction_of(anomaly_map, algorithm), np.minimum(fraction_of(anomaly_map, algorithm), LESS)
    )
    made["fractional"] = _segmentation(source, fraction, "FRACTIONAL", algorithm)
    for each in made.values():
        _adopt(each, source)
        _date(each, made_at)
    return made


def encoded(made: Dataset) -> bytes:
    """The file of an object; ValueError, TypeError or a LookupError if what was copied into it cannot be written."""
    file = io.BytesIO()
    made.save_as(file, enforce_file_format=True)
    return file.getvalue()


def save(path: str | Path, content: bytes) -> None:
    """Write the file of an object whole or not at all, for its owner alone to read: it names the patient."""
    write_atomically(path, lambda beside: beside.write_bytes(content), private=True)


def _uid(kind: str, source: Dataset, algorithm: Algorithm, pixels: NDArray | None = None) -> UID:
    """A UID that follows from what it names."""
    known = [str(source.get(name) or "") for name in (*NEEDED, *TYPE_2)] + [
        VERSION,
        algorithm.parameters,
        algorithm.scale_end,
    ]
    found = hashlib.sha256(json.dumps([kind, *known], sort_keys=True).encode())
    if pixels is not None:
        found.update(np.ascontiguousarray(pixels).tobytes())
    return UID(f"2.25.{uuid.UUID(bytes=found.digest()[:16], version=5).int}")


def _made_by() -> dict[str, str]:
    return {"manufacturer": MAKER, "manufacturer_model_name": MAKER, "software_versions": VERSION}


def _capture(source: Dataset, picture: NDArray, algorithm: Algorithm) -> Dataset:
    number, description = SERIES["capture"]
    made = highdicom.sc.SCImage.from_ref_dataset(
        _stand_in(source),
        picture,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),  # highdicom wants one; _adopt puts the source's own in its place
        series_instance_uid=_uid("capture series", source, algorithm),
        series_number=number,
        series_description=description,
        sop_instance_uid=_uid("capture", source, algorithm, picture),
        instance_number=1,
        pixel_spacing=_spacing(source),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **_made_by(),
    )
    original = _reference(source)
    purpose = codes.DCM.SourceImageForImageProcessingOperation
    original.PurposeOfReferenceCodeSequence = [highdicom.sr.CodedConcept.from_code(purpose)]
    made.SourceImageSequence = [original]
    series = Dataset()
    series.SeriesInstanceUID = source.SeriesInstanceUID
    series.ReferencedInstanceSequence = [_reference(source, with_frame=False)]
    made.ReferencedSeriesSequence = [series]
    parameters = ",".join(f"{name}={value}" for name, value in algorithm.parameters.items())
    made.DerivationDescription = f"{NOTE}. {MAKER} {VERSION}: {parameters}"[:1024]
    side = "ImageLaterality" if source.get("ImageLaterality") else "Laterality"
    setattr(made, side, source.get(side) or "")
    # BurnedInAnnotation asks whether the patient can be identified: the note does not, the source's pixels may
    for name in ("BurnedInAnnotation", "PixelSpacingCalibrationType", "PixelSpacingCalibrationDescription"):
        if source.get(name) and (name == "BurnedInAnnotation" or "PixelSpacing" in made):
            setattr(made, name, source.get(name))
    for name, value in _lossy(source).items():
        setattr(made, name, value)
    return made


def _segmentation(source: Dataset, pixels: NDArray, kind: str, algorithm: Algorithm) -> Dataset:
    number, description = SERIES["segmentation"]
    fractional = kind == "FRACTIONAL"
    stored = np.around(pixels * 255).astype(np.uint8) if fractional else pixels  # as highdicom rounds them
    family = codes.DCM.ArtificialIntelligence
    identification = highdicom.AlgorithmIdentificationSequence(
        MAKER, family, VERSION, source=NOTE, parameters=algorithm.parameters
    )
    region = (codes.SCT.SpatialAndRelationalConcept, codes.DCM.ImageRegion)
    segment = highdicom.seg.SegmentDescription(1, LABEL, *region, "AUTOMATIC", identification)
    formula = "fraction = 1 / (1 + exp(-(map - threshold) / width)), no probability of disease"
    segment.SegmentDescription = formula if fractional else "map > threshold"
    made = highdicom.seg.Segmentation(
        [_stand_in(source)],
        pixels,
        segmentation_type=kind,
        segment_descriptions=[segment],
        series_instance_uid=_uid("segmentation series", source, algorithm),
        series_number=number,
        series_description=description,
        sop_instance_uid=_uid(kind, source, algorithm, stored),
        instance_number=2 if fractional else 1,
        device_serial_number=MAKER,
        fractional_type="PROBABILITY",
        max_fractional_value=255,
        content_label=f"ANOMALY_{kind}"[:16],
        content_description=f"{LABEL}, research only",
        omit_empty_frames=False,  # of a radiograph without anything above the threshold, too
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **_made_by(),
    )
    made.ContentCreatorName = ""
    organization = _uid(f"{kind} dimensions", source, algorithm)
    for item in (*made.DimensionOrganizationSequence, *made.DimensionIndexSequence):
        item.DimensionOrganizationUID = organization
    (frame,) = made.PerFrameFunctionalGroupsSequence
    for item in frame.DerivationImageSequence[0].SourceImageSequence:
        item.update(_reference(source))
    for item in (*made.SourceImageSequence, *made.ReferencedSeriesSequence[0].ReferencedInstanceSequence):
        item.update(_reference(source, with_frame=False))
    return made


def _stand_in(source: Dataset) -> Dataset:
    """What highdicom builds on: one frame of a projection, with the identifiers of the source and no patient yet.

    Of the source itself, it refuses several frames, classes that it does not know and values that it finds odd.
    """
    stand_in = Dataset()
    for name in TYPE_2:
        setattr(stand_in, name, "")
    for name in NEEDED:
        setattr(stand_in, name, str(source[name].value))
    stand_in.SOPClassUID = DigitalXRayImageStorageForPresentation
    stand_in.Modality = "PX"
    stand_in.Rows, stand_in.Columns = source.Rows, source.Columns
    for name, value in _lossy(source).items():
        setattr(stand_in, name, value)
    return stand_in


def _reference(source: Dataset, with_frame: bool = True) -> Dataset:
    """The source by name, and which of its frames was examined where it has several."""
    item = Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    if with_frame and int(source.get("NumberOfFrames") or 1) > 1:
        item.ReferencedFrameNumber = 1
    return item


def _adopt(made: Dataset, source: Dataset) -> None:
    """Copy the patient and the study, and which way the image lies, from the source."""
    known = copy.deepcopy(source)
    known.SOPClassUID = DigitalXRayImageStorageForPresentation  # whose modules are those of any image
    if known.get("SpecificCharacterSet"):
        made.SpecificCharacterSet = known.SpecificCharacterSet
    made.copy_patient_and_study_information(known)
    for name in TYPE_2:
        if made.get(name) is None:
            setattr(made, name, "")
    made.PatientOrientation = source.get("PatientOrientation") or ""
    for _ in made.iterall():  # makes plain elements of raw ones, which carry the coding of the source's file
        continue


def _date(made: Dataset, made_at: datetime) -> None:
    """When it was made, wherever an object says so."""
    day, time = made_at.strftime("%Y%m%d"), made_at.strftime("%H%M%S")
    for kind in ("InstanceCreation", "Content"):
        setattr(made, f"{kind}Date", day)
        setattr(made, f"{kind}Time", time)
    if "DateOfSecondaryCapture" in made:
        made.DateOfSecondaryCapture, made.TimeOfSecondaryCapture = day, time
    for item in made.get("ContributingEquipmentSequence", []):
        if "ContributionDateTime" in item:
            item.ContributionDateTime = day + time


def _spacing(source: Dataset) -> tuple[float, float] | None:
    """PixelSpacing in mm, rows first; None where it is missing or no two lengths."""
    values = source.get("PixelSpacing") or ()
    if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != 2:
        return None
    rows, columns = (float(value) for value in values)
    return (rows, columns) if 0 < rows < np.inf and 0 < columns < np.inf else None


def _lossy(source: Dataset) -> dict[str, object]:
    """What is said of lossy compression: once lossy, an image and all that is made of it stay so."""
    coding = getattr(source, "file_meta", Dataset()).get("TransferSyntaxUID")
    if source.get("LossyImageCompression") != "01" and coding not in LOSSY:
        return {"LossyImageCompression": "00"}
    names = ("LossyImageCompressionRatio", "LossyImageCompressionMethod")
    return {"LossyImageCompression": "01"} | {name: source.get(name) for name in names if source.get(name)}
