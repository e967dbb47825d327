"""Synthetic panoramic radiographs with lesions and exact masks, so that the whole pipeline can be tried without a single patient.

    python -m phantoms.phantom --out ./data/phantom --train 400 --val 60 --test-normal 60 --test-per-lesion 30

Every picture follows from (seed, patient): the patient's anatomy, texture, noise and each lesion have a random stream of their own, so a lesion
changes nothing but its own pixels. The mask is where the noise-free picture with the lesion differs from the one without by more than
`MASK_THRESHOLD` grey levels of [0, 1]. Anatomy, coordinates and units are those of `anatomy.py`. Nothing is copied from a real image.
"""

import csv
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from checks import UsageError
from phantoms.anatomy import (
    MM,
    Canvas,
    Patient,
    Scene,
    Tooth,
    apex,
    draw_anatomy,
    draw_tooth,
    outline,
    sample_patient,
    tooth_window,
)

LESIONS = ("caries", "periapical", "cyst", "impacted", "implant", "bone_loss")
MASK_THRESHOLD = 0.02
DETECTOR_HEIGHT = 150.0  # mm


@dataclass(frozen=True)
class Phantom:
    """A radiograph: image float32 (H, W) in [0, 1], mask bool (H, W), what was added to it, and whose it is."""

    image: np.ndarray
    mask: np.ndarray
    lesion: str | None
    patient: str


def draw_phantom(seed: int, patient: int, lesion: str | None = None, height: int = 256, width: int = 512) -> Phantom:
    """Draw one radiograph of a patient, healthy or with one lesion.

    The same (seed, patient, height, width) gives the same anatomy and noise whatever the lesion. Raises UsageError for an unknown lesion.
    """
    if lesion is not None and lesion not in LESIONS:
        raise UsageError(f"unknown lesion {lesion!r}: use one of {', '.join(LESIONS)}")
    stream = partial(_stream, seed, patient)
    person = sample_patient(stream(0))
    canvas = Canvas(person, height, width)
    healthy = draw_anatomy(person, canvas, stream(1))
    scene = healthy
    if lesion is not None:
        scene = DRAW[lesion](person, canvas, healthy, stream(3 + LESIONS.index(lesion)), stream(1))
    grain = gaussian_filter(stream(2).standard_normal((height, width)), 0.45).astype(np.float32)
    clean, normal = expose(scene, person, canvas), expose(healthy, person, canvas)
    mask = np.abs(develop(clean, person) - develop(normal, person)) > MASK_THRESHOLD
    # Quantum noise: the fewer photons pass, the larger the relative error, hence exp(attenuation / 2).
    noisy = clean + person.numbers["noise"] * np.exp(np.minimum(clean, 2) / 2) * grain
    return Phantom(develop(noisy, person), mask, lesion, f"PHANTOM^{patient:04d}")


def _stream(seed: int, patient: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, patient, purpose])


def expose(scene: Scene, patient: Patient, canvas: Canvas) -> np.ndarray:
    """Attenuation (H, W) as the scanner sees it: summed over the layers and blurred."""
    blur = patient.numbers["blur"]
    return gaussian_filter(scene.total, (blur * canvas.height, blur * canvas.width / 2), truncate=3)


def develop(attenuation: np.ndarray, patient: Patient) -> np.ndarray:
    """Display curve from attenuation to grey in [0, 1]: window, gamma, and a shoulder that saturates on metal."""
    n = patient.numbers
    grey = np.clip((attenuation + 0.02 + n["exposure"]) * 0.74 * n["contrast"], 0, None) ** n["gamma"]
    return (grey / (1 + grey**5) ** 0.2).astype(np.float32)


def choose(rng: np.random.Generator, teeth: list[Tooth]) -> Tooth:
    """One of the teeth, each as likely."""
    return teeth[rng.integers(len(teeth))]


def copy_scene(scene: Scene) -> Scene:
    """A copy to draw a lesion into; the base is shared, nothing draws into it."""
    return Scene(scene.base, scene.bone.copy(), scene.teeth.copy(), scene.metal.copy())


