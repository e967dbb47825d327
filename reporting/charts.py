"""Leaf: the charts of the report as numbers in pixels; templates/charts.svg.j2 draws them.

A chart has its plane at LEFT to RIGHT and TOP to BOTTOM of a drawing of WIDTH x HEIGHT, y down.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 398, 12, 206
BINS = 24


@dataclass(frozen=True)
class Series:
    """A line of a chart; the page colours it by its style."""

    name: str
    style: str  # a class of report.css
    points: str  # of an SVG polyline
    filled: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart, ready to be drawn."""

    title: str
    description: str  # for who cannot see it
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]  # where in pixels, and what stands there
    y_ticks: list[tuple[float, str]]
    series: list[Series]
    rule: float | None = None  # a vertical line, in pixels
    mark: tuple[float, float] | None = None  # a dot, in pixels


def histogram(normals: ArrayLike, groups: list[tuple[str, str, ArrayLike]], threshold: float) -> Chart:
    """Scores of the validation normals and of groups (name, style, scores), each as shares of its own images.

    The outermost bars also hold what lies beyond the axis, which ends where half a percent of all scores does.
    """
    groups = [("validation normals", "normals", normals), *groups]
    groups = [(name, style, np.asarray(scores, float)) for name, style, scores in groups if len(scores)]
    low, high = score_range(np.concatenate([scores for *_, scores in groups]), threshold)
    edges = np.linspace(low, high, BINS + 1)
    shares = [np.histogram(scores.clip(low, high), edges)[0] / len(scores) for *_, scores in groups]
    top = max(float(share.max()) for share in shares)
    series = [
        Series(f"{name} ({len(scores)})", style, _steps(edges, share, top), filled=True)
        for (name, style, scores), share in zip(groups, shares, strict=True)
    ]
    medians = "; ".join(f"median of the {name} {np.median(scores):.4g}" for name, _, scores in groups)
    return Chart(
        title="Scores",
        description=f"Histogram of image scores with the threshold at {threshold:.4g}: {medians}.",
        x_label="score",
        y_label="share of images",
        x_ticks=[(_across(value, low, high), f"{value:g}") for value in round_values(low, high)],
        y_ticks=[(_up(value, 0, top), f"{100 * value:g}%") for value in round_values(0, top)],
        series=series,
        rule=_across(threshold, low, high),
    )


def score_range(scores: NDArray, threshold: float) -> tuple[float, float]:
    """Where the axis of scores begins and ends: all but half a percent at each end, and the threshold; low < high."""
    low, high = np.quantile(scores, [0.005, 0.995])
    low, high = min(float(low), threshold), max(float(high), threshold)
    room = 0.02 * (high - low) or 0.5 * abs(high) or 0.5
    return low - room, high + room


def round_values(low: float, high: float, most: int = 6) -> list[float]:
    """At most so many values between low and high, low < high: all multiples of 1, 2 or 5 times a power of ten."""
    size = 10.0 ** np.floor(np.log10((high - low) / most))
    step = next(size * times for times in (1, 2, 5, 10, 20) if (high - low) / (size * times) <= most - 1)
    multiples = np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1)
    return [float(f"{multiple * step:.10g}") + 0.0 for multiple in multiples]


def roc(scores: ArrayLike, labels: ArrayLike, threshold: float, area: str) -> Chart:
    """The ROC curve of scores (N,) with labels (N,) in {0, 1}, both there; the dot is what `threshold` does.

    area is what is said of it in words.
    """
    fpr, tpr = roc_points(scores, labels)
    flagged, abnormal = np.asarray(scores) > threshold, np.asarray(labels) == 1
    rates = float(flagged[~abnormal].mean()), float(flagged[abnormal].mean())
    said = f"ROC curve, {area}. At the threshold {rates[1]:.1%} of the abnormal and {rates[0]:.1%} of the normal."
    chance = Series("chance", "chance", _line(np.array([0, 1]), np.array([0, 1])))
    series = [chance, Series(area, "curve", _line(fpr, tpr))]
    return _unit_chart("ROC", said, "normal images flagged", "abnormal images flagged", series, rates)


