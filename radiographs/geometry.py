"""Leaf: the geometry between the size of a radiograph's file and the size of the model, there and back.

Shapes are (H, W), rows first, y down. "stretch" squashes to the size of the model, "pad" keeps the aspect ratio on black.
"""

import cv2
import numpy as np


def fit_image(x: np.ndarray, height: int, width: int, fit: str) -> np.ndarray:
    """Bring x in [-1, 1], (H, W), to (height, width): "stretch" squashes, "pad" keeps the aspect ratio on black (-1) -> float32."""
    top, left, rows, columns = _content_box(x.shape, height, width, fit)
    fitted = np.full((height, width), -1, np.float32)
    fitted[top : top + rows, left : left + columns] = _resize(x, rows, columns)
    return fitted


def fit_mask(mask: np.ndarray, height: int, width: int, fit: str) -> np.ndarray:
    """Bring a bool mask (H, W) to (height, width) by maximum: every marked pixel stays visible, however small."""
    top, left, rows, columns = _content_box(mask.shape, height, width, fit)
    fitted = np.zeros((height, width), bool)
    fitted[top : top + rows, left : left + columns] = _max_resize(_max_resize(mask, rows, axis=0), columns, axis=1)
    return fitted


def unfit_map(anomaly_map: np.ndarray, original_shape: tuple[int, int], fit: str) -> np.ndarray:
    """Bring an anomaly map (height, width) back to the (H, W) of its radiograph, without the border "pad" added -> float32."""
    top, left, rows, columns = _content_box(original_shape, *anomaly_map.shape, fit)
    return _resize(anomaly_map[top : top + rows, left : left + columns], *original_shape)


def _content_box(original_shape: tuple[int, int], height: int, width: int, fit: str) -> tuple[int, int, int, int]:
    """Where the radiograph lies in the (height, width) frame: top, left, rows, columns."""
    if fit == "stretch":
        return 0, 0, height, width
    scale = min(height / original_shape[0], width / original_shape[1])
    rows, columns = (
        min(limit, max(1, round(side * scale))) for side, limit in zip(original_shape, (height, width), strict=True)
    )
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def _resize(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Area mean along an axis that shrinks, linear along one that grows; OpenCV's area mode knows no mixture -> float32."""
    x = np.ascontiguousarray(x, np.float32)
    for size in ((x.shape[1], rows), (columns, rows)):
        shrinks = size[0] * size[1] < x.size
        x = cv2.resize(x, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return x


def _max_resize(mask: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Maximum over the source pixels whose centre falls into each target pixel; where the axis grows, the pixel beneath."""
    source = mask.shape[axis]
    if size >= source:
        return np.take(mask, np.arange(size) * source // size, axis)
    starts = np.ceil(np.arange(size) * source / size - 0.5).astype(int)
    return np.logical_or.reduceat(mask, starts, axis)
