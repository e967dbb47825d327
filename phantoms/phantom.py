"""Synthetic panoramic radiographs with lesions and exact masks: the whole pipeline without a single patient.

    python -m phantoms.phantom --out ./data/phantom --train 400 --val 60 --test-normal 60 --test-per-lesion 30

Every picture follows from (seed, patient): the patient's anatomy, texture, noise and each lesion have a random stream
of their own, so a lesion changes nothing but its own pixels. The mask is where the noise-free picture with the lesion
differs from the one without by more than `MASK_THRESHOLD` grey levels of [0, 1]. Coordinates and units are those of
`canvas.py`. Nothing is copied from a real image.
"""

import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid
from threadpoolctl import threadpool_limits

from checks import UsageError
from files import write_csv
from phantoms.anatomy import draw_anatomy
from phantoms.canvas import DETECTOR_HEIGHT, Canvas
from phantoms.detector import develop, draw_grain, expose
from phantoms.lesions import DRAW, LESIONS, Case
from phantoms.patient import sample_patient
from progress import bar

MASK_THRESHOLD = 0.02
# DICOM attributes of type 2: they must be there, and may be empty.
EMPTY = ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName")


@dataclass(frozen=True)
class Phantom:
    """A radiograph: image float32 (H, W) in [0, 1], mask bool (H, W), what was added to it, and whose it is."""

    image: np.ndarray
    mask: np.ndarray
    lesion: str | None
    patient: str


def draw_phantom(seed: int, patient: int, lesion: str | None = None, height: int = 256, width: int = 512) -> Phantom:
    """Draw one radiograph of a patient, healthy or with one lesion.

    The same (seed, patient, height, width) gives the same anatomy and noise whatever the lesion. Raises UsageError for
    an unknown lesion.
    """
    if lesion is not None and lesion not in LESIONS:
        raise UsageError(f"unknown lesion {lesion!r}: use one of {', '.join(LESIONS)}")

    def stream(purpose: int) -> np.random.Generator:
        return np.random.default_rng([seed, patient, purpose])

    person = sample_patient(stream(0))
    numbers = person.numbers
    canvas = Canvas(numbers, height, width)
    healthy = draw_anatomy(person, canvas, stream(1))
    normal = expose(healthy, numbers, canvas)
    clean = normal
    if lesion is not None:
        case = Case(person, canvas, healthy, redraw=lambda other: draw_anatomy(other, canvas, stream(1)))
        sick = DRAW[lesion](case, stream(3 + LESIONS.index(lesion)))
        clean = expose(sick, numbers, canvas)
    mask = np.abs(develop(clean, numbers) - develop(normal, numbers)) > MASK_THRESHOLD
    noisy = draw_grain(clean, numbers, stream(2))
    return Phantom(develop(noisy, numbers), mask, lesion, f"PHANTOM^{patient:04d}")


