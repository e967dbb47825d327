"""The lesion-free anatomy behind `phantom.py`: who the patient is, and the attenuation of every structure.

Patient coordinates are x in [-1, 1] (left to right, 0 at the midline) and y in [0, 1] (top to bottom); at the natural 2:1 shape one unit is
the image height, about 150 mm on the detector. Attenuations are in units where soft tissue is about 0.4 and structures that overlap add up.
Angles are in radians. Everything is drawn either by supersampled polygons (bones) or by analytic outlines with soft edges (teeth).
"""

from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw
from scipy.interpolate import Akima1DInterpolator
from scipy.ndimage import gaussian_filter, zoom

MM = 1.25 / 150  # one millimetre of anatomy: panoramic magnification over the height of the detector
ARCH_STRETCH = 1.12  # sideways magnification exceeds the upright one
SUPERSAMPLING = 3
# Mean widths, crown heights and root lengths from central incisor to third molar (Wheeler's Dental Anatomy, rounded), in mm.
UPPER = (
    (8.5, 6.6, 7.6, 7.1, 6.8, 10.3, 9.8, 8.8),
    (10.5, 9.2, 10, 8.5, 8.3, 7.8, 7.4, 6.8),
    (12, 12, 14.5, 12, 12, 11.5, 11, 9.5),
)
LOWER = (
    (5.5, 6.0, 7.0, 7.1, 7.3, 11.0, 10.6, 10.2),
    (9.0, 9.4, 10.8, 8.6, 8.1, 7.6, 7.1, 6.9),
    (13, 14, 16, 15, 15, 15, 14, 11.5),
)
# Half-width of a crown at 0, 20, 45, 75 and 100 % of its height, over its largest, by position in the row (6 stands for all molars).
CROWN_SHAPE = {
    1: (0.86, 0.97, 1.0, 0.92, 0.74), 2: (0.86, 0.97, 1.0, 0.92, 0.74), 3: (0.22, 0.74, 1.0, 0.93, 0.74),
    4: (0.62, 0.94, 1.0, 0.93, 0.76), 5: (0.62, 0.94, 1.0, 0.93, 0.76), 6: (0.84, 0.97, 1.0, 0.94, 0.84),
}  # fmt: skip
# Right half of the mandible: chin, lower border, angle, ramus, condyle, sigmoid notch, coronoid, anterior border.
JAW = ((0, 0.93), (0.14, 0.925), (0.30, 0.897), (0.45, 0.85), (0.59, 0.785), (0.715, 0.70), (0.785, 0.61), (0.805, 0.51), (0.815, 0.40), (0.825, 0.30),
       (0.862, 0.235), (0.858, 0.19), (0.82, 0.178), (0.79, 0.21), (0.775, 0.275), (0.735, 0.30), (0.69, 0.265), (0.665, 0.235), (0.645, 0.27),
       (0.64, 0.36), (0.625, 0.44))  # fmt: skip
CANAL = (
    (0.735, 0.40),
    (0.715, 0.49),
    (0.66, 0.60),
    (0.56, 0.695),
    (0.45, 0.755),
    (0.35, 0.775),
    (0.295, 0.765),
    (0.275, 0.745),
)
SINUS = ((0.13, 0.17), (0.16, 0.10), (0.27, 0.06), (0.43, 0.06), (0.53, 0.11), (0.55, 0.21), (0.52, 0.29), (0.44, 0.335), (0.34, 0.34), (0.25, 0.30),
         (0.17, 0.24))  # fmt: skip


