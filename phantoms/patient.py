"""Who the patient is: teeth, jaw outline and the named numbers that make two healthy radiographs differ."""

from dataclasses import dataclass, field, replace

import numpy as np

from phantoms.canvas import MM, smooth_curve

ARCH_STRETCH = 1.12  # sideways magnification exceeds the upright one
# Mean crown widths, crown heights, root lengths from central incisor to third molar, mm (Wheeler's Dental Anatomy).
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
# Right half of the mandible: chin, lower border, angle, ramus, condyle, sigmoid notch, coronoid, anterior border.
JAW = (
    (0, 0.93), (0.14, 0.925), (0.30, 0.897), (0.45, 0.85), (0.59, 0.785), (0.715, 0.70), (0.785, 0.61),
    (0.805, 0.51), (0.815, 0.40), (0.825, 0.30), (0.862, 0.235), (0.858, 0.19), (0.82, 0.178), (0.79, 0.21),
    (0.775, 0.275), (0.735, 0.30), (0.69, 0.265), (0.665, 0.235), (0.645, 0.27), (0.64, 0.36), (0.625, 0.44),
)  # fmt: skip
# What varies from patient to patient, each number uniform within its bounds.
RANGES = {
    "size": (0.93, 1.06),  # of jaws and teeth
    "stretch": (0.93, 1.07),  # sideways magnification: how far the head stood from the focal trough
    "tilt": (-0.035, 0.035),
    "shift_x": (-0.03, 0.03),
    "shift_y": (-0.025, 0.025),
    "occlusal_y": (0.465, 0.505),
    "smile": (0.06, 0.30),  # curvature of the occlusal plane: chin down
    "gap": (0.004, 0.018),  # between the biting edges
    "bite": (0.008, 0.045),  # what the bite block adds at the front
    "recession": (0.006, 0.018),  # of the alveolar crest from the necks of the teeth
    "crowding": (0.2, 1.0),
    "jaw_height": (0.95, 1.05),
    "bone": (0.85, 1.2),
    "texture": (0.6, 1.4),
    "sinus": (0.82, 1.12),
    "sinus_dark": (0.03, 0.12),
    "spine": (0.10, 0.34),  # ghost of the cervical spine
    "spine_width": (0.10, 0.2),
    "palate": (0.6, 1.3),
    "palate_arch": (0.01, 0.05),
    "palate_air": (0.0, 0.2),  # between tongue and palate
    "nasal": (0.05, 0.16),
    "airway": (0.02, 0.10),
    "canal": (0.03, 0.10),
    "enamel": (0.85, 1.2),
    "pulp": (0.7, 1.2),
    "exposure": (-0.05, 0.05),
    "contrast": (0.88, 1.15),
    "gamma": (0.85, 1.2),
    "noise": (0.008, 0.02),
    "blur": (0.0022, 0.0036),
}


@dataclass(frozen=True)
class Tooth:
    """One tooth; the origin is the middle of the biting edge, the axis points to the apex."""

    position: int  # 1 (central incisor) to 8 (third molar)
    upper: bool
    x: float
    y: float
    angle: float  # of the axis from straight up (upper) or straight down (lower), positive towards +x
    half_width: float
    crown: float
    root: float
    bend: float = 0.0  # sideways shift of the apex by the curvature of the root
    filling: tuple[float, float, float] | None = None  # centre and half-width in half-widths, depth in crown heights
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
        buccal = ((-spread, 0.36, 0.95), (spread, 0.36, 0.9))
        palatal = (0.05, 0.34, 1.08)
        return (*buccal, palatal) if self.upper else buccal

    def apex(self, root: int) -> np.ndarray:
        """Patient coordinates of a root tip."""
        centre, _, length = self.roots[root]
        return self.at(0.95 * self.crown + length * self.root, 1.22 * self.half_width * centre + self.bend)