def blob(
    canvas: Canvas,
    centre: np.ndarray,
    radii: tuple[float, float],
    angle: float = 0.0,
    edge: float = 0.0,
    lobes: np.ndarray | None = None,
) -> np.ndarray:
    """Soft ellipse (H, W): 1 inside, falling to 0 over `edge` (never less than a pixel); `lobes` (3,) make it uneven."""
    dx, dy = canvas.x - centre[0], canvas.y - centre[1]
    u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    radius = np.hypot(u / radii[0], v / radii[1])
    if lobes is not None:
        around = np.arctan2(v, u)
        radius = radius * (1 + sum(a / k * np.cos((k + 1) * around) for k, a in enumerate(lobes, 1)))
    return np.clip(0.5 + (1 - radius) * min(radii) / max(edge, canvas.edge), 0, 1)


def draw_caries(
    patient: Patient, canvas: Canvas, healthy: Scene, rng: np.random.Generator, texture: np.random.Generator
) -> Scene:
    """A dark notch where two crowns meet, eaten into enamel and dentine."""
    scene = copy_scene(healthy)
    tooth = choose(
        rng,
        [t for t in patient.teeth if 3 <= t.position <= 7 and not t.crowned and t.filling is None]
        or list(patient.teeth),
    )
    radius = rng.uniform(0.015, 0.024)
    side = rng.choice([-1, 1]) * (tooth.half_width - 0.35 * radius)
    centre, radii = tooth.at(rng.uniform(0.35, 0.65) * tooth.crown, side), (radius, rng.uniform(0.8, 1.3) * radius)
    notch = blob(canvas, centre, radii, tooth.angle, 0.008, rng.normal(0, 0.06, 3))
    depth, across = tooth.local(canvas.x, canvas.y)
    inside = canvas.soft(outline(tooth, depth, across)[1] + 0.002)
    scene.teeth *= 1 - rng.uniform(0.75, 0.95) * notch * inside
    return scene


def draw_periapical(
    patient: Patient, canvas: Canvas, healthy: Scene, rng: np.random.Generator, texture: np.random.Generator
) -> Scene:
    """A dark round patch with a fuzzy border around a root tip."""
    scene = copy_scene(healthy)
    tooth = choose(rng, [t for t in patient.teeth if t.position <= 7])
    centre = apex(tooth, rng.integers(len(tooth.roots)))
    radius = rng.uniform(0.026, 0.042)
    patch = blob(
        canvas, centre, (radius, radius * rng.uniform(0.85, 1.2)), rng.uniform(0, 3), 0.022, rng.normal(0, 0.05, 3)
    )
    scene.bone -= patch * (rng.uniform(0.55, 0.8) * scene.bone.clip(0) + rng.uniform(0.09, 0.14))
    return scene


def draw_cyst(
    patient: Patient, canvas: Canvas, healthy: Scene, rng: np.random.Generator, texture: np.random.Generator
) -> Scene:
    """A large dark oval with a thin bright rim in the body or the angle of the lower jaw."""
    scene = copy_scene(healthy)
    side, radii = rng.choice([-1, 1]), rng.uniform((0.075, 0.062), (0.115, 0.085))
    along = rng.uniform(0.15, 0.68) * patient.numbers["size"]
    border = np.interp(along, (0, 0.3, 0.45, 0.58, 0.7, 0.8), (0.90, 0.86, 0.805, 0.74, 0.66, 0.57))
    centre, angle = np.array([side * along, border - radii[1] - 0.015]), -side * np.interp(along, (0, 0.7), (0.1, 0.75))
    lobes = rng.normal(0, 0.025, 3)
    hole, around = (blob(canvas, centre, tuple(radii + grow), angle, 0.006, lobes) for grow in (0, 0.009))
    scene.bone -= hole * (rng.uniform(0.7, 0.9) * scene.bone.clip(0) + 0.10) - rng.uniform(0.10, 0.18) * (around - hole)
    scene.teeth *= 1 - 0.35 * hole
    return scene


def draw_impacted(
    patient: Patient, canvas: Canvas, healthy: Scene, rng: np.random.Generator, texture: np.random.Generator
) -> Scene:
    """A whole tooth lying across the bone: a third molar behind its neighbour, or another tooth below or above the row."""
    scene = copy_scene(healthy)
    free = [t for t in patient.missing if t.position == 8 and not t.upper]
    if free:
        model = choose(rng, free)
        place = np.array([model.x * rng.uniform(1.05, 1.12), model.y + rng.uniform(0.02, 0.06)])
        turn = -np.sign(model.x) * rng.uniform(0.7, 1.5)
        start = replace(model, x=place[0], y=place[1] + model.crown, angle=-turn)
    else:
        model = choose(rng, [t for t in patient.teeth if not t.upper and 3 <= t.position <= 5])
        turn = rng.choice([-1, 1]) * rng.uniform(1.0, 1.45)
        middle = model.at(model.crown + model.root + 0.035, 0.0)
        start = replace(model, angle=turn)
        start = replace(
            start,
            x=middle[0] - start.axis[0] * 0.5 * (model.crown + model.root),
            y=middle[1] - start.axis[1] * 0.5 * (model.crown + model.root),
        )
    tooth = replace(start, filling=None, crowned=False, root_filled=False)
    follicle = blob(
        canvas,
        tooth.at(0.45 * tooth.crown, 0),
        (tooth.half_width + 0.011, tooth.crown * 0.62 + 0.008),
        tooth.angle,
        0.008,
    )
    scene.bone -= follicle * 0.4 * scene.bone.clip(0)
    draw_tooth(scene, canvas, patient, tooth)
    return scene


