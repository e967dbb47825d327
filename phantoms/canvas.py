"""Coordinates, the layers of a radiograph, and the brushes that draw into them: polygons, ellipses, textures.

Patient coordinates are x in [-1, 1] (left to right, 0 at the midline) and y in [0, 1] (top to bottom); at the natural
2:1 shape one unit is the image height, about 130 mm on the detector. Attenuations are in units where soft tissue is
about 0.4, and structures that overlap add up. Angles are in radians.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from scipy.interpolate import Akima1DInterpolator, make_interp_spline
from scipy.ndimage import gaussian_filter

DETECTOR_HEIGHT = 130.0  # mm
MM = 1.3 / DETECTOR_HEIGHT  # one millimetre of anatomy: panoramic magnification over the height of the detector
SUPERSAMPLING = 3


@dataclass
class Scene:
    """Attenuation in layers (H, W) float32: what is neither bone nor tooth, bone with its texture, teeth, metal."""

    base: np.ndarray
    bone: np.ndarray
    teeth: np.ndarray
    metal: np.ndarray

    @property
    def total(self) -> np.ndarray:
        return self.base + self.bone + self.teeth + self.metal

    def copy(self) -> "Scene":
        """A copy to draw a lesion into; the base is shared, nothing draws into it."""
        return Scene(self.base, self.bone.copy(), self.teeth.copy(), self.metal.copy())


class Canvas:
    """Where patient coordinates fall on the pixels of an image of (height, width), and how shapes are drawn there."""

    def __init__(self, pose: dict[str, float], height: int, width: int):
        cos, sin = np.cos(pose["tilt"]), np.sin(pose["tilt"])
        turn = np.array([[cos, -sin], [sin, cos]])
        self.matrix = np.diag([width / 2, height]) @ turn @ np.diag([pose["stretch"], 1.0])
        self.centre = np.array([0.0, 0.5])
        self.offset = np.array([width / 2 * (1 + pose["shift_x"]), height * (0.5 + pose["shift_y"])])
        self.height = height
        self.width = width
        rows, columns = np.mgrid[0:height, 0:width] + 0.5
        inverse = np.linalg.inv(self.matrix)
        columns -= self.offset[0]
        rows -= self.offset[1]
        self.x = (inverse[0, 0] * columns + inverse[0, 1] * rows).astype(np.float32)
        self.y = (inverse[1, 0] * columns + inverse[1, 1] * rows + 0.5).astype(np.float32)
        self.edge = 1.2 / min(height, width / 2)  # width of a soft edge: just over one pixel

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 2) in pixels, x first."""
        return (np.asarray(points) - self.centre) @ self.matrix.T + self.offset

    def window(self, points: np.ndarray, margin: float = 0.0) -> tuple[slice, slice]:
        """Rows and columns of the box around the points, `margin` pixels wider; empty off the image."""
        pixels = self.pixels(points)
        left, top = np.floor(pixels.min(0) - margin).astype(int)
        right, bottom = np.ceil(pixels.max(0) + margin).astype(int) + 1
        rows = slice(max(top, 0), max(min(bottom, self.height), 0))
        columns = slice(max(left, 0), max(min(right, self.width), 0))
        return rows, columns

    def fill(self, points: np.ndarray, blur: float = 0.0) -> np.ndarray:
        """Coverage (H, W) in [0, 1] of a polygon, edges blurred by `blur` patient units."""
        return self._paint(points, 1.0, blur, lambda draw, flat: draw.polygon(flat, fill=255))

    def line(self, points: np.ndarray, thickness: float, blur: float = 0.0) -> np.ndarray:
        """Coverage of a line; one thinner than a subpixel is drawn at that width and weakened."""
        wanted = thickness * self.height * SUPERSAMPLING
        drawn = max(1, round(wanted))
        reach = drawn / SUPERSAMPLING
        cover = self._paint(
            points, reach, blur, lambda draw, flat: draw.line(flat, fill=255, width=drawn, joint="curve")
        )
        return cover * np.float32(min(1.0, wanted / drawn))

    def _paint(
        self, points: np.ndarray, reach: float, blur: float, paint: Callable[[ImageDraw.ImageDraw, list], None]
    ) -> np.ndarray:
        """Coverage (H, W) of what `paint` draws at three times the resolution, `reach` pixels about the points."""
        sigma = (blur * self.height, blur * self.width / 2)
        rows, columns = box = self.window(points, reach + 3 * max(sigma))
        cover = np.zeros((self.height, self.width), np.float32)
        size = (columns.stop - columns.start, rows.stop - rows.start)
        if min(size) <= 0:
            return cover
        image = Image.new("L", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING))
        corner = (columns.start, rows.start)
        flat = [tuple(point) for point in (self.pixels(points) - corner) * SUPERSAMPLING]
        paint(ImageDraw.Draw(image), flat)
        cover[box] = np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float32) / 255
        if blur:
            cover[box] = gaussian_filter(cover[box], sigma, truncate=3)
        return cover

    def soft(self, distance: np.ndarray) -> np.ndarray:
        """1 inside (distance > 0), 0 outside, over one soft edge."""
        return np.clip(0.5 + distance / self.edge, 0, 1)

    def blob(
        self,
        centre: np.ndarray,
        radii: tuple[float, float],
        angle: float = 0.0,
        edge: float = 0.0,
        lobes: np.ndarray | None = None,
    ) -> np.ndarray:
        """Soft ellipse (H, W): 1 inside, to 0 over `edge` (never less than a pixel); `lobes` (3,) make it uneven."""
        dx = self.x - centre[0]
        dy = self.y - centre[1]
        u = dx * np.cos(angle) + dy * np.sin(angle)
        v = dy * np.cos(angle) - dx * np.sin(angle)
        radius = np.hypot(u / radii[0], v / radii[1])
        if lobes is not None:
            around = np.arctan2(v, u)
            ripples = (a / k * np.cos((k + 1) * around) for k, a in enumerate(lobes, 1))
            radius = radius * (1 + sum(ripples))
        return np.clip(0.5 + (1 - radius) * min(radii) / max(edge, self.edge), 0, 1)


