"""Leaf: whether two radiographs are one picture, whatever their format, size, compression or exposure.

A difference hash (Krawetz 2013): which of two neighbours in a 16 x 17 thumbnail is brighter. tests/test_likeness.py has
how far apart patients and copies are.
"""

from collections.abc import Iterator

import cv2
import numpy as np

SIDE = 16
MOST = 16  # of 256 signs that may differ between copies of one picture
FEWEST = 32  # signs of each kind that a picture shows
AT_ONCE = 2**20  # pairs compared at once
SET_BITS = np.array([number.bit_count() for number in range(256)], np.uint8)


def fingerprint(image: np.ndarray) -> np.ndarray:
    """The signs of an image (H, W), packed, uint8 (32,)."""
    thumbnail = cv2.resize(image.astype(np.float32), (SIDE + 1, SIDE), interpolation=cv2.INTER_AREA)
    return np.packbits(thumbnail[:, 1:] > thumbnail[:, :-1])


def twins(prints: np.ndarray) -> Iterator[tuple[int, int]]:
    """The pairs of fingerprints (N, 32) that are of one picture, the first before the second.

    A flat picture, with next to no sign one way or the other, is nobody's twin.
    """
    (telling,) = np.nonzero(_tells(prints))
    prints, first = prints[telling], 0
    while first < len(prints):
        rows = max(1, AT_ONCE // (len(prints) - first))
        differ = _differences(prints[first : first + rows], prints[first:])
        for one, other in np.argwhere(differ <= MOST):
            if one < other:
                yield int(telling[first + one]), int(telling[first + other])
        first += rows


def looks_like_one_of(one: np.ndarray, others: np.ndarray) -> bool:
    """Whether the fingerprint (32,) is of a picture that one of the others (N, 32) is of, too.

    Mirrored or with black for white it still is.
    """
    mirrored = np.packbits(np.unpackbits(one).reshape(SIDE, SIDE)[:, ::-1])  # and its signs turn
    variants = np.stack([one, ~one, mirrored, ~mirrored])
    return bool(_tells(one[None])[0] and (_differences(variants, others) <= MOST).any())


def _tells(prints: np.ndarray) -> np.ndarray:
    """Whether there is enough to see, bool (N,)."""
    signs = SET_BITS[prints].sum(axis=1, dtype=int)
    return (signs >= FEWEST) & (signs <= 8 * prints.shape[1] - FEWEST)


def _differences(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How many signs differ, uint16 (N, M)."""
    if hasattr(np, "bitwise_count"):  # from numpy 2.0 on
        ones, others = (np.ascontiguousarray(part).view(np.uint64) for part in (ones, others))
        count = np.bitwise_count
    else:
        count = SET_BITS.__getitem__
    total = np.zeros((len(ones), len(others)), np.uint16)
    for word in range(ones.shape[1]):
        total += count(ones[:, word, None] ^ others[None, :, word])
    return total