@dataclass(frozen=True)
class Tooth:
    """One tooth: `position` 1 (central incisor) to 8 (third molar); the origin is the middle of the biting edge, the axis points to the apex."""

    position: int
    upper: bool
    x: float
    y: float
    angle: float  # of the axis from straight up (upper) or straight down (lower), positive towards +x
    half_width: float
    crown: float
    root: float
    bend: float = 0.0  # sideways shift of the apex by the curvature of the root
    filling: tuple[float, float, float] | None = (
        None  # sideways centre and half-width in half-widths, depth in crown heights
    )
    crowned: bool = False  # a full metal or ceramic crown
    root_filled: bool = False

    @property
    def axis(self) -> np.ndarray:
        return np.array([np.sin(self.angle), -np.cos(self.angle) if self.upper else np.cos(self.angle)])

    def local(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Depth along the axis from the biting edge, and sideways offset."""
        ax, ay = self.axis
        dx, dy = x - self.x, y - self.y
        return dx * ax + dy * ay, dx * abs(ay) - dy * ax * np.sign(ay)

    def at(self, depth: float, side: float) -> np.ndarray:
        """Patient coordinates of a local point."""
        ax, ay = self.axis
        return np.array([self.x + depth * ax + side * abs(ay), self.y + depth * ay - side * ax * np.sign(ay)])

    @property
    def roots(self) -> tuple[tuple[float, float, float], ...]:
        """Per root: sideways centre at the apex and half-width (both in half-widths), relative length."""
        if self.position <= 5:
            return ((0.0, 0.72, 1.0),)
        spread = 0.5 if self.position < 8 else 0.3
        return ((-spread, 0.36, 0.95), (spread, 0.36, 0.9)) + (((0.05, 0.34, 1.08),) if self.upper else ())


@dataclass(frozen=True)
class Patient:
    """Normal variation: everything that makes two healthy radiographs differ, except texture and noise."""

    teeth: tuple[Tooth, ...]
    missing: tuple[Tooth, ...]
    numbers: dict[str, float] = field(default_factory=dict)  # see _sample_numbers
    jaw: np.ndarray = field(
        default_factory=lambda: np.zeros((0, 2))
    )  # closed outline (N, 2) of the mandible above the crest line

    def occlusal(self, x: np.ndarray | float) -> np.ndarray | float:
        """The occlusal curve: height of the middle between the arches."""
        return self.numbers["occlusal_y"] - self.numbers["smile"] * np.abs(x) ** 2.2

    def gap(self, x: np.ndarray | float) -> np.ndarray | float:
        """Distance between the biting edges: the bite block opens the front."""
        return self.numbers["gap"] + self.numbers["bite"] * np.exp(-((x / 0.22) ** 2))

    def crest(self, x: np.ndarray, upper: bool, loss: np.ndarray | float = 0.0) -> np.ndarray:
        """Height of the alveolar crest, withdrawn from the biting edge by `loss` and where teeth are missing."""
        lengths = np.array((UPPER if upper else LOWER)[1]) * MM * self.numbers["size"]
        places = np.cumsum(np.array((UPPER if upper else LOWER)[0])) * ARCH_STRETCH * MM * self.numbers["size"]
        depth = self.gap(x) / 2 + np.interp(np.abs(x), places, lengths) + self.numbers["recession"] + loss
        for tooth in self.missing:
            if tooth.upper == upper and tooth.position < 8:
                depth = depth + 0.028 * np.exp(-(((x - tooth.x) / (1.3 * tooth.half_width)) ** 2))
        return self.occlusal(x) - depth if upper else self.occlusal(x) + depth


def sample_patient(rng: np.random.Generator) -> Patient:
    """Draw one healthy patient."""
    numbers = _sample_numbers(rng)
    bare = Patient((), (), numbers)
    restored = rng.random() < 0.35
    edentulous = rng.random() < 0.4
    keeps_third_molars = rng.random() < 0.65
    teeth, missing = [], []
    for upper in (True, False):
        for side in (-1, 1):
            edge = 0.0
            for position in range(1, 9):
                tooth, edge = _sample_tooth(rng, bare, position, upper, side, edge)
                draws = rng.random(5)
                lost = (
                    draws[0] > (0.9 if keeps_third_molars else 0.15)
                    if position == 8
                    else edentulous and draws[0] < (0.10 if position > 3 else 0.02)
                )
                if restored and position >= 4 and draws[1] < 0.45:
                    tooth = replace(
                        tooth, filling=(rng.uniform(-0.5, 0.5), rng.uniform(0.3, 0.6), rng.uniform(0.3, 0.65))
                    )
                    tooth = replace(tooth, crowned=draws[2] < 0.12, root_filled=draws[3] < 0.12)
                (missing if lost else teeth).append(tooth)
    patient = Patient(tuple(teeth), tuple(missing), numbers)
    return replace(patient, jaw=_jaw_outline(patient, rng))


def _sample_numbers(rng: np.random.Generator) -> dict[str, float]:
    """Shape, pose and exposure of one patient as named numbers."""
    ranges = {
        "size": (0.93, 1.06), "stretch": (0.93, 1.07), "tilt": (-0.035, 0.035), "shift_x": (-0.03, 0.03),
        "shift_y": (-0.025, 0.025), "occlusal_y": (0.465, 0.505),
        "smile": (0.06, 0.30), "gap": (0.004, 0.018), "bite": (0.008, 0.045), "recession": (0.006, 0.018), "crowding": (0.2, 1.0), "jaw_height": (0.95, 1.05),
        "bone": (0.85, 1.2), "texture": (0.6, 1.4), "sinus": (0.82, 1.12), "sinus_dark": (0.03, 0.12), "spine": (0.10, 0.34), "spine_width": (0.10, 0.2),
        "palate": (0.6, 1.3), "palate_arch": (0.01, 0.05), "palate_air": (0.0, 0.2), "nasal": (0.05, 0.16), "airway": (0.02, 0.10), "canal": (0.03, 0.10),
        "enamel": (0.85, 1.2), "pulp": (0.7, 1.2), "exposure": (-0.05, 0.05), "contrast": (0.88, 1.15), "gamma": (0.85, 1.2),
        "noise": (0.008, 0.02), "blur": (0.0022, 0.0036),
    }  # fmt: skip
    return {name: float(rng.uniform(*bounds)) for name, bounds in ranges.items()}


def _sample_tooth(
    rng: np.random.Generator, patient: Patient, position: int, upper: bool, side: int, edge: float
) -> tuple[Tooth, float]:
    """The next tooth of a quadrant and where it ends; neighbours overlap or gape a little."""
    size, crowding = patient.numbers["size"] * MM, patient.numbers["crowding"]
    width, crown, root = (column[position - 1] * size * rng.normal(1, 0.04) for column in (UPPER if upper else LOWER))
    width *= ARCH_STRETCH
    middle = edge + width / 2
    x = side * middle + 0.003 * rng.normal() * crowding
    height = patient.gap(x) / 2 + 0.004 * rng.normal() * crowding + (0.012 if position == 8 else 0)
    y = patient.occlusal(x) - height if upper else patient.occlusal(x) + height
    slope = 2.2 * patient.numbers["smile"] * middle**1.2
    lean = 0.35 * slope - (0.10 if position < 4 else 0.02) if upper else 0.8 * slope + 0.06 * (position - 3) / 5
    angle = (
        side * (lean if not upper else -lean)
        + 0.05 * rng.normal() * crowding
        + (side * 0.12 * rng.normal() if position == 8 else 0)
    )
    tooth = Tooth(position, upper, x, y, angle, width / 2 * 1.02, crown, root, bend=side * rng.normal(0.008, 0.006))
    return tooth, edge + width * rng.uniform(0.96, 1.01)


def _jaw_outline(patient: Patient, rng: np.random.Generator) -> np.ndarray:
    """Closed outline of the mandible, top edge along the alveolar crest."""
    halves = []
    for side in (-1, 1):
        points = np.array(JAW) * [patient.numbers["size"], 1] + rng.normal(0, 0.006, (len(JAW), 2))
        points[:, 1] = 0.5 + (points[:, 1] - 0.5) * patient.numbers["jaw_height"]
        halves.append(points * [side, 1])
    halves[0][0] = 0.0, halves[0][0, 1]
    around = smooth_curve(np.concatenate([halves[0][::-1], halves[1][1:]]))
    reach = 0.585 * patient.numbers["size"]
    x = np.linspace(reach, -reach, 121)
    top = np.stack([x, patient.crest(x, upper=False)], axis=1)
    return np.concatenate([around, top])


def smooth_curve(points: np.ndarray, samples: int = 8) -> np.ndarray:
    """A smooth curve through points (N, 2), without overshoot."""
    points = np.asarray(points, dtype=float)
    knots = np.arange(len(points))
    return Akima1DInterpolator(knots, points)(np.linspace(0, len(points) - 1, samples * (len(points) - 1) + 1))


class Canvas:
    """Where patient coordinates fall on the pixels of an image of (height, width)."""

    def __init__(self, patient: Patient, height: int, width: int):
        n = patient.numbers
        turn = np.array([[np.cos(n["tilt"]), -np.sin(n["tilt"])], [np.sin(n["tilt"]), np.cos(n["tilt"])]])
        self.matrix = np.diag([width / 2, height]) @ turn @ np.diag([n["stretch"], 1.0])
        self.centre = np.array([0.0, 0.5])
        self.offset = np.array([width / 2 * (1 + n["shift_x"]), height * (0.5 + n["shift_y"])])
        self.height, self.width = height, width
        rows, columns = np.mgrid[0:height, 0:width] + 0.5
        inverse = np.linalg.inv(self.matrix)
        columns, rows = columns - self.offset[0], rows - self.offset[1]
        self.x = (inverse[0, 0] * columns + inverse[0, 1] * rows).astype(np.float32)
        self.y = (inverse[1, 0] * columns + inverse[1, 1] * rows + 0.5).astype(np.float32)
        self.edge = 1.2 / min(height, width / 2)  # width of a soft edge: just over one pixel

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 2) in pixels, x first."""
        return (np.asarray(points) - self.centre) @ self.matrix.T + self.offset

    def window(self, points: np.ndarray) -> tuple[slice, slice]:
        """Rows and columns of the box around the points."""
        low, high = (
            np.floor(self.pixels(points).min(0)).astype(int),
            np.ceil(self.pixels(points).max(0)).astype(int) + 1,
        )
        return slice(max(low[1], 0), max(high[1], 0)), slice(max(low[0], 0), max(high[0], 0))

    def fill(self, points: np.ndarray, blur: float = 0.0) -> np.ndarray:
        """Coverage (H, W) in [0, 1] of a polygon, edges blurred by `blur` patient units."""
        return self._paint(points, blur, lambda draw, flat: draw.polygon(flat, fill=255))

    def line(self, points: np.ndarray, thickness: float, blur: float = 0.0) -> np.ndarray:
        """Coverage of a line; one thinner than a subpixel is drawn at that width and weakened."""
        wanted = thickness * self.height * SUPERSAMPLING
        drawn = max(1, round(wanted))
        return self._paint(
            points, blur, lambda draw, flat: draw.line(flat, fill=255, width=drawn, joint="curve")
        ) * np.float32(min(1.0, wanted / drawn))

    def _paint(self, points: np.ndarray, blur: float, paint) -> np.ndarray:
        image = Image.new("L", (self.width * SUPERSAMPLING, self.height * SUPERSAMPLING))
        paint(ImageDraw.Draw(image), [tuple(p) for p in self.pixels(points) * SUPERSAMPLING])
        cover = np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float32) / 255
        sigma = (blur * self.height, blur * self.width / 2)
        return gaussian_filter(cover, sigma, truncate=3) if blur else cover

    def soft(self, distance: np.ndarray) -> np.ndarray:
        """1 inside (distance > 0), 0 outside, over one soft edge."""
        return np.clip(0.5 + distance / self.edge, 0, 1)


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


