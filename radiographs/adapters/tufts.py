"""Leaf: Tufts Dental Database, panoramics of one dental school with abnormalities outlined by an expert.

Layout, from public code that reads the archive one gets on request at tdd.ece.tufts.edu:

    Radiographs/N.JPG       N is no gapless count
    Expert/expert.json      a list: {"External ID": "245.JPG", "Description": ..., "Label": {"objects": [
                            {"title": "Periapical", "polygons": [[[x, y], ...], ...], ...}]}}
    Segmentation/           teeth (teeth_bbox.json, teeth_polygon.json) and jaws: not used here
    Student/                the same abnormalities as a student saw them: not used here

Where nothing was found the title is "None" and the polygons are "none". Suffixes differ in case between the files. Some
outlines have one or two points and cover nothing.
"""

from pathlib import Path

from radiographs.adapters.drawing import polygon_of
from radiographs.adapters.rows import About, Row, find, kind_of, layout_missing, read_json, understood
from radiographs.reading import find_radiographs

ABOUT = About(
    title="Tufts Dental Database: abnormalities outlined by an expert",
    licence="on request to Tufts University, for academic research alone; not to be passed on",
    citation="Panetta et al. Tufts Dental Database: A Multimodal Panoramic X-ray Dataset for Benchmarking Diagnostic "
    "Systems. IEEE Journal of Biomedical and Health Informatics 26 (4), 2022, doi:10.1109/JBHI.2021.3117575",
    normal="the expert outlined nothing; caries, restorations and missing teeth were not what was looked for",
    marks="the abnormality as the expert outlined it",
)
NOTHING = ("none", "")
EXPECTED = "a list of {External ID, Label: {objects: [{title, polygons: [[[x, y], ...], ...]}]}}"


def rows(folder: Path) -> list[Row]:
    """Every file in Radiographs/; the set has no splits. UsageError if it or expert.json is missing."""
    radiographs, annotation = find(folder, "Radiographs"), find(folder, "Expert/expert.json")
    if not radiographs or not annotation:
        raise layout_missing(folder, "the Tufts Dental Database", "Radiographs/ and Expert/expert.json")
    content, images = read_json(annotation), find_radiographs(radiographs)
    with understood(annotation, "tufts", EXPECTED):
        records = {_number(record["External ID"]): record for record in content}
        return [_row(path, records.get(_number(path.name))) for path in images]


def _number(name: str) -> str:
    """245 of 245.JPG and of Radiographs/245.jpg."""
    return Path(name.replace("\\", "/")).stem


def _row(image: Path, record: dict | None) -> Row:
    if record is None:
        return Row(image)
    findings = [found for found in record["Label"]["objects"] if str(found["title"]).strip().lower() not in NOTHING]
    outlined = [found["polygons"] for found in findings if isinstance(found["polygons"], list)]
    rings = [polygon_of(ring) for polygons in outlined for ring in polygons if len(ring) > 2]
    kind = kind_of(str(found["title"]) for found in findings)
    return Row(image, label=int(bool(findings)), kind=kind, polygons=tuple(rings))
