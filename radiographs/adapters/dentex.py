"""Leaf: DENTEX (MICCAI 2023), panoramics of three clinics with teeth marked as abnormal.

Layout, from the card of ibrahimhamamci/DENTEX at Hugging Face and from public code that reads the unpacked zips:

    training_data/quadrant/xrays/                        train_quadrant.json beside it: quadrants only
    training_data/quadrant_enumeration/xrays/            train_quadrant_enumeration.json: and tooth numbers
    training_data/quadrant-enumeration-disease/xrays/    train_quadrant_enumeration_disease.json: and diagnoses
    training_data/unlabelled/xrays/
    validation_data/quadrant_enumeration_disease/xrays/  validation_triple.json, anywhere
    test_data/disease/input/                             ../label/NAME.json, one of LabelMe's for each image

The JSON files are COCO's with three categories for each annotation: category_id_1 (quadrant), category_id_2 (tooth) and
category_id_3 (diagnosis), ids of the lists categories_1 to categories_3. Labels of the test are GROUP-WORD-TOOTH with
the clinicians' own Turkish words, which are translated here; sources differ on which of the four diagnoses two of them
stand for, so that none is put in another's place.
"""

from collections import defaultdict
from pathlib import Path

from radiographs.adapters.drawing import box_of, flat_polygon_of, polygon_of, size_of
from radiographs.adapters.rows import About, Box, Polygon, Row, find, kind_of, layout_missing, read_json, understood
from radiographs.reading import find_radiographs

ABOUT = About(
    title="DENTEX: abnormal teeth with numbers and diagnoses (MICCAI 2023)",
    licence="CC BY-NC-SA 4.0",
    citation="Hamamci et al. DENTEX: An Abnormal Tooth Detection with Dental Enumeration and Diagnosis Benchmark for "
    "Panoramic X-rays. arXiv:2305.19112, 2023",
    normal="no tooth marked as caries, deep caries, impacted or with a periapical lesion (in the test: none marked, or "
    "all of those marked called sound); nobody looked for anything else. The parts quadrant, quadrant_enumeration "
    "and unlabelled were never looked at for diagnoses: their label is empty",
    marks="the whole abnormal tooth, not the lesion",
)
UNDIAGNOSED = ("quadrant", "quadrant_enumeration", "unlabelled")
DISEASES = "train_quadrant_enumeration_disease.json"
COCO = "COCO's images, annotations (bbox: four numbers, segmentation: lists of x, y, x, y, ...) and categories_3"
LABELME = "LabelMe's shapes (label: GROUP-WORD-TOOTH, points: [[x, y], ...]), imageHeight and imageWidth"
SOUND = "saglam"
WORDS = {
    "çürük": "caries",
    "gömülü": "impacted",
    "lezyon": "periapical lesion",
    "küretaj": "curettage",
    "kanal": "root canal",
    "çekim": "extraction",
    "kırık": "fracture",
}


def rows(folder: Path) -> list[Row]:
    """Every radiograph of the parts that are there; UsageError if none is."""
    found = [row for part in UNDIAGNOSED for row in _undiagnosed(folder, part)]
    training, validation = find(folder, DISEASES), find(folder, "validation_triple.json")
    if training:
        found += _diagnosed(training, training.parent / "xrays", "train")
    if validation:
        images = find(folder, "validation_data/quadrant_enumeration_disease/xrays")
        found += _diagnosed(validation, images or validation.parent / "xrays", "val")
    labels = find(folder, "disease/label")
    if labels:
        found += _tested(labels)
    if not found:
        raise layout_missing(folder, "DENTEX", "training_data/, validation_data/ or test_data/, unpacked from the zips")
    return found


def _undiagnosed(folder: Path, part: str) -> list[Row]:
    images = find(folder, f"training_data/{part}/xrays")
    return [Row(path, "train") for path in find_radiographs(images)] if images else []


def _diagnosed(annotation: Path, images: Path, split: str) -> list[Row]:
    """A part whose abnormal teeth were marked, in COCO's layout."""
    content = read_json(annotation)
    with understood(annotation, "dentex", COCO):
        names = {category["id"]: category["name"] for category in content["categories_3"]}
        teeth = defaultdict(list)
        for tooth in content["annotations"]:
            teeth[tooth["image_id"]].append(tooth)
        return [_row(images, entry, teeth[entry["id"]], names, split) for entry in content["images"]]


def _row(images: Path, entry: dict, teeth: list[dict], names: dict[int, str], split: str) -> Row:
    outlines = [_rings(tooth.get("segmentation")) for tooth in teeth]
    return Row(
        image=images / entry["file_name"],
        split=split,
        label=int(bool(teeth)),
        kind=kind_of(names[tooth["category_id_3"]] for tooth in teeth),
        boxes=tuple(box_of(tooth["bbox"]) for tooth, rings in zip(teeth, outlines, strict=True) if not rings),
        polygons=tuple(ring for rings in outlines for ring in rings),
        size=size_of(entry["height"], entry["width"]),
    )


def _rings(segmentation: object) -> list[Polygon]:
    """The outlines of a tooth; none where it has but a box: [], [[]], null or a run-length code."""
    return [flat_polygon_of(ring) for ring in segmentation if ring] if isinstance(segmentation, list) else []


def _tested(labels: Path) -> list[Row]:
    """The test: an image in input/ for each JSON in label/."""
    images = {path.stem: path for path in find_radiographs(labels.parent / "input")}
    found = []
    for path in sorted(labels.glob("*.json")):
        content = read_json(path)
        with understood(path, "dentex", LABELME):
            image = images.get(path.stem, labels.parent / "input" / f"{path.stem}.png")
            found.append(_tested_row(image, content))
    return found


def _tested_row(image: Path, content: dict) -> Row:
    shapes = [(shape["label"].split("-")[-2], polygon_of(shape["points"])) for shape in content["shapes"]]
    teeth = [(word, points) for word, points in shapes if word != SOUND]
    return Row(
        image=image,
        split="test",
        label=int(bool(teeth)),
        kind=kind_of(WORDS.get(word, word) for word, _ in teeth),
        boxes=tuple(_box(*points) for _, points in teeth if len(points) == 2),
        polygons=tuple(points for _, points in teeth if len(points) > 2),
        size=size_of(content["imageHeight"], content["imageWidth"]),
    )


def _box(one: tuple[float, float], other: tuple[float, float]) -> Box:
    """LabelMe's rectangle, two opposite corners."""
    (left, right), (top, bottom) = (sorted(pair) for pair in zip(one, other, strict=True))
    return left, top, right - left, bottom - top