def write_dicom(path: str | Path, phantom: Phantom) -> None:
    """Write a 12-bit MONOCHROME2 panoramic radiograph (modality PX); the same phantom gives the same bytes."""
    pixels = np.round(phantom.image * 4095).astype("<u2")
    rows, columns = pixels.shape

    def uid(kind: str) -> str:
        return generate_uid(entropy_srcs=[kind, phantom.patient, pixels.tobytes().hex()])

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = uid("instance")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = generate_uid(entropy_srcs=["dental normalizer phantom"])

    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID = meta.MediaStorageSOPClassUID
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID = uid("study")
    data.SeriesInstanceUID = uid("series")
    data.Modality = "PX"
    data.PresentationIntentType = "FOR PRESENTATION"
    data.ImageType = ["DERIVED", "PRIMARY", ""]
    data.BodyPartExamined = "JAW"
    data.ImageLaterality = "B"  # both sides
    data.AnatomicRegionSequence = [_code("661005", "SCT", "Jaw region")]
    data.AcquisitionContextSequence = []
    data.DetectorType = ""
    data.BurnedInAnnotation = "NO"
    data.LossyImageCompression = "00"
    data.PatientOrientation = ["L", "F"]
    data.Manufacturer = "Phantom"
    data.PatientName = phantom.patient
    data.PatientID = phantom.patient
    data.StudyID = "1"
    data.SeriesNumber = 1
    data.InstanceNumber = 1
    for name in EMPTY:
        setattr(data, name, "")

    data.Rows = rows
    data.Columns = columns
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.BitsAllocated = 16
    data.BitsStored = 12
    data.HighBit = 11
    data.PixelRepresentation = 0
    data.ImagerPixelSpacing = [f"{DETECTOR_HEIGHT / rows:.6f}", f"{2 * DETECTOR_HEIGHT / columns:.6f}"]
    data.PixelSpacing = data.ImagerPixelSpacing
    data.WindowCenter = 2047.5
    data.WindowWidth = 4096
    data.PixelIntensityRelationship = "LOG"
    data.PixelIntensityRelationshipSign = 1
    data.RescaleIntercept = 0
    data.RescaleSlope = 1
    data.RescaleType = "US"
    data.PresentationLUTShape = "IDENTITY"
    data.PixelData = pixels.tobytes()
    data.save_as(path, enforce_file_format=True)


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    """A DICOM code."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def write_dataset(
    out: str | Path,
    train: int,
    val: int,
    test_normal: int,
    test_per_lesion: int,
    seed: int = 0,
    height: int = 256,
    width: int = 512,
    file_format: Literal["dicom", "png"] = "dicom",
    workers: int | None = None,
) -> Path:
    """Write images, masks and manifest.csv below `out`; returns the path of the manifest.

    Train and val hold normals only. Test holds normals and, from test patients again, lesions; no patient lies in two
    splits.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: give --out a folder")
    if min(train, val, test_normal, test_per_lesion, seed) < 0:
        raise UsageError("the numbers of radiographs and the seed must not be negative")
    if min(height, width, 1 if workers is None else workers) < 1:
        raise UsageError("height, width and workers must be at least 1")
    manifest = out / "manifest.csv"
    manifest.unlink(missing_ok=True)  # written last: nobody takes an old one for the new pictures
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    first_test = train + val
    plan = [("train", i, i, None) for i in range(train)]
    plan += [("val", i, train + i, None) for i in range(val)]
    plan += [("test", i, first_test + i, None) for i in range(test_normal)]
    plan += [("test", i, first_test + i, lesion) for lesion in LESIONS for i in range(test_per_lesion)]
    work = partial(_write_one, out, seed, height, width, file_format)
    processes = min(workers or os.cpu_count() or 1, max(1, len(plan)))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_begin, initargs=(os.getpid(),)) as pool:
        mapped = map(work, plan) if processes == 1 else pool.map(work, plan, chunksize=4)
        rows = list(bar(mapped, total=len(plan), desc="phantoms", unit="image"))
    write_csv(manifest, ["image", "split", "label", "kind", "mask", "patient"], rows)
    return manifest


def _begin(parent: int) -> None:
    """A process that ends with its parent, and shares the cores without BLAS threads that would wait for each other."""
    threadpool_limits(1)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """A parent that was killed tells nobody: its children would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _write_one(
    out: Path, seed: int, height: int, width: int, file_format: str, item: tuple[str, int, int, str | None]
) -> list[str | int]:
    """Draw one radiograph and write it; returns its line of the manifest."""
    split, index, patient, lesion = item
    phantom = draw_phantom(seed, patient, lesion, height, width)
    kind = lesion or "normal"
    name = f"{split}_{kind}_{index:04d}" if split == "test" else f"{split}_{index:04d}"
    image = f"images/{name}.{'dcm' if file_format == 'dicom' else 'png'}"
    if file_format == "dicom":
        write_dicom(out / image, phantom)
    else:
        Image.fromarray(np.round(phantom.image * 255).astype(np.uint8)).save(out / image)
    mask = ""
    if lesion:
        mask = f"masks/{name}.png"
        Image.fromarray(phantom.mask.astype(np.uint8) * 255).save(out / mask)
    return [image, split, int(lesion is not None), kind, mask, phantom.patient]


def main(
    out: Path = Path("./data/phantom"),
    train: int = 400,
    val: int = 60,
    test_normal: int = 60,
    test_per_lesion: int = 30,
    height: int = 256,
    width: int = 512,
    seed: int = 0,
    file_format: Annotated[Literal["dicom", "png"], tyro.conf.arg(name="format")] = "dicom",
    workers: int | None = None,
) -> None:
    """Write a folder of synthetic panoramic radiographs with lesions and masks.

    Args:
        out: folder for images/, masks/ and manifest.csv; files of the same name are replaced
        train: normal radiographs to train on
        val: normal radiographs to validate on
        test_normal: normal radiographs to test on
        test_per_lesion: test radiographs of each kind of lesion
        height: image height in pixels
        width: image width in pixels; twice the height looks natural
        seed: another seed, other patients
        file_format: dicom (12 bits) or png (8 bits)
        workers: processes; all cores unless told
    """
    counts = (train, val, test_normal, test_per_lesion)
    try:
        manifest = write_dataset(out, *counts, seed, height, width, file_format, workers)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; the same command starts anew", file=sys.stderr)
        sys.exit(130)
    print(f"wrote {train + val + test_normal + test_per_lesion * len(LESIONS)} radiographs and {manifest}")


if __name__ == "__main__":
    tyro.cli(main)
