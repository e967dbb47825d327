"""Pictures of what the pipeline does: result panels, image grids, loss curves. The only file that imports matplotlib.

Images are (H, W) arrays in [-1, 1]. Colour maps are readable with any colour vision: magma for what is >= 0, a
diverging red-blue for what has a sign. Figures hold no file paths and no patient data, only what the caller writes
into a title, and the same input gives the same bytes under the same matplotlib. A PNG appears whole or not at all.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import contourpy
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from files import write_atomically

DPI = 100
GREY, SIGNED, HEAT = "gray", "RdBu_r", "magma"  # RdBu_r: red where x is brighter than G(x)
OUTLINE = {
    "color": "#00e5ff",
    "linewidth": 1.2,
    "path_effects": [withStroke(linewidth=2.6, foreground="black")],
}  # cyan, seen on black and white
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
BOLD, YELLOW = "#000000", "#F0E442"  # the second is faint on white


@dataclass(frozen=True)
class ColourScale:
    """Where each colour bar ends, one set for all images of a run, so that they can be compared.

    Values beyond take the last colour.
    """

    residual: float  # the bar runs from -residual to +residual
    l1: float
    gradient: float
    anomaly_map: float

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (np.isfinite(value) and value > 0):
                raise ValueError(
                    f"the colour scale of {name} must be finite and above 0, got {value}: take a high percentile over "
                    "validation normals"
                )


def save_result(
    path: str | Path,
    original: ArrayLike,
    normalized: ArrayLike,
    l1: ArrayLike,
    gradient: ArrayLike,
    anomaly_map: ArrayLike,
    title: str,
    scale: ColourScale,
    mask: ArrayLike | None = None,
) -> None:
    """Six panels: original, normalized, x - G(x); L1 component, gradient component, final anomaly map. All (H, W).

    mask (H, W), True inside lesions, is outlined on the original and on the final map. About 1500 pixels wide.
    """
    images = [np.asarray(image, dtype=np.float32) for image in (original, normalized, l1, gradient, anomaly_map)]
    shapes = {image.shape for image in images} | ({np.shape(mask)} if mask is not None else set())
    if len(shapes) != 1 or images[0].ndim != 2:
        raise ValueError(
            f"a result needs 2-D images of one size, got {sorted(shapes)}: resize them to the model's input first"
        )
    figure = _result_figure(images[0].shape)
    figure.update(images, title, scale, mask)
    _write_png(path, figure.figure)


class _ResultFigure:
    """The six panels for one image shape, built once: a new matplotlib figure costs more than to draw it."""

    TITLES = (
        "original  x",
        "normalized  G(x)",
        "residual  x \N{MINUS SIGN} G(x)",
        "L1 component",
        "gradient component",
        "final anomaly map",
    )
    LABELS = (
        "grey level",
        "grey level",
        "x \N{MINUS SIGN} G(x)",
        "|x \N{MINUS SIGN} G(x)|",
        "|\N{NABLA}x \N{MINUS SIGN} \N{NABLA}G(x)|",
        "anomaly",
    )

    def __init__(self, shape: tuple[int, int]):
        # In pixels: the longer side of a panel is at least 406 (1500 a figure), up to 640 no smaller than the image.
        longer = min(max(406, *shape), 640)
        self.height, self.width = (max(round(longer * side / max(shape)), 96) for side in shape)
        self.size = (12 + 3 * (self.width + 90), 46 + 2 * (self.height + 36))
        self.figure = Figure(figsize=(self.size[0] / DPI, self.size[1] / DPI), dpi=DPI)
        corner = (12 / self.size[0], 1 - 12 / self.size[1])
        self.title = self.figure.text(*corner, "", fontsize=12.5, weight="bold", va="top")
        self.title.set_parse_math(False)  # the name of a kind may hold a dollar sign
        self.panels = [self._panel(i, shape) for i in range(6)]
        self.outlines = [self.panels[i].axes.add_collection(LineCollection([], **OUTLINE)) for i in (0, 5)]
        entry = Line2D(
            [],
            [],
            label="ground-truth lesion",
            color=OUTLINE["color"],
            linewidth=3,
            path_effects=[withStroke(linewidth=5, foreground="black")],
        )
        corner = (1 - 8 / self.size[0], 1 - 4 / self.size[1])
        self.legend = self.figure.legend(
            handles=[entry], loc="upper right", bbox_to_anchor=corner, fontsize=11, frameon=False
        )

    def _panel(self, index: int, shape: tuple[int, int]) -> AxesImage:
        row, column = divmod(index, 3)
        left, bottom = 12 + column * (self.width + 90), (1 - row) * (self.height + 36) + 10
        axes = self._axes(left, bottom, self.width)
        axes.set_title(self.TITLES[index], fontsize=11, pad=5)
        axes.set(xticks=[], yticks=[])
        colours = (GREY, GREY, SIGNED, HEAT, HEAT, HEAT)[index]
        image = axes.imshow(np.zeros(shape, dtype=np.float32), cmap=colours, vmin=-1, vmax=1, aspect="auto")
        bar = self.figure.colorbar(
            image,
            cax=self._axes(left + self.width + 6, bottom, 11),
            ticks=MaxNLocator(5, steps=[1, 2, 5, 10]),
            format="{x:g}",
        )
        bar.ax.tick_params(labelsize=8, length=2.5, pad=2)
        bar.ax.set_ylabel(self.LABELS[index], fontsize=9, labelpad=2)
        return image

    def _axes(self, left: float, bottom: float, width: float) -> Axes:
        return self.figure.add_axes(
            (left / self.size[0], bottom / self.size[1], width / self.size[0], self.height / self.size[1])
        )

    def update(self, images: Sequence[NDArray], title: str, scale: ColourScale, mask: ArrayLike | None) -> None:
        x, normalized, *components = images
        limits = (
            (-1, 1),
            (-1, 1),
            (-scale.residual, scale.residual),
            (0, scale.l1),
            (0, scale.gradient),
            (0, scale.anomaly_map),
        )
        for panel, image, limit in zip(self.panels, (x, normalized, x - normalized, *components), limits, strict=True):
            panel.set_data(image)
            panel.set_clim(*limit)
        self.title.set_text(title)
        for border in self.outlines:
            border.set_segments([] if mask is None else outline(mask))
        self.legend.set_visible(mask is not None)


_result_figure = lru_cache(maxsize=4)(_ResultFigure)


def heat_colours() -> NDArray:
    """The 256 colours of anomaly maps, from nothing to the end of the bar, uint8 (256, 3)."""
    return colormaps[HEAT](np.arange(256), bytes=True)[:, :3]


def outline(mask: ArrayLike) -> list[NDArray]:
    """The border of a mask (H, W) as lines of (x, y) in pixels, closed also at the edge of the image."""
    padded = np.pad(np.asarray(mask).astype(np.float32), 1)
    return [line - 1 for line in contourpy.contour_generator(z=padded).lines(0.5)]


def save_grid(
    path: str | Path,
    rows: Sequence[tuple[str, ArrayLike]],
    titles: Sequence[str] | None = None,
    columns: int = 8,
    signed: Collection[str] = (),
) -> None:
    """Labelled rows of images: each row is (label, (N, H, W)), grey from -1 to 1.

    More than `columns` images go on below, all rows together.

    A row whose label is in `signed`, such as a residual, is red and blue around 0, up to the 99.9th percentile of its
    absolute values, which stands in its label. titles (N) stand above the images.
    """
    arrays = [(label, np.asarray(images, dtype=np.float32)) for label, images in rows]
    shapes = {images.shape for _, images in arrays}
    if len(shapes) != 1 or min(*next(iter(shapes)), 1) < 1 or arrays[0][1].ndim != 3:
        raise ValueError(
            f"a grid needs rows of one shape (N, H, W), N >= 1, got {sorted(shapes)}: give every row the same images"
        )
    count, height, width = arrays[0][1].shape
    columns, blocks = min(columns, count), -(-count // columns)
    # In pixels, y pointing down: cells of 180 on the longer side, a margin as wide as the longest label.
    margin = 24 + 8 * max(8, *(len(line) for label, _ in arrays for line in label.split("\n")))
    cell_height, cell_width = (round(180 * side / max(height, width)) for side in (height, width))
    block = len(arrays) * (cell_height + 4) + (22 if titles else 8)
    size = margin + columns * (cell_width + 4), blocks * block + 4
    figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for r, (label, images) in enumerate(arrays):
        limit = max(float(np.percentile(np.abs(images), 99.9)), 1e-6) if label in signed else 1.0
        text = f"{label}\n\N{PLUS-MINUS SIGN}{limit:.2g}\nred: > 0" if label in signed else label
        for i, image in enumerate(images):
            left, top = (
                margin + i % columns * (cell_width + 4),
                i // columns * block + r * (cell_height + 4) + (22 if titles else 4),
            )
            extent = (left, left + cell_width, top + cell_height, top)
            axes.imshow(
                image, cmap=SIGNED if label in signed else GREY, vmin=-limit, vmax=limit, extent=extent, aspect="auto"
            )
            if titles and r == 0:
                axes.text(left + cell_width / 2, top - 4, titles[i], ha="center", va="bottom", fontsize=9)
            if i % columns == 0:
                axes.text(margin - 10, top + cell_height / 2, text, ha="right", va="center", fontsize=10)
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
    _write_png(path, figure)


def save_curves(path: str | Path, series: Mapping[str, tuple[ArrayLike, ArrayLike]], title: str) -> None:
    """Curves over training steps: name -> (steps, values), at most 8; logarithmic where all values are above 0.

    The legend gives each curve's last value. Values that are not finite are left out, and curves that are 0 throughout
    are only named.
    """
    _refuse_too_many(len(series))
    figure = Figure(figsize=(10, 5), dpi=DPI)
    axes = figure.add_axes((0.08, 0.11, 0.64, 0.8))
    lowest = np.inf
    for colour, (name, (steps, values)) in zip(OKABE_ITO, series.items(), strict=False):
        steps, values = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
        steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
        zero = not np.any(values)
        label = f"{name}  ({'no values' if len(values) == 0 else '0' if zero else f'last {values[-1]:.3g}'})"
        axes.plot(
            *([], []) if zero else (steps, values),
            color=colour,
            linewidth=1.6,
            marker="o" if len(values) < 30 else None,
            markersize=3,
            label=label,
        )
        lowest = lowest if zero else min(lowest, values.min())
    if 0 < lowest < np.inf:
        axes.set_yscale("log")
    axes.set_title(title, fontsize=12, loc="left", weight="bold")
    axes.set_xlabel("step")
    axes.grid(which="both", color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if series:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=10)
    _write_png(path, figure)


def save_growth(
    path: str | Path, rows: Mapping[str, Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]]], title: str
) -> None:
    """What grows with what: a row of panels for each measure, a column for each cause, on axes of doublings.

    rows: measure -> cause -> at most 8 curves, name -> (amounts, values in [0, 1]). Causes and names are those of the
    first row; a name has the same colour everywhere, and of the first the line is the boldest.
    """
    names = list(dict.fromkeys(name for panels in rows.values() for curves in panels.values() for name in curves))
    _refuse_too_many(len(names))
    clear = [each for each in OKABE_ITO if each not in (BOLD, YELLOW)]
    colours = dict(zip(names, (BOLD, *clear, "0.55"), strict=False))
    causes = len(next(iter(rows.values())))
    figure = Figure(figsize=(4.6 * causes + 1.8, 3.4 * len(rows) + 0.4), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(rows), causes, sharey="row", sharex="col", squeeze=False)
    for across, (measure, panels) in zip(axes, rows.items(), strict=True):
        across[0].set_ylabel(measure)
        for panel, (cause, curves) in zip(across, panels.items(), strict=True):
            _draw_growth(panel, curves, colours, bold=names[0])
            panel.set_xlabel(cause)
    handles = [Line2D([], [], color=colours[name], linewidth=3 if name == names[0] else 1.6) for name in names]
    figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=10)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", weight="bold")
    _write_png(path, figure)


def _draw_growth(
    panel: Axes, curves: Mapping[str, tuple[ArrayLike, ArrayLike]], colours: Mapping[str, str], bold: str
) -> None:
    """One panel of `save_growth`."""
    for name, (amounts, values) in curves.items():
        style = {"linewidth": 3, "zorder": 3} if name == bold else {"linewidth": 1.6}
        panel.plot(amounts, values, color=colours[name], marker="o", markersize=4, **style)
    amounts = sorted({float(amount) for each, _ in curves.values() for amount in each})
    panel.set_xscale("log", base=2)
    panel.set_xticks(amounts, [f"{amount:,.0f}" for amount in amounts])
    panel.grid(which="major", color="0.9", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def _refuse_too_many(curves: int) -> None:
    if curves > len(OKABE_ITO):
        raise ValueError(
            f"{curves} curves in one figure cannot be told apart: split them, at most {len(OKABE_ITO)} each"
        )


def _write_png(path: str | Path, figure: Figure) -> None:
    """A whole picture or none."""
    options = {"format": "png", "dpi": DPI, "metadata": {"Software": None}, "pil_kwargs": {"compress_level": 4}}
    write_atomically(path, lambda beside: figure.savefig(beside, **options))