def draw_implant(
    patient: Patient, canvas: Canvas, healthy: Scene, rng: np.random.Generator, texture: np.random.Generator
) -> Scene:
    """A threaded screw where a tooth is missing (or takes its place), with or without a crown."""
    sites = [t for t in patient.missing if t.position <= 7]
    tooth = choose(rng, sites or [t for t in patient.teeth if 3 < t.position <= 7])
    keeps = tuple(t for t in patient.teeth if t is not tooth)
    scene = copy_scene(healthy) if sites else draw_anatomy(replace(patient, teeth=keeps), canvas, texture)
    box = tooth_window(canvas, tooth)
    depth, side = tooth.local(canvas.x[box], canvas.y[box])
    neck, length, half = tooth.crown, rng.uniform(0.085, 0.11), rng.uniform(0.014, 0.019)
    along = np.clip((depth - neck) / length, 0, 1)
    thread = 0.003 * np.abs(np.sin(np.pi * (depth - neck) / (2 * MM)))
    screw = np.minimum(
        half * (1 - 0.35 * along**2) + thread - np.abs(side), np.minimum(depth - neck + 0.004, neck + length - depth)
    )
    metal = 1.3 * canvas.soft(screw)
    if rng.random() < 0.6:
        abutment = np.minimum(0.75 * half - np.abs(side), np.minimum(depth - 0.4 * tooth.crown, neck + 0.01 - depth))
        metal = np.maximum(
            metal, np.maximum(1.1 * canvas.soft(abutment), 0.8 * canvas.soft(outline(tooth, depth, side)[1]))
        )
    scene.metal[box] = np.maximum(scene.metal[box], metal)
    return scene


def draw_bone_loss(
    patient: Patient, canvas: Canvas, healthy: Scene, rng: np.random.Generator, texture: np.random.Generator
) -> Scene:
    """The alveolar crest withdrawn along several neighbouring teeth: the bone between their roots is gone."""
    scene = copy_scene(healthy)
    tooth = choose(rng, [t for t in patient.teeth if 2 <= t.position <= 7])
    reach, drop = rng.uniform(0.10, 0.17), rng.uniform(0.045, 0.075)
    x = np.linspace(tooth.x - reach, tooth.x + reach, 61)
    profile = drop * (1 - ((x - tooth.x) / reach) ** 4) * (1 + 0.18 * np.sin(60 * x + rng.uniform(0, 6)))
    edge = np.stack([x, patient.crest(x, tooth.upper, -0.012)], 1)
    bottom = np.stack([x, patient.crest(x, tooth.upper, profile.clip(-0.01))], 1)
    region = canvas.fill(np.concatenate([edge, bottom[::-1]]), 0.003)
    scene.bone -= region * (rng.uniform(0.8, 0.95) * scene.bone.clip(0) + 0.09)
    return scene


DRAW = dict(
    zip(LESIONS, (draw_caries, draw_periapical, draw_cyst, draw_impacted, draw_implant, draw_bone_loss), strict=True)
)


