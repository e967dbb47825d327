"""Leaf: the pictures of one image that the report lays over one another, whole or not at all.

report/XXX_original.png    grey, as the method looks at it
report/XXX_normal.png      grey, G(x)
report/XXX_map.png         the map in the colours of the figures; what normals show too lets the original through
report/XXX_outline.svg     the border of the mask, where there is one
report/XXX_thumb.jpg       original and map together, small
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from files import write_atomically, write_binary
from reporting.figures import heat_colours, outline

FOLDER = "report"  # beside report.html
PATTERNS = tuple(f"{FOLDER}/*_{name}" for name in ("original.png", "normal.png", "map.png", "outline.svg", "thumb.jpg"))
OPAQUE = 0.5  # of the colour bar: from here on the map hides the original. A thousandth of normal pixels lies above
THUMB = 240  # pixels of the longer side
OUTLINE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" preserveAspectRatio="none">
<g fill="none" stroke-linejoin="round">
<path d="{path}" stroke="#000" stroke-width="4.5" vector-effect="non-scaling-stroke"/>
<path d="{path}" stroke="#00e5ff" stroke-width="2" vector-effect="non-scaling-stroke"/>
</g></svg>
"""


@dataclass(frozen=True)
class Layers:
    """What the report shows of one image; all show the same field, each at its own size."""

    original: NDArray  # (k H, k W) in [-1, 1]
    normal: NDArray  # (H, W) in [-1, 1], G(x)
    anomaly_map: NDArray  # (k H, k W)
    mask: NDArray | None  # bool, True on a lesion
    shape: tuple[int, int]  # rows, columns of the field as it is shown: those of the file where it was squashed

    @property
    def outlined(self) -> bool:
        """Whether there is a lesion to draw a line around."""
        return self.mask is not None and bool(self.mask.any())

    def told(self) -> dict:
        """What the page must know of them."""
        return {"shape": [int(side) for side in self.shape], "outlined": self.outlined}


def pictures_of(index: int, outlined: bool) -> list[str]:
    """The names of what `save_layers` writes of an image, below the folder of the report."""
    patterns = (pattern for pattern in PATTERNS if outlined or not pattern.endswith("_outline.svg"))
    return [pattern.replace("*", f"{index:03d}") for pattern in patterns]


def save_layers(folder: Path, index: int, layers: Layers, end: float) -> None:
    """Write the pictures of image `index` into a folder.

    end is the value of the map that gets the last colour, the same for all images of a run.
    """
    original, levels = grey(layers.original), map_levels(layers.anomaly_map, end)
    coloured = Image.fromarray(levels).convert("P")
    coloured.putpalette(heat_colours().tobytes())
    _save(folder / f"{index:03d}_original.png", Image.fromarray(original))
    _save(folder / f"{index:03d}_normal.png", Image.fromarray(grey(layers.normal)))
    _save(folder / f"{index:03d}_map.png", coloured, transparency=opacities().tobytes())
    _save(folder / f"{index:03d}_thumb.jpg", thumbnail(original, levels, layers.shape), quality=82)
    if layers.outlined:
        text = outline_svg(layers.mask)
        write_atomically(folder / f"{index:03d}_outline.svg", lambda beside: beside.write_text(text))


def grey(image: NDArray) -> NDArray:
    """[-1, 1] as uint8, of the same shape."""
    return np.round(np.clip((np.asarray(image, np.float32) + 1) / 2, 0, 1) * 255).astype(np.uint8)


def map_levels(anomaly_map: NDArray, end: float) -> NDArray:
    """The places of a map on its colour bar, uint8 of the same shape: 0 is 0 or less, 255 is `end` or more."""
    return np.round(np.clip(np.asarray(anomaly_map, np.float32) / end, 0, 1) * 255).astype(np.uint8)


def opacities() -> NDArray:
    """How much of the original each of the 256 colours of a map hides, uint8 (256,): rising, 255 from OPAQUE on."""
    return np.round(np.clip(np.arange(256) / 255 / OPAQUE, 0, 1) * 255).astype(np.uint8)


def thumbnail(original: NDArray, levels: NDArray, shape: tuple[int, int]) -> Image.Image:
    """Original and map, uint8 (k H, k W) each, laid over one another: RGB, no side longer than THUMB."""
    hidden = opacities()[levels][..., None] / 255
    mixed = (1 - hidden) * original[..., None] + hidden * heat_colours()[levels]
    rows, columns = (max(1, round(THUMB * side / max(shape))) for side in shape)
    return Image.fromarray(np.round(mixed).astype(np.uint8)).resize((columns, rows), Image.Resampling.BICUBIC)


def outline_svg(mask: NDArray) -> str:
    """The border of a mask (H, W) as a drawing that stretches to any size; its lines stay as thin as they are."""
    lines = ["M" + "L".join(f"{x + 0.5:g},{y + 0.5:g}" for x, y in line) + "Z" for line in outline(mask)]
    height, width = mask.shape
    return OUTLINE.format(width=width, height=height, path="".join(lines))


def _save(path: Path, image: Image.Image, **how: object) -> None:
    kind = {".png": "PNG", ".jpg": "JPEG"}[path.suffix]
    write_binary(path, lambda file: image.save(file, kind, **how))
