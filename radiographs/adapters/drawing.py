"""Leaf: boxes and polygons of an annotation: read as numbers, and drawn as a mask."""

import math
from collections.abc import Iterable

import cv2
import numpy as np

from checks import UsageError
from radiographs.adapters.rows import Box, Polygon, Row

FARTHEST = 2**16  # pixels from the upper left corner; no corner of a tooth lies farther, and OpenCV would walk there
MOST_CORNERS = 10_000  # of all polygons of a radiograph: the time to fill them grows with the square of their number
MOST_SHAPES = 1_000  # of a radiograph


def number(value: object) -> float:
    """A finite number of an annotation, which may have come as text ("40"); ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"a number is expected, not {_shown(value)}")
    try:
        found = float(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"a number is expected, not {_shown(value)}") from error
    if not math.isfinite(found):
        raise ValueError(f"a finite number is expected, not {_shown(value)}")
    return found


def box_of(values: object) -> Box:
    """[left, top, width, height] in pixels; ValueError for anything but four numbers."""
    if not isinstance(values, list | tuple) or len(values) != 4:
        raise ValueError(f"a box of four numbers [left, top, width, height] is expected, not {_shown(values)}")
    left, top, width, height = map(number, values)
    return left, top, width, height


def polygon_of(points: Iterable) -> Polygon:
    """Corners [x, y] in pixels; ValueError for anything but pairs of numbers."""
    if not isinstance(points, list | tuple):
        raise ValueError(f"a list of corners [x, y] is expected, not {_shown(points)}")
    for point in points:
        if not isinstance(point, list | tuple) or len(point) != 2:
            raise ValueError(f"a corner of two numbers [x, y] is expected, not {_shown(point)}")
    return tuple((number(x), number(y)) for x, y in points)


def flat_polygon_of(values: object) -> Polygon:
    """The same from COCO's [x, y, x, y, ...]; ValueError for anything but an even count of numbers."""
    if not isinstance(values, list) or len(values) % 2:
        raise ValueError(f"an even count of numbers [x, y, x, y, ...] is expected, not {_shown(values)}")
    return polygon_of(list(zip(values[0::2], values[1::2], strict=True)))


def size_of(height: object, width: object) -> tuple[int, int]:
    """Rows and columns that an annotation was made for; ValueError for anything but whole numbers."""
    sides = number(height), number(width)
    if any(side != int(side) for side in sides):
        raise ValueError(f"a whole number of pixels is expected, not {_shown([height, width])}")
    return int(sides[0]), int(sides[1])


def draw(row: Row, shape: tuple[int, int]) -> np.ndarray | None:
    """What the boxes and polygons of a row cover, uint8 (H, W), 0 or 255; None if they cover nothing.

    A box covers every pixel that it touches, a polygon its corners rounded to pixels and its border. UsageError if the
    annotation was made for another size, or has what cannot be drawn: numbers that are not finite, corners more than
    FARTHEST pixels away, too many of them.
    """
    if row.size is not None and tuple(row.size) != tuple(shape):
        raise UsageError(
            f"{row.image.name} has {shape[0]} x {shape[1]} pixels and its annotation was made for {row.size[0]} x "
            f"{row.size[1]}: take the images of the set as they were published"
        )
    if len(row.boxes) + len(row.polygons) > MOST_SHAPES:
        raise _undrawable(row, f"{len(row.boxes) + len(row.polygons)} boxes and polygons", f"at most {MOST_SHAPES}")
    count = sum(map(len, row.polygons))
    if count > MOST_CORNERS:
        raise _undrawable(row, f"polygons of {count} corners", f"at most {MOST_CORNERS}")
    mask = np.zeros(shape, np.uint8)
    for box in row.boxes:
        left, top, width, height = _near(row, box, (4,))
        first, across = max(0, int(np.floor(top))), max(0, int(np.floor(left)))
        mask[first : max(0, int(np.ceil(top + height))), across : max(0, int(np.ceil(left + width)))] = 255
    for polygon in filter(len, row.polygons):
        corners = np.round(_near(row, polygon, (len(polygon), 2))).astype(np.int32)
        cv2.fillPoly(mask, [corners.reshape(-1, 1, 2)], 255)  # one by one: together, what lies twice inside is outside
    return mask if mask.any() else None


def _near(row: Row, values: tuple, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers as float64 of this shape."""
    try:
        found = np.array(values, np.float64).reshape(shape)
    except (TypeError, ValueError, OverflowError) as error:
        raise _undrawable(row, f"{_shown(values)}", "numbers, four of a box and two of a corner") from error
    if not (np.abs(found) <= FARTHEST).all():  # NaN is not
        raise _undrawable(row, f"{_shown(values)}", f"finite numbers of at most {FARTHEST} pixels")
    return found


def _undrawable(row: Row, has: str, expected: str) -> UsageError:
    return UsageError(
        f"the annotation of {row.image.name} has {has}, expected are {expected}: unpack the set again, or mend it"
    )


def _shown(value: object) -> str:
    """A value of an annotation in an error, cut short; what is nested too deep has no repr."""
    try:
        text = repr(value[:4] if isinstance(value, list | tuple) else value)
    except RecursionError:
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