def draw_anatomy(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> Scene:
    """All layers of a patient; `rng` feeds the textures."""
    base, bone = draw_soft_tissue(patient, canvas, rng), draw_bone(patient, canvas, rng)
    scene = Scene(base, bone, np.zeros_like(base), np.zeros_like(base))
    for tooth in patient.teeth:
        draw_tooth(scene, canvas, patient, tooth)
    return scene


def both_sides(
    rng: np.random.Generator, points, scale: float = 1.0, centre: tuple[float, float] = (0.0, 0.0)
) -> list[np.ndarray]:
    """The curve and its mirror image, scaled about a centre; the sides differ a little, as they do in people."""
    points = (np.asarray(points) - centre) * scale + centre
    return [
        smooth_curve(points + rng.normal(0, 0.005, points.shape) + rng.normal(0, 0.008, 2)) * [side, 1]
        for side in (1, -1)
    ]


def draw_soft_tissue(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Soft tissue, air, spine ghost, and the thin bones of the midface."""
    n, x, y = patient.numbers, canvas.x, canvas.y
    side = np.abs(x)
    below = 1 / (1 + np.exp(-(y - (0.99 - 0.42 * side**1.5)) / 0.045))
    base = 0.42 - 0.05 * y - 0.20 * below * np.minimum(1, side / 0.35) - 0.10 * np.clip(side - 0.8, 0, 1)
    base += n["spine"] * np.exp(-(np.abs(x / n["spine_width"]) ** 2.5)) * (0.15 + 0.85 * y)
    base += 0.045 * haze(rng, canvas, 0.14) + 0.05 * haze(rng, canvas, 0.05) * np.clip((0.36 - y) / 0.1, 0, 1)
    mouth = np.clip((patient.gap(x) / 2 + 0.022 - np.abs(y - patient.occlusal(x))) / 0.016, 0, 1) * np.clip(
        (0.60 - side) / 0.06, 0, 1
    )
    base -= 0.20 * mouth
    base -= (
        n["airway"]
        * np.exp(-(((side - 0.63 - 0.08 * (y - 0.5)) / 0.045) ** 2))
        * np.clip((y - 0.3) / 0.1, 0, 1)
        * np.clip((0.85 - y) / 0.15, 0, 1)
    )
    roof = 0.285 - n["palate_arch"] * (1 - (x / 0.5) ** 2)
    base -= n["palate_air"] * np.exp(-(((y - roof - 0.03) / 0.018) ** 2)) * np.clip((0.5 - side) / 0.1, 0, 1)
    return (base + draw_midface(patient, canvas, rng)).astype(np.float32)


def draw_midface(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Nasal cavity and septum, palate, zygoma, skull base, hyoid: bright lines and soft patches (H, W)."""
    n, x, y = patient.numbers, canvas.x, canvas.y
    side = np.abs(x)
    layer = -n["nasal"] * np.exp(-(((side - 0.06) / 0.035) ** 2) - np.clip((y - 0.2) / 0.05, 0, None) ** 2)
    layer += 0.5 * n["nasal"] * np.exp(-(((side - 0.075) / 0.016) ** 2) - ((y - 0.14) / 0.05) ** 2)
    layer += 0.16 * canvas.line(smooth_curve([(0.004, -0.05), (-0.004, 0.08), (0.006, 0.17), (0, 0.27)]), 0.012, 0.003)
    t = np.linspace(-0.56, 0.56, 41)
    for drop, thickness, strength in ((0.0, 0.012, 0.20), (0.024, 0.007, 0.12)):
        roof = 0.262 + drop * (1 - (t / 0.56) ** 2) - n["palate_arch"] * (1 - (t / 0.56) ** 2)
        layer += n["palate"] * strength * canvas.line(np.stack([t, roof], 1), thickness, 0.004)
    skull = np.clip((side - 0.60) / 0.25, 0, 1) * np.clip((0.28 - y) / 0.15, 0, 1)
    layer += skull * (0.13 + 0.17 * trabeculae(rng, canvas, 0.009, 0.018))
    paths = (
        (((0.47, 0.30), (0.55, 0.22), (0.68, 0.15), (0.84, 0.12), (1.05, 0.13)), 0.020, 0.10),
        (((0.50, 0.24), (0.62, 0.13), (0.78, 0.06), (1.05, 0.04)), 0.010, 0.12),
        (((0.545, -0.03), (0.55, 0.10), (0.565, 0.20), (0.55, 0.31)), 0.006, 0.12),
        (((0.16, 0.03), (0.30, 0.055), (0.45, 0.05), (0.58, 0.0)), 0.008, 0.12),
        (((0.78, 0.15), (0.86, 0.15), (0.92, 0.19), (1.05, 0.2)), 0.014, 0.14),
        (((0.66, 0.905), (0.75, 0.875), (0.84, 0.89), (0.90, 0.87)), 0.034, 0.13),
    )
    for points, thickness, strength in paths:
        for curve in both_sides(rng, points):
            layer += strength * rng.uniform(0.6, 1.3) * canvas.line(curve, thickness, 0.005)
    return layer


def draw_bone(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Mandible with cortex and canal, maxilla with sinuses, both with trabecular texture."""
    n, x, y = patient.numbers, canvas.x, canvas.y
    jaw = canvas.fill(patient.jaw, 0.002)
    body = np.clip((0.72 - np.abs(x)) / 0.2, 0, 1)
    bone = jaw * (0.13 + 0.13 * body)
    bone += (
        0.22
        * n["texture"]
        * jaw
        * (0.35 + 0.65 * body)
        * (0.6 * trabeculae(rng, canvas, 0.004, 0.006) + 0.5 * trabeculae(rng, canvas, 0.008, 0.013))
    )
    lower = patient.jaw[: 2 * 8 * (len(JAW) - 1) + 1]
    bone += 0.24 * canvas.line(lower, 0.022, 0.003) * jaw * np.clip((y - 0.50) / 0.2, 0, 1) + 0.09 * canvas.line(
        lower, 0.010, 0.003
    )
    for curve in both_sides(rng, CANAL, n["size"], (0.0, 0.72)):
        bone += n["canal"] * (0.8 * canvas.line(curve, 0.030, 0.002) - 1.7 * canvas.line(curve, 0.018, 0.003)) * jaw
        bone -= 0.8 * n["canal"] * np.exp(-(((x - curve[-1, 0]) / 0.013) ** 2) - ((y - curve[-1, 1]) / 0.012) ** 2)
    bone += draw_maxilla(patient, canvas, rng)
    return (n["bone"] * bone).astype(np.float32)


def draw_maxilla(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Alveolar process of the upper jaw, tuberosities, sinuses with a bright floor."""
    n = patient.numbers
    reach = 0.60 * n["size"]
    t = np.linspace(-reach, reach, 121)
    crest = patient.crest(t, upper=True) - 0.05 * np.clip((np.abs(t) - reach + 0.06) / 0.06, 0, 1) ** 2
    top = np.stack([t[::-1], 0.245 - n["palate_arch"] * (1 - (t / reach) ** 2)], 1)
    fade = np.clip((canvas.y - 0.23) / 0.10, 0, 1) * np.clip((reach - np.abs(canvas.x)) / 0.05, 0, 1)
    maxilla = canvas.fill(np.concatenate([np.stack([t, crest], 1), top]), 0.003) * fade
    bone = maxilla * (0.15 + 0.17 * n["texture"] * trabeculae(rng, canvas, 0.006, 0.005))
    for curve in both_sides(rng, SINUS + SINUS[:1], n["sinus"], (0.33, 0.14)):
        bone += 0.14 * canvas.line(curve, 0.007, 0.002) * np.clip((canvas.y - 0.02) / 0.25, 0, 1) - n[
            "sinus_dark"
        ] * canvas.fill(curve, 0.012)
    return bone


def haze(rng: np.random.Generator, canvas: Canvas, scale: float) -> np.ndarray:
    """Smooth noise (H, W) of unit spread whose blobs measure about `scale`."""
    coarse = rng.standard_normal((round(1 / scale) + 3, round(2 / scale) + 3))
    fine = zoom(coarse, (canvas.height / (coarse.shape[0] - 2), canvas.width / (coarse.shape[1] - 2)), order=3)
    return fine[: canvas.height, : canvas.width].astype(np.float32)


def trabeculae(rng: np.random.Generator, canvas: Canvas, tall: float, wide: float) -> np.ndarray:
    """Band-pass noise (H, W) of spread about 0.2: a net of struts, `tall` x `wide` patient units."""
    noise = rng.standard_normal((canvas.height, canvas.width)).astype(np.float32)
    sigma = np.maximum(0.6, np.array([tall * canvas.height, wide * canvas.width / 2]))
    band = gaussian_filter(noise, sigma, truncate=3) - gaussian_filter(noise, 2.2 * sigma, truncate=3)
    return 0.2 * band / band.std()


def outline(tooth: Tooth, depth: np.ndarray, side: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed distance to the tooth's outline (positive inside), the same for its crown alone, and for its canals."""
    a, c, r, p = tooth.half_width, tooth.crown, tooth.root, tooth.position
    shape = CROWN_SHAPE[min(p, 6)]
    half = a * np.interp(depth / c, (0, 0.2, 0.45, 0.75, 1.0), shape)
    if p <= 3:
        cusps = 0.0
    elif p <= 5:
        cusps = 0.06 * c * (1 - np.cos(1.25 * np.pi * side / a))
    else:
        cusps = 0.10 * c * (1 + np.cos(1.9 * np.pi * side / a))
    top = depth - cusps - 0.25 * c * np.clip(np.abs(side) / a, 0, 1) ** 6
    crown = np.minimum(np.minimum(half - np.abs(side), top), 1.03 * c - depth)
    pulp = np.minimum(0.26 * a - np.abs(side), np.minimum(depth - 0.55 * c, 1.15 * c - depth))
    whole, canals, trunk = crown, pulp, 0.0
    if p > 5:
        trunk = 0.28 * r
        whole = np.maximum(
            whole, np.minimum(shape[-1] * a - np.abs(side), np.minimum(depth - 0.9 * c, c + trunk - depth))
        )
    for apex, width, length in tooth.roots:
        along = np.clip((depth - 0.95 * c) / (length * r), 0, 1.0)
        centre = a * apex * (0.72 + 0.5 * along) + tooth.bend * along**2
        offset = np.abs(side - centre)
        root_half = a * width * np.sqrt(np.clip(1.0 - along**2.2, 0, 1)) * (1 - 0.22 * along)
        whole = np.maximum(
            whole, np.minimum(root_half - offset, np.minimum(depth - 0.95 * c, 0.95 * c + length * r - depth))
        )
        ends = np.minimum(depth - 0.9 * c, 0.93 * length * r + c - depth)
        canals = np.maximum(canals, np.minimum(0.3 * a * width * (1.05 - along) + 0.0006 - offset, ends))
    return whole, crown, canals


def apex(tooth: Tooth, root: int) -> np.ndarray:
    """Patient coordinates of a root tip."""
    centre, _, length = tooth.roots[root]
    return tooth.at(0.95 * tooth.crown + length * tooth.root, 1.22 * tooth.half_width * centre + tooth.bend)


def tooth_window(canvas: Canvas, tooth: Tooth, margin: float = 0.03) -> tuple[slice, slice]:
    """The pixels a tooth and its socket can touch."""
    reach, long = 1.3 * tooth.half_width + abs(tooth.bend) + margin, tooth.crown + 1.1 * tooth.root + margin
    return canvas.window(np.array([tooth.at(d, s) for d in (-margin, long) for s in (-reach, reach)]))


def draw_tooth(scene: Scene, canvas: Canvas, patient: Patient, tooth: Tooth) -> None:
    """Add a tooth with ligament space and restorations to the layers, in place."""
    n, box = patient.numbers, tooth_window(canvas, tooth)
    depth, side = tooth.local(canvas.x[box], canvas.y[box])
    whole, crown, canals = outline(tooth, depth, side)
    cover = canvas.soft(whole)
    ligament, lamina = canvas.soft(whole + 0.006) - cover, canvas.soft(whole + 0.013) - canvas.soft(whole + 0.006)
    in_bone = np.clip((depth - tooth.crown) / 0.01, 0, 1)
    scene.bone[box] *= 1 - 0.65 * cover - in_bone * (0.40 * ligament - 0.22 * lamina)
    thickness = np.sqrt(np.clip(np.maximum(whole, 0) / (0.55 * tooth.half_width), 0.12, 1))
    enamel_depth = 0.0135 * np.clip(1.12 - depth / tooth.crown, 0, 1) * (1.15 if tooth.position > 5 else 1.0)
    enamel = (
        canvas.soft(crown)
        * (1 - canvas.soft(crown - enamel_depth))
        * np.clip((tooth.crown - depth) / (0.12 * tooth.crown), 0, 1)
    )
    dentine = (
        cover * (0.17 + 0.22 * thickness) * (1 - 0.16 * in_bone * np.clip(depth / (tooth.crown + tooth.root), 0, 1))
    )
    pulp = 0.10 * n["pulp"] * canvas.soft(canals)
    scene.teeth[box] += dentine + n["enamel"] * (0.13 * enamel + 0.10 * canvas.soft(crown)) - pulp
    scene.metal[box] += _restorations(canvas, tooth, depth, side, crown, canals)


def _restorations(
    canvas: Canvas, tooth: Tooth, depth: np.ndarray, side: np.ndarray, crown: np.ndarray, canals: np.ndarray
) -> np.ndarray:
    """Fillings, crowns and root fillings of one tooth."""
    metal = np.zeros_like(depth)
    if tooth.filling:
        centre, half, deep = tooth.filling
        wide, tall = half * tooth.half_width, deep * tooth.crown
        blob = (
            (1 - ((side - centre * tooth.half_width) / wide) ** 4 - (depth / tall).clip(0) ** 4) * min(wide, tall) / 4
        )
        metal += 0.9 * canvas.soft(np.minimum(blob, crown))
    if tooth.crowned:
        metal = np.maximum(metal, 0.8 * canvas.soft(crown + 0.003))
    if tooth.root_filled:
        metal += 0.5 * canvas.soft(canals)
    return metal