def smooth_curve(points: np.ndarray, samples: int = 8) -> np.ndarray:
    """A smooth curve through points (N, 2), without overshoot."""
    points = np.asarray(points, dtype=float)
    knots = np.arange(len(points))
    steps = np.linspace(0, len(points) - 1, samples * (len(points) - 1) + 1)
    return Akima1DInterpolator(knots, points)(steps)


def both_sides(
    rng: np.random.Generator, points: np.ndarray, scale: float = 1.0, centre: tuple[float, float] = (0.0, 0.0)
) -> list[np.ndarray]:
    """The curve and its mirror image, scaled about a centre; the sides differ a little, as they do in people."""
    points = (np.asarray(points) - centre) * scale + centre
    curves = []
    for side in (1, -1):
        uneven = points + rng.normal(0, 0.005, points.shape) + rng.normal(0, 0.008, 2)
        curves.append(smooth_curve(uneven) * [side, 1])
    return curves


def haze(rng: np.random.Generator, canvas: Canvas, tall: float, wide: float | None = None) -> np.ndarray:
    """Smooth noise (H, W) of about unit spread whose blobs measure about `tall` x `wide`, round unless told."""
    knots = rng.standard_normal((round(1 / tall) + 3, round(2 / (wide or tall)) + 3))
    down = _spline(knots.shape[0], canvas.height)
    across = _spline(knots.shape[1], canvas.width)
    return down @ knots.astype(np.float32) @ across.T


def bands(rng: np.random.Generator, canvas: Canvas, wide: float) -> np.ndarray:
    """Smooth noise (W,) of about unit spread, the same in every row: vertical bands about `wide` across."""
    knots = rng.standard_normal(round(2 / wide) + 3)
    return _spline(len(knots), canvas.width) @ knots.astype(np.float32)


@lru_cache(maxsize=64)
def _spline(knots: int, pixels: int) -> np.ndarray:
    """Matrix (pixels, knots) that lays a cubic spline through values at evenly spaced knots, one beyond either end."""
    places = np.linspace(1, knots - 2, pixels)
    return make_interp_spline(np.arange(knots), np.eye(knots), k=3)(places).astype(np.float32)


def trabeculae(rng: np.random.Generator, canvas: Canvas, tall: float, wide: float) -> np.ndarray:
    """Band-pass noise (H, W) of spread about 0.2: a net of struts, `tall` x `wide` patient units."""
    noise = rng.standard_normal((canvas.height, canvas.width)).astype(np.float32)
    sigma = np.maximum(0.6, np.array([tall * canvas.height, wide * canvas.width / 2]))
    band = gaussian_filter(noise, sigma, truncate=3) - gaussian_filter(noise, 2.2 * sigma, truncate=3)
    return 0.2 * band / band.std()
