"""Leaf: the geometry between the size of a radiograph's file and the size of the model, there and back.

Shapes are (H, W) in pixels, rows first, y down: H W of the file, height width of the model. The fit "stretch" squashes
to the size of the model, "pad" keeps the aspect ratio and centres the radiograph on black.
"""

import cv2
import numpy as np


def fit_image(x: np.ndarray, height: int, width: int, fit: str) -> np.ndarray:
    """Bring x, (H, W) in [-1, 1], to the size of the model -> float32 (height, width), -1 where "pad" adds."""
    return _framed(x, _content_box(x.shape, height, width, fit), (height, width))


def fit_detail(
    x: np.ndarray, height: int, width: int, fit: str, times: int, finest: tuple[int, int] | None = None
) -> np.ndarray:
    """x, (H, W) in [-1, 1], `times` as large as the model's size -> float32 (times height, times width) in [-1, 1].

    The means of its times x times cells are what fit_image gives, whatever the size of the file: an enlargement alone
    would be blurred once it is averaged, and G would see other radiographs than it was trained on. What is finer than
    a file of `finest` rows and columns could show is left out of the cells.
    """
    fitted = fit_image(x, height, width, fit)
    if times == 1:
        return fitted
    means, box = fitted[:, None, :, None], _content_box(x.shape, height, width, fit, times)
    if finest is not None:
        x = _resize(x, *map(min, x.shape, finest))
    cells = _framed(x, box, (times * height, times * width)).reshape(height, times, width, times)
    apart = cells - cells.mean(axis=(1, 3), keepdims=True)
    highest, lowest = (end(apart, axis=(1, 3), keepdims=True) for end in (np.max, np.min))
    room = np.minimum((1 - means) / np.maximum(highest, 1e-6), (1 + means) / np.maximum(-lowest, 1e-6))
    return np.clip(means + np.clip(room, 0, 1) * apart, -1, 1).reshape(times * height, times * width)


def fit_mask(mask: np.ndarray, height: int, width: int, fit: str, times: int = 1) -> np.ndarray:
    """Bring a mask, bool (H, W), to `times` the model's size by maximum -> bool (times height, times width).

    Every marked pixel stays visible, however small the lesion; what "pad" adds is unmarked.
    """
    top, left, rows, columns = _content_box(mask.shape, height, width, fit, times)
    fitted = np.zeros((times * height, times * width), bool)
    fitted[top : top + rows, left : left + columns] = _max_resize(_max_resize(mask, rows, axis=0), columns, axis=1)
    return fitted


def unfit_map(anomaly_map: np.ndarray, original_shape: tuple[int, int], fit: str, times: int = 1) -> np.ndarray:
    """Bring a map in any unit, (times height, times width), back to its radiograph -> float32 original_shape = (H, W).

    The border that "pad" added is cut off. Values are interpolated, or averaged where the file is smaller.
    """
    height, width = (size // times for size in anomaly_map.shape)
    top, left, rows, columns = _content_box(original_shape, height, width, fit, times)
    return _resize(anomaly_map[top : top + rows, left : left + columns], *original_shape)


def content(original_shape: tuple[int, int], height: int, width: int, fit: str, times: int = 1) -> tuple[slice, slice]:
    """Which rows and columns of an image or a map of (times height, times width) show the radiograph.

    The others are what "pad" added: they say nothing of it, and a rate or a mean that hears them is flattered.
    """
    top, left, rows, columns = _content_box(original_shape, height, width, fit, times)
    return slice(top, top + rows), slice(left, left + columns)


def _framed(x: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """x, (H, W), brought to its box in a black frame -> float32 of this size."""
    top, left, rows, columns = box
    frame = np.full(size, -1, np.float32)
    frame[top : top + rows, left : left + columns] = _resize(x, rows, columns)
    return frame


def _content_box(
    original_shape: tuple[int, int], height: int, width: int, fit: str, times: int = 1
) -> tuple[int, int, int, int]:
    """Where a radiograph of original_shape = (H, W) lies in the frame, `times` enlarged -> top, left, rows, columns.

    Rounded at the size of the model, so that an enlargement covers the very pixels that it enlarges.
    """
    if fit == "stretch":
        return 0, 0, times * height, times * width
    scale = min(height / original_shape[0], width / original_shape[1])
    rows = min(height, max(1, round(original_shape[0] * scale)))
    columns = min(width, max(1, round(original_shape[1] * scale)))
    top, left = (height - rows) // 2, (width - columns) // 2
    return times * top, times * left, times * rows, times * columns


def _resize(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """(H, W) -> float32 (rows, columns): area mean along an axis that shrinks, linear along one that grows.

    One axis after the other, since OpenCV's area mode knows no mixture; the one that shrinks first where the other
    grows, for a long and narrow file would fill the memory.
    """
    x = np.ascontiguousarray(x, np.float32)
    narrows_first = rows > x.shape[0] and columns < x.shape[1]
    for size in ((columns, x.shape[0]) if narrows_first else (x.shape[1], rows), (columns, rows)):
        shrinks = size[0] * size[1] < x.size
        x = cv2.resize(x, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return x


def _max_resize(mask: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Bring one axis of a bool (H, W) to `size` pixels.

    Each is the maximum over the source pixels whose centre falls into it; where the axis grows, the pixel beneath it.
    """
    source = mask.shape[axis]
    if size >= source:
        return np.take(mask, (2 * np.arange(size) + 1) * source // (2 * size), axis)
    starts = np.ceil(np.arange(size) * source / size - 0.5).astype(int)
    return np.logical_or.reduceat(mask, starts, axis)
