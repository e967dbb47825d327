"""Leaf: two folders of one's own: radiographs that are normal, and radiographs to test."""

from pathlib import Path

from checks import UsageError
from radiographs.adapters.rows import About, Row
from radiographs.reading import find_radiographs

ABOUT = About(
    title="two folders of your own: normals, and radiographs to test",
    licence="yours to know",
    citation="yours to know",
    normal="whatever you put into the folder of normals",
    marks="nothing",
    names_patients=True,
)


def rows(normals: Path, test: Path, kinds: bool = False) -> list[Row]:
    """The normals as split train, the others as split test, of which nothing is known.

    With `kinds` the folders right below `test` are kinds, such as normal/ and cyst/. UsageError if one of the two is
    missing or lies in the other.
    """
    for folder in (normals, test):
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder: name the folder of normals, then the folder to test")
    inside = test.resolve(), normals.resolve()
    if inside[0].is_relative_to(inside[1]) or inside[1].is_relative_to(inside[0]):
        raise UsageError(f"{test} and {normals} lie in each other: normals and tests need a folder each")
    trained = [Row(path, "train", 0, "normal") for path in find_radiographs(normals)]
    tested = [_row(path, test, kinds) for path in find_radiographs(test)]
    for folder, listed in ((normals, trained), (test, tested)):
        if not listed:
            raise UsageError(f"{folder} holds no radiographs: put some there")
    return trained + tested


def _row(path: Path, test: Path, kinds: bool) -> Row:
    parts = path.relative_to(test).parts
    if not kinds or len(parts) == 1:
        return Row(path, "test")
    kind = parts[0].strip().lower()  # as a manifest is read
    return Row(path, "test", int(kind != "normal"), kind)