@dataclass(frozen=True)
class Patient:
    """Normal variation: everything that makes two healthy radiographs differ, except texture and noise."""

    teeth: tuple[Tooth, ...]
    missing: tuple[Tooth, ...]
    numbers: dict[str, float] = field(default_factory=dict)  # one for each of RANGES
    jaw: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))  # closed outline (N, 2), lower border first

    def occlusal(self, x: np.ndarray | float) -> np.ndarray | float:
        """The occlusal curve: height of the middle between the arches."""
        return self.numbers["occlusal_y"] - self.numbers["smile"] * np.abs(x) ** 2.2

    def gap(self, x: np.ndarray | float) -> np.ndarray | float:
        """Distance between the biting edges: the bite block opens the front."""
        return self.numbers["gap"] + self.numbers["bite"] * np.exp(-((x / 0.22) ** 2))

    def crest(self, x: np.ndarray, upper: bool, loss: np.ndarray | float = 0.0) -> np.ndarray:
        """Height of the alveolar crest, withdrawn from the biting edge by `loss` and where teeth are missing."""
        widths, crowns, _ = UPPER if upper else LOWER
        lengths = np.array(crowns) * MM * self.numbers["size"]
        places = np.cumsum(widths) * ARCH_STRETCH * MM * self.numbers["size"]
        depth = self.gap(x) / 2 + np.interp(np.abs(x), places, lengths) + self.numbers["recession"] + loss
        for tooth in self.missing:
            if tooth.upper == upper and tooth.position < 8:
                depth = depth + 0.028 * np.exp(-(((x - tooth.x) / (1.3 * tooth.half_width)) ** 2))
        return self.occlusal(x) - depth if upper else self.occlusal(x) + depth

    @property
    def lower_border(self) -> np.ndarray:
        """The jaw's outline (M, 2) without its alveolar crest."""
        return self.jaw[: 2 * 8 * (len(JAW) - 1) + 1]


def sample_patient(rng: np.random.Generator) -> Patient:
    """Draw one healthy patient."""
    numbers = {name: float(rng.uniform(*bounds)) for name, bounds in RANGES.items()}
    bare = Patient((), (), numbers)
    restored = rng.random() < 0.35
    gappy = rng.random() < 0.4
    keeps_third_molars = rng.random() < 0.65
    teeth, missing = [], []
    for upper in (True, False):
        for side in (-1, 1):
            edge = 0.0
            for position in range(1, 9):
                tooth, edge = _sample_tooth(rng, bare, position, upper, side, edge)
                draws = rng.random(5)
                if position == 8:
                    lost = draws[0] > (0.9 if keeps_third_molars else 0.15)
                else:
                    lost = gappy and draws[0] < (0.10 if position > 3 else 0.02)
                if restored and position >= 4 and draws[1] < 0.45:
                    tooth = _restore(rng, tooth, draws)
                (missing if lost else teeth).append(tooth)
    patient = Patient(tuple(teeth), tuple(missing), numbers)
    return replace(patient, jaw=_jaw_outline(patient, rng))


def _sample_tooth(
    rng: np.random.Generator, patient: Patient, position: int, upper: bool, side: int, edge: float
) -> tuple[Tooth, float]:
    """The next tooth of a quadrant and where it ends; neighbours overlap or gape a little."""
    size = patient.numbers["size"] * MM
    crowding = patient.numbers["crowding"]
    width, crown, root = (column[position - 1] * size * rng.normal(1, 0.04) for column in (UPPER if upper else LOWER))
    width *= ARCH_STRETCH
    middle = edge + width / 2
    x = side * middle + 0.003 * rng.normal() * crowding
    height = patient.gap(x) / 2 + 0.004 * rng.normal() * crowding + (0.012 if position == 8 else 0)
    y = patient.occlusal(x) - height if upper else patient.occlusal(x) + height
    slope = 2.2 * patient.numbers["smile"] * middle**1.2
    if upper:
        lean = (0.10 if position < 4 else 0.02) - 0.35 * slope
    else:
        lean = 0.8 * slope + 0.06 * (position - 3) / 5
    angle = side * lean + 0.05 * rng.normal() * crowding
    if position == 8:
        angle += side * 0.12 * rng.normal()
    tooth = Tooth(position, upper, x, y, angle, width / 2 * 1.02, crown, root, bend=side * rng.normal(0.008, 0.006))
    return tooth, edge + width * rng.uniform(0.96, 1.01)


def _restore(rng: np.random.Generator, tooth: Tooth, draws: np.ndarray) -> Tooth:
    """The tooth with a filling, perhaps a crown and a root filling."""
    filling = (rng.uniform(-0.5, 0.5), rng.uniform(0.3, 0.6), rng.uniform(0.3, 0.65))
    return replace(tooth, filling=filling, crowned=draws[2] < 0.12, root_filled=draws[3] < 0.12)


def _jaw_outline(patient: Patient, rng: np.random.Generator) -> np.ndarray:
    """Closed outline of the mandible, top edge along the alveolar crest."""
    halves = []
    for side in (-1, 1):
        points = np.array(JAW) * [patient.numbers["size"], 1] + rng.normal(0, 0.006, (len(JAW), 2))
        points[:, 1] = 0.5 + (points[:, 1] - 0.5) * patient.numbers["jaw_height"]
        halves.append(points * [side, 1])
    halves[0][0, 0] = 0.0  # the halves meet at the chin
    around = smooth_curve(np.concatenate([halves[0][::-1], halves[1][1:]]))
    reach = 0.585 * patient.numbers["size"]
    x = np.linspace(reach, -reach, 121)
    top = np.stack([x, patient.crest(x, upper=False)], axis=1)
    return np.concatenate([around, top])