def precision_recall(scores: ArrayLike, labels: ArrayLike, threshold: float, area: str) -> Chart:
    """The precision of what is flagged against the share of abnormal images found, as steps; arguments as of `roc`."""
    recall, precision = precision_recall_points(scores, labels)
    flagged, abnormal = np.asarray(scores) > threshold, np.asarray(labels) == 1
    hits, share = int((flagged & abnormal).sum()), float(abnormal.mean())
    mark = (hits / int(abnormal.sum()), hits / int(flagged.sum())) if flagged.any() else None
    said = f"Precision-recall curve, {area}; chance is {share:.3f}."
    said += f" At the threshold recall {mark[0]:.1%}, precision {mark[1]:.1%}." if mark else " Nothing is flagged."
    chance = Series("chance", "chance", _line(np.array([0, 1]), np.array([share, share])))
    series = [chance, Series(area, "curve", _line(recall, precision))]
    return _unit_chart("Precision and recall", said, "recall", "precision", series, mark)


def roc_points(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray, NDArray]:
    """False- and true-positive rates (K + 1,) over the K distinct scores, from (0, 0) to (1, 1)."""
    false, true = _counts(scores, labels)
    return false / false[-1], true / true[-1]


def precision_recall_points(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray, NDArray]:
    """Recall and precision as steps (2K,): the area below is the average precision of metrics.py."""
    false, true = (count[1:] for count in _counts(scores, labels))
    recall, precision = true / true[-1], true / (true + false)
    before = np.concatenate([[0.0], recall[:-1]])
    return np.stack([before, recall], axis=1).ravel(), np.repeat(precision, 2)


def _counts(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray, NDArray]:
    """Normal and abnormal images at or above each distinct score, highest first, after a leading 0."""
    scores, abnormal = np.asarray(scores, float), np.asarray(labels) == 1
    _, place = np.unique(-scores, return_inverse=True)
    false, true = (np.bincount(place.ravel()[chosen], minlength=place.max() + 1) for chosen in (~abnormal, abnormal))
    return np.concatenate([[0], false.cumsum()]), np.concatenate([[0], true.cumsum()])


def _unit_chart(
    title: str, said: str, x_label: str, y_label: str, series: list[Series], mark: tuple[float, float] | None
) -> Chart:
    """A chart of shares: both axes run from 0 to 1."""
    ticks = np.linspace(0, 1, 5)
    dot = None if mark is None else (_across(mark[0], 0, 1), _up(mark[1], 0, 1))
    x_ticks = [(_across(value, 0, 1), f"{value:.0%}") for value in ticks]
    y_ticks = [(_up(value, 0, 1), f"{value:.0%}") for value in ticks]
    return Chart(title, said, x_label, y_label, x_ticks, y_ticks, series, mark=dot)


def _line(x: NDArray, y: NDArray) -> str:
    """Points of shares as an SVG polyline."""
    return _points((_across(a, 0, 1), _up(b, 0, 1)) for a, b in zip(x, y, strict=True))


def _steps(edges: NDArray, shares: NDArray, top: float) -> str:
    """The outline of a histogram, from the axis back to it."""
    sides = np.repeat([_across(edge, edges[0], edges[-1]) for edge in edges], 2)
    heights = np.concatenate([[0], np.repeat(shares, 2), [0]])
    return _points((x, _up(share, 0, top)) for x, share in zip(sides, heights, strict=True))


def _points(pairs) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


def _across(value: float, low: float, high: float) -> float:
    return round(LEFT + (RIGHT - LEFT) * (value - low) / (high - low), 1)


def _up(value: float, low: float, high: float) -> float:
    return round(BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low), 1)
