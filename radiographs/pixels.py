"""Leaf: what all kinds of files have in common: the sizes that are read, and colour to grey."""

import numpy as np

MIN_SIDE = 16  # pixels; anything smaller is an icon
# A panoramic has 2 to 10 million, a scanned film 25; beyond this a file is broken or hostile. Reading takes some 30
# bytes of memory for each.
MAX_PIXELS = 40_000_000
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
FIRST_FRAME_ONLY = "a file has {} frames, only the first is read"  # unnamed: a file name may be a patient's


def check_size(height: int, width: int) -> None:
    """Refuse a size no radiograph has, before memory is allocated for it."""
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"{height} x {width} pixels are too few: at least {MIN_SIDE} a side")
    if height * width > MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels are too many: at most {MAX_PIXELS // 10**6} million")


def luma(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3 or more), alpha ignored -> float (H, W). A matrix product would round as the memory happens to lie."""
    red, green, blue = (rgb[..., channel] * LUMA[channel] for channel in range(3))
    return red + green + blue
