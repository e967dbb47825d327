"""How well anomalies are told from normals: per image, per pixel and per region, with the uncertainty of each.

Everywhere: higher score = more anomalous, label 1 (or mask True) = abnormal, and something is flagged if its value >
threshold. `maps` and `masks` are sequences of (H, W) arrays, or arrays (N, H, W). Pixel metrics pool the pixels of all
images; they are exact, over every distinct value and with ties counted as ties, never over a grid of thresholds. A
metric without anything to measure (one class only, no lesion pixel) is nan, and None in what `summarize` returns.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.integrate
import scipy.ndimage
import scipy.stats
from numpy.typing import ArrayLike, NDArray

EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Chance that an abnormal image scores above a normal one, ties counting one half (Mann-Whitney U).

    nan with one class only.
    """
    positives, negatives = _split(scores, labels)
    if len(positives) == 0 or len(negatives) == 0:
        return math.nan
    negatives = np.sort(negatives)
    below, not_above = (np.searchsorted(negatives, positives, side) for side in ("left", "right"))
    return float((below + not_above).mean() / (2 * len(negatives)))


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Sum of precision times the gain in recall, over every distinct score (as in scikit-learn).

    nan with one class only.

    Its chance level is the share of abnormal images.
    """
    positives, negatives = _split(scores, labels)
    if len(positives) == 0 or len(negatives) == 0:
        return math.nan
    return _Curve.of(positives, negatives, np.zeros(len(positives))).average_precision()


def image_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """AUROC and average precision of scores (N,) for labels (N,) in {0, 1}; nan with one class only."""
    return {"auroc": auroc(scores, labels), "ap": average_precision(scores, labels)}


def pixel_average_precision(maps: Sequence, masks: Sequence) -> float:
    """Average precision over all pixels; nan without a lesion pixel. Its chance level is the share of lesion pixels."""
    return _pixel_curve(maps, masks).average_precision()


def aupro(maps: Sequence, masks: Sequence, fpr_limit: float = 0.3) -> float:
    """Area under the per-region overlap curve up to a pixel false-positive rate, in [0, 1].

    Bergmann et al. 2021, MVTec AD.

    At each threshold: the covered share of a lesion, averaged over lesions (8-connected regions of a mask, so that a
    small one counts as much as a large one), against the share of all other pixels flagged. Straight lines join the
    thresholds and the area is divided by fpr_limit. Masks of normal images are all False; nan without a lesion pixel.
    """
    if not 0 < fpr_limit <= 1:
        raise ValueError(f"fpr_limit must lie in (0, 1], got {fpr_limit}: 0.3 is the usual choice")
    return _pixel_curve(maps, masks).aupro(fpr_limit)


def best_dice(maps: Sequence, masks: Sequence) -> tuple[float, float]:
    """Highest pooled Dice any threshold reaches, and that threshold; nan without lesions.

    An upper bound, as it was chosen on the masks.
    """
    return _pixel_curve(maps, masks).best_dice()


def dice_at(maps: Sequence, masks: Sequence, threshold: float) -> float:
    """Dice = 2 TP / (flagged + lesion) over the pooled pixels, flagged where map > threshold.

    nan without a lesion pixel.
    """
    maps, masks = _check_maps(maps, masks)
    flagged = [m > np.float64(threshold) for m in maps]  # as float64: float32 maps would round the threshold
    hits = sum(int(np.count_nonzero(f & m)) for f, m in zip(flagged, masks, strict=True))
    lesion = sum(int(np.count_nonzero(m)) for m in masks)
    return 2 * hits / (sum(int(np.count_nonzero(f)) for f in flagged) + lesion) if lesion else math.nan


def bootstrap_interval(
    statistic: Callable[..., float],
    arrays: Sequence[ArrayLike],
    groups: Sequence,
    n: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of statistic(*arrays) under a cluster bootstrap: whole groups are redrawn.

    Efron & Tibshirani 1993.

    groups (N,) names the patient of each row of the arrays (N, ...); all images of a drawn patient come along, since
    they are not independent. Resamples where the statistic is nan are left out; (nan, nan) with fewer than two groups
    or nothing left.
    """
    arrays = [np.asarray(a) for a in arrays]
    names, group = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    members = [np.flatnonzero(group == g) for g in range(len(names))]
    if len(members) < 2:
        return math.nan, math.nan
    draws = np.random.default_rng(seed).integers(len(members), size=(n, len(members)))
    rows = (np.concatenate([members[g] for g in draw]) for draw in draws)
    values = np.array([statistic(*(a[r] for a in arrays)) for r in rows], dtype=float)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def psnr(x: ArrayLike, y: ArrayLike, data_range: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB of two images whose values span data_range; inf if they are equal."""
    error = np.mean((np.asarray(x, dtype=np.float64) - np.asarray(y, dtype=np.float64)) ** 2)
    return float(10 * np.log10(data_range**2 / error)) if error > 0 else math.inf


IMAGE_METRICS = ("auroc", "ap")
PIXEL_METRICS = ("pixel_ap", "aupro", "dice", "best_dice")


def summarize(
    scores: ArrayLike,
    labels: ArrayLike,
    kinds: Sequence[str],
    maps: Sequence,
    masks: Sequence,
    pixel_threshold: float,
    patients: Sequence[str],
) -> dict:
    """Everything for metrics.json: `overall`, `kinds` (each against all normals) and `mean_over_kinds`.

    Undefined is None.

    All arguments have one entry per image. Image metrics come with a 95 % patient-bootstrap interval. Pixel metrics
    take the normals, as empty masks, and the abnormal images that have a map and a mask with a lesion in it; a map of
    None is left out. `dice` is at pixel_threshold, which comes from validation normals; `best_dice` is an upper bound.
    `mean_over_kinds` skips kinds where a metric is undefined.
    """
    scores, labels, kinds, patients = (
        np.asarray(scores, dtype=np.float64),
        np.asarray(labels),
        np.asarray(kinds),
        np.asarray(patients),
    )
    if not len(scores) == len(labels) == len(kinds) == len(maps) == len(masks) == len(patients):
        raise ValueError(
            "scores, labels, kinds, maps, masks and patients need one entry per image: fill what is missing with None"
        )
    abnormal = _check_labels(labels)

    def entry(chosen: NDArray) -> dict:
        image = _image_entry(scores[chosen], abnormal[chosen], patients[chosen])
        rows = [
            i
            for i in np.flatnonzero(chosen)
            if maps[i] is not None and (not abnormal[i] or (masks[i] is not None and np.any(masks[i])))
        ]
        lesions = [masks[i] if abnormal[i] else np.zeros(np.shape(maps[i]), dtype=bool) for i in rows]
        return image | _pixel_entry([maps[i] for i in rows], lesions, pixel_threshold)

    by_kind = {str(kind): entry(~abnormal | (kinds == kind)) for kind in np.unique(kinds[abnormal])}
    means = {name: _mean([e[name] for e in by_kind.values()]) for name in IMAGE_METRICS + PIXEL_METRICS}
    return _json_ready({"overall": entry(np.ones(len(scores), dtype=bool)), "kinds": by_kind, "mean_over_kinds": means})


def _image_entry(scores: NDArray, abnormal: NDArray, patients: NDArray) -> dict:
    entry = {
        "normal_images": int((~abnormal).sum()),
        "abnormal_images": int(abnormal.sum()),
        "patients": len(set(patients.tolist())),
    }
    for name, statistic in (("auroc", auroc), ("ap", average_precision)):
        entry[name] = statistic(scores, abnormal)
        entry[f"{name}_interval"] = bootstrap_interval(statistic, (scores, abnormal), patients)
    return entry


def _pixel_entry(maps: list[NDArray], masks: list[NDArray], threshold: float) -> dict:
    if not any(np.any(m) for m in masks):
        return {"masked_images": 0, "lesion_pixel_share": math.nan} | dict.fromkeys(PIXEL_METRICS, math.nan)
    curve = _pixel_curve(maps, masks)  # one sort serves three metrics
    share = curve.true_positives[-1] / (curve.true_positives[-1] + curve.n_negatives)
    pixel = {"pixel_ap": curve.average_precision(), "aupro": curve.aupro(0.3), "dice": dice_at(maps, masks, threshold)}
    return (
        {"masked_images": sum(bool(np.any(m)) for m in masks), "lesion_pixel_share": float(share)}
        | pixel
        | {"best_dice": curve.best_dice()[0]}
    )


def _mean(values: list[float]) -> float:
    defined = [v for v in values if not math.isnan(v)]
    return sum(defined) / len(defined) if defined else math.nan


def _json_ready(value):
    """Tuples to lists and nan to None, all the way down: strict JSON knows neither."""
    if isinstance(value, dict):
        return {key: _json_ready(v) for key, v in value.items()}
    if isinstance(value, tuple):
        return [_json_ready(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


@dataclass(frozen=True)
class _Curve:
    """What is flagged at each threshold, for the K distinct values of the positives, highest first.

    Between two of them only negatives are added: true positives and overlap stay, precision and Dice can only fall. So
    these K are all that matters, and the many negatives need a sort but no curve of their own.
    """

    thresholds: NDArray  # (K,), falling
    true_positives: NDArray  # (K,) positives >= threshold
    overlap: NDArray  # (K,) mean covered share of the regions
    negatives_above: NDArray  # (K,) negatives > threshold
    negatives_at: NDArray  # (K,) negatives >= threshold
    n_negatives: int

    @classmethod
    def of(cls, positives: NDArray, negatives: NDArray, region_weight: NDArray) -> "_Curve":
        """From the values of positives and negatives; region_weight is what covering a positive adds to the overlap."""
        values, inverse, counts = np.unique(positives, return_inverse=True, return_counts=True)
        overlap = np.bincount(inverse.ravel(), weights=region_weight, minlength=len(values))
        negatives = np.sort(negatives)
        not_above, below = (np.searchsorted(negatives, values, side)[::-1] for side in ("right", "left"))
        n = len(negatives)
        return cls(values[::-1], np.cumsum(counts[::-1]), np.cumsum(overlap[::-1]), n - not_above, n - below, n)

    def average_precision(self) -> float:
        if len(self.thresholds) == 0:
            return math.nan
        precision = self.true_positives / (self.true_positives + self.negatives_at)
        return float(np.sum(np.diff(self.true_positives, prepend=0) * precision) / self.true_positives[-1])

    def best_dice(self) -> tuple[float, float]:
        if len(self.thresholds) == 0:
            return math.nan, math.nan
        dice = 2 * self.true_positives / (self.true_positives + self.negatives_at + self.true_positives[-1])
        best = int(np.argmax(dice))
        return float(dice[best]), float(np.nextafter(self.thresholds[best], -np.inf))  # one step down turns >= into >

    def aupro(self, fpr_limit: float) -> float:
        if len(self.thresholds) == 0 or self.n_negatives == 0:
            return math.nan
        # Each threshold is a step: first the negatives above it, at the old overlap, then what ties with it, sloping.
        fpr = np.stack([self.negatives_above, self.negatives_at], axis=1).ravel() / self.n_negatives
        overlap = np.minimum(np.stack([np.concatenate([[0.0], self.overlap[:-1]]), self.overlap], axis=1).ravel(), 1.0)
        fpr, overlap = np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], overlap, [1.0]])
        inside = fpr <= fpr_limit
        at_limit = np.interp(fpr_limit, fpr, overlap)
        return float(
            scipy.integrate.trapezoid(np.append(overlap[inside], at_limit), np.append(fpr[inside], fpr_limit))
            / fpr_limit
        )


def _pixel_curve(maps: Sequence, masks: Sequence) -> _Curve:
    maps, masks = _check_maps(maps, masks)
    weights = [_region_weights(m) for m in masks if m.any()]
    n_regions = sum(n for _, n in weights)
    positives = np.concatenate([np.asarray(a)[m] for a, m in zip(maps, masks, strict=True)] or [np.zeros(0)])
    negatives = np.concatenate([np.asarray(a)[~m] for a, m in zip(maps, masks, strict=True)] or [np.zeros(0)])
    return _Curve.of(positives, negatives, np.concatenate([w / n_regions for w, _ in weights] or [np.zeros(0)]))


def _region_weights(mask: NDArray) -> tuple[NDArray, int]:
    """One over the size of its region for each True pixel of mask (H, W), in C order, and the number of regions."""
    regions, n = scipy.ndimage.label(mask, structure=EIGHT_CONNECTED)
    return 1 / np.bincount(regions.ravel())[regions[mask]], n


def _check_labels(labels: ArrayLike) -> NDArray:
    labels = np.asarray(labels)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 (normal) or 1 (abnormal): leave images of unknown label out")
    return labels.astype(bool)


def _split(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray, NDArray]:
    """Scores of the abnormal and of the normal images."""
    scores, abnormal = np.asarray(scores), _check_labels(labels)
    if scores.shape != abnormal.shape or scores.ndim != 1:
        raise ValueError(f"scores and labels need one entry per image, got shapes {scores.shape} and {abnormal.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("anomaly scores must be finite, found nan or inf: check the checkpoint that made them")
    return scores[abnormal], scores[~abnormal]


def _check_maps(maps: Sequence, masks: Sequence) -> tuple[list[NDArray], list[NDArray]]:
    maps, masks = [np.asarray(a) for a in maps], [np.asarray(m).astype(bool) for m in masks]
    if [a.shape for a in maps] != [m.shape for m in masks]:
        raise ValueError(
            "every anomaly map needs a mask of its own size: resize the masks with max, so that small lesions survive"
        )
    if not all(np.isfinite(a).all() for a in maps):
        raise ValueError("anomaly maps must be finite, found nan or inf: check the checkpoint that made them")
    return maps, masks