def write_dicom(path: str | Path, phantom: Phantom) -> None:
    """Write a 12-bit MONOCHROME2 panoramic radiograph (modality PX); the same phantom gives the same bytes."""
    pixels = np.round(phantom.image * 4095).astype("<u2")
    rows, columns = pixels.shape
    uids = [
        generate_uid(entropy_srcs=[kind, phantom.patient, pixels.tobytes().hex()])
        for kind in ("study", "series", "instance")
    ]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = DigitalXRayImageStorageForPresentation, uids[2]
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = generate_uid(entropy_srcs=["dental normalizer phantom"])
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.StudyInstanceUID, data.SeriesInstanceUID, data.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        *uids,
    )
    data.Modality, data.PresentationIntentType, data.ImageType = "PX", "FOR PRESENTATION", ["DERIVED", "PRIMARY", ""]
    data.PatientName, data.PatientID, data.PatientBirthDate, data.PatientSex = phantom.patient, phantom.patient, "", ""
    data.StudyDate, data.StudyTime, data.StudyID, data.SeriesNumber, data.InstanceNumber, data.AccessionNumber = (
        "",
        "",
        "1",
        1,
        1,
        "",
    )
    data.Manufacturer, data.ReferringPhysicianName, data.BodyPartExamined, data.PatientOrientation = (
        "Phantom",
        "",
        "JAW",
        ["L", "F"],
    )
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = rows, columns, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.PixelSpacing = data.ImagerPixelSpacing = [
        f"{DETECTOR_HEIGHT / rows:.6f}",
        f"{2 * DETECTOR_HEIGHT / columns:.6f}",
    ]
    data.WindowCenter, data.WindowWidth, data.PixelIntensityRelationship, data.PixelIntensityRelationshipSign = (
        2047.5,
        4096,
        "LOG",
        1,
    )
    data.RescaleIntercept, data.RescaleSlope, data.RescaleType, data.PresentationLUTShape = 0, 1, "US", "IDENTITY"
    data.PixelData = pixels.tobytes()
    data.save_as(path, enforce_file_format=True)


def write_dataset(out: str | Path, train: int, val: int, test_normal: int, test_per_lesion: int, seed: int = 0, height: int = 256, width: int = 512,
                  file_format: Literal["dicom", "png"] = "dicom", workers: int | None = None) -> Path:  # fmt: skip
    """Write images, masks and manifest.csv below `out`; returns the path of the manifest.

    Train and val hold normals only. Test holds normals and, from test patients again, lesions; no patient lies in two splits.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: give --out a folder")
    if min(train, val, test_normal, test_per_lesion, seed) < 0:
        raise UsageError("the numbers of radiographs and the seed must not be negative")
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    plan = [("train", i, i, None) for i in range(train)] + [("val", i, train + i, None) for i in range(val)]
    plan += [("test", i, train + val + i, None) for i in range(test_normal)]
    plan += [("test", i, train + val + i, lesion) for lesion in LESIONS for i in range(test_per_lesion)]
    work = partial(_write_one, out, seed, height, width, file_format)
    processes = min(workers or os.cpu_count() or 1, max(1, len(plan)))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        mapped = map(work, plan) if processes == 1 else pool.map(work, plan, chunksize=4)
        rows = list(tqdm(mapped, total=len(plan), desc="phantoms", unit="image"))
    manifest = out / "manifest.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "split", "label", "kind", "mask", "patient"])
        writer.writerows(rows)
    return manifest


def _write_one(
    out: Path, seed: int, height: int, width: int, file_format: str, item: tuple[str, int, int, str | None]
) -> list[str | int]:
    """Draw and write one line of the manifest."""
    split, index, patient, lesion = item
    phantom = draw_phantom(seed, patient, lesion, height, width)
    name = f"{split}_{lesion or 'normal'}_{index:04d}" if split == "test" else f"{split}_{index:04d}"
    image = f"images/{name}.{'dcm' if file_format == 'dicom' else 'png'}"
    if file_format == "dicom":
        write_dicom(out / image, phantom)
    else:
        Image.fromarray(np.round(phantom.image * 255).astype(np.uint8)).save(out / image)
    mask = f"masks/{name}.png" if lesion else ""
    if lesion:
        Image.fromarray(phantom.mask.astype(np.uint8) * 255).save(out / mask)
    return [image, split, int(lesion is not None), lesion or "normal", mask, phantom.patient]


def main(
    out: Path = Path("./data/phantom"), train: int = 400, val: int = 60, test_normal: int = 60, test_per_lesion: int = 30, height: int = 256, width: int = 512,
    seed: int = 0, file_format: Annotated[Literal["dicom", "png"], tyro.conf.arg(name="format")] = "dicom", workers: int | None = None,
) -> None:  # fmt: skip
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
    try:
        manifest = write_dataset(
            out, train, val, test_normal, test_per_lesion, seed, height, width, file_format, workers
        )
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {train + val + test_normal + test_per_lesion * len(LESIONS)} radiographs and {manifest}")


if __name__ == "__main__":
    tyro.cli(main)
