"""Leaf: what an adapter says of each radiograph of a public set, and how it finds its way in the set's folders."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checks import UsageError

Box = tuple[float, float, float, float]  # left, top, width, height, in pixels from the upper left corner
Polygon = tuple[tuple[float, float], ...]  # corners (x, y) in the same pixels
MISUNDERSTOOD = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Row:
    """One radiograph as the annotation of its set has it; nothing is known of what is left out."""

    image: Path
    split: str = ""  # of the set: train, val or test; "" where it gives none
    label: int | None = None  # 0 normal, 1 abnormal, None where the set says neither
    kind: str = ""  # "normal", or what was found
    boxes: tuple[Box, ...] = ()
    polygons: tuple[Polygon, ...] = ()
    mask: Path | None = None  # one that the set itself comes with
    size: tuple[int, int] | None = None  # rows and columns that the annotation was made for


@dataclass(frozen=True)
class About:
    """What whoever uses a set must know of it."""

    title: str
    licence: str
    citation: str
    normal: str  # what a label of 0 means there
    marks: str  # what a mask covers there
    names_patients: bool = False  # whether headers or folders may say whose a file is


def kind_of(names: Iterable[str]) -> str:
    """One kind for everything that was found in a radiograph: "caries + impacted"; "normal" for nothing."""
    return " + ".join(sorted({name.strip().lower() for name in names})) or "normal"


def find(folder: Path, ending: str) -> Path | None:
    """The file or folder below `folder` whose path ends so (quadrant/xrays), whatever zips put around it.

    None if there is none; UsageError if there are several, for they would be mixed up.
    """
    found = [path for path in sorted(folder.rglob(ending)) if not _is_hidden(path.relative_to(folder))]
    if len(found) > 1:
        raise UsageError(f"{folder} holds {ending} {len(found)} times: name the folder of one copy of the set")
    return found[0] if found else None


def read_json(path: Path) -> Any:
    """The content of an annotation; UsageError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise UsageError(f"{path} cannot be read as JSON (it is nested too deep): unpack the set again") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON ({error}): unpack the set again") from error


@contextmanager
def understood(path: Path, name: str, expected: str) -> Iterator[None]:
    """Within it, what an annotation has otherwise than the set of this name is a UsageError that names the file."""
    try:
        yield
    except MISUNDERSTOOD as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UsageError(
            f"{path} is not as {name} has it ({reason}): expected is {expected}; unpack the set again"
        ) from error


def layout_missing(folder: Path, name: str, wanted: str) -> UsageError:
    """The error for a folder that is not laid out as the set is."""
    return UsageError(f"{folder} is not laid out as {name} is: it needs {wanted}")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
