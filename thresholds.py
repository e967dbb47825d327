"""Where a threshold lies that only so many normals exceed, and how far the rate on new normals may be off.

Something is flagged if its value > threshold.
"""

import math

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

PART = 2**23  # values that are looked at together


def threshold_from_normals(values: ArrayLike, fpr: float) -> float:
    """The smallest threshold with at most the share fpr of the normal values above it; flag what is > threshold.

    Of n values it is the k-th highest but for k = floor(fpr n) above it, so with n < 1 / fpr it is their maximum. A
    new normal exceeds it with probability (k + 1) / (n + 1) on average, somewhat more than fpr;
    `false_positive_interval` says how far that may be off.
    """
    values = np.asarray(values).ravel()
    if not 0 <= fpr < 1:
        raise ValueError(f"the false-positive rate must lie in [0, 1), got {fpr}")
    parts = [values[first : first + PART] for first in range(0, values.size, PART)]  # more than fit in memory, perhaps
    if not parts or not all(np.isfinite(part).all() for part in parts):
        raise ValueError("a threshold needs finite values of at least one normal image: give validation normals")
    highest, wanted = values[:0], 1 + _allowed_above(values.size, fpr)
    for part in parts:
        known = np.concatenate([highest, part])
        rank = max(0, known.size - wanted)
        highest = np.partition(known, rank)[rank:]
    return float(highest.min())


def expected_false_positive_rate(n_normals: int, fpr: float) -> float:
    """The mean share of new normals above the threshold that `threshold_from_normals` sets from n: (k + 1) / (n + 1).

    k = floor(fpr n); the mean of the Beta distribution of `false_positive_interval`.
    """
    return (_allowed_above(n_normals, fpr) + 1) / (n_normals + 1)


def false_positive_interval(n_normals: int, fpr: float, confidence: float = 0.95) -> tuple[float, float]:
    """Where the true false-positive rate lies if `threshold_from_normals` set the threshold from n independent normals.

    With k = floor(fpr n), a continuous score exceeds its (n - k)-th order statistic with a probability that is itself
    random, Beta(k + 1, n - k) (David & Nagaraja 2003, Order Statistics, 2.5; Vovk 2012, Conditional validity of
    inductive conformal predictors); ties only lower it. For image scores, one per patient: pixels of one image are not
    independent.
    """
    if n_normals < 1 or not 0 <= fpr < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"needs n_normals >= 1, fpr in [0, 1), confidence in (0, 1), got {n_normals}, {fpr}, {confidence}"
        )
    k = _allowed_above(n_normals, fpr)
    low, high = scipy.stats.beta.ppf([(1 - confidence) / 2, (1 + confidence) / 2], k + 1, n_normals - k)
    return float(low), float(high)


def _allowed_above(n: int, fpr: float) -> int:
    return math.floor(fpr * n + 1e-9)  # 0.29 * 100 is 28.999...
