"""Who the patient is: teeth, jaw outline and the named numbers that make two healthy radiographs differ."""

from dataclasses import dataclass, field, replace

import numpy as np

from phantoms.canvas import MM, smooth_curve

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
    (0, 0.945), (0.14, 0.94), (0.30, 0.917), (0.46, 0.87), (0.62, 0.802), (0.77, 0.715), (0.865, 0.61),
    (0.895, 0.50), (0.90, 0.39), (0.905, 0.29), (0.94, 0.225), (0.94, 0.165), (0.90, 0.14), (0.865, 0.17),
    (0.845, 0.25), (0.80, 0.295), (0.755, 0.26), (0.72, 0.22), (0.695, 0.25), (0.685, 0.34), (0.655, 0.44),
)  # fmt: skip
# What varies from patient to patient, each number uniform within its bounds.
RANGES = {
    # the head in the scanner
    "size": (0.94, 1.06),  # of jaws and teeth
    "stretch": (0.94, 1.06),  # sideways magnification: how far the head stood from the focal trough
    "tilt": (-0.035, 0.035),
    "shift_x": (-0.03, 0.03),
    "shift_y": (-0.025, 0.025),
    # teeth
    "occlusal_y": (0.475, 0.515),
    "smile": (0.06, 0.38),  # curvature of the occlusal plane: chin down
    "gap": (0.004, 0.020),  # between the biting edges
    "bite": (0.006, 0.040),  # what the bite block adds at the front
    "recession": (0.004, 0.018),  # of the alveolar crest from the necks of the teeth
    "crowding": (0.3, 1.0),
    "enamel": (0.8, 1.2),
    "pulp": (0.7, 1.3),
    # bone
    "jaw_height": (0.95, 1.05),
    "bone": (0.85, 1.2),
    "texture": (0.6, 1.4),
    "cortex": (0.06, 0.16),
    "canal": (0.02, 0.09),
    "sinus": (0.84, 1.12),
    "sinus_dark": (0.03, 0.12),
    "palate": (0.6, 1.4),
    "palate_y": (0.225, 0.265),
    "palate_arch": (0.0, 0.035),
    # soft tissue and air
    "nasal": (0.08, 0.22),
    "tongue": (0.0, 0.06),
    "palate_air": (0.0, 0.24),  # between tongue and palate
    "palate_gap": (0.014, 0.032),
    "cheek": (0.0, 0.05),  # air behind the last molars
    "airway": (0.02, 0.09),
    "neck": (0.20, 0.32),  # how much thinner it gets below the jaw
    # veils
    "spine": (0.05, 0.24),
    "spine_width": (0.14, 0.30),
    "ghost": (0.0, 0.07),  # of the opposite jaw
    "ghost_y": (0.62, 0.78),
    # scanner
    "exposure": (-0.05, 0.0),
    "contrast": (0.94, 1.10),
    "gamma": (0.92, 1.12),
    "noise": (0.004, 0.010),
    "blur": (0.0020, 0.0036),
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
    neck: float = 1.0  # relative width of the neck
    spread: float = 1.0  # relative distance of the roots of a molar
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
        spread = self.spread * (0.5 if self.position < 8 else 0.3)
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
        places = np.cumsum(widths) * MM * self.numbers["size"]
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
            after_gap = False
            for tooth in _sample_quadrant(rng, bare, upper, side):
                draws = rng.random(5)
                if tooth.position == 8:
                    lost = draws[0] > (0.9 if keeps_third_molars else 0.15)
                else:
                    lost = gappy and draws[0] < (0.10 if tooth.position > 3 else 0.02)
                if restored and tooth.position >= 4 and draws[1] < 0.45:
                    tooth = _restore(rng, tooth, draws)
                if after_gap:
                    tooth = _tipped(tooth, side * 0.25 * draws[4])
                after_gap = lost
                (missing if lost else teeth).append(tooth)
    patient = Patient(tuple(teeth), tuple(missing), numbers)
    return replace(patient, jaw=_jaw_outline(patient, rng))


def _sample_quadrant(rng: np.random.Generator, patient: Patient, upper: bool, side: int) -> list[Tooth]:
    """The eight teeth of a quadrant from the midline outwards; neighbours overlap or gape a little."""
    n = patient.numbers
    crowding = n["crowding"]
    edge = rng.uniform(-0.002, 0.004)
    lift = rng.normal(0, 0.003)
    wander = rng.normal(0, 0.04)
    teeth = []
    for position in range(1, 9):
        mean_size = np.array(UPPER if upper else LOWER)[:, position - 1] * MM * n["size"]
        width, crown, root = mean_size * np.maximum(rng.normal(1, (0.05, 0.07, 0.10)), 0.75)
        turned = rng.normal(0, 0.5 * crowding)  # about its own axis: seen narrower
        width *= 1 - 0.22 * np.sin(turned) ** 2
        middle = edge + width / 2
        x = side * middle + 0.003 * crowding * rng.normal()
        height = patient.gap(x) / 2 + lift + 0.006 * crowding * rng.normal() + (0.012 if position == 8 else 0)
        y = patient.occlusal(x) - height if upper else patient.occlusal(x) + height
        wander = 0.6 * wander + rng.normal(0, 0.06)  # neighbours lean alike
        slope = 2.2 * n["smile"] * middle**1.2
        if upper:
            lean = (0.08 if position < 4 else 0.02) - 0.35 * slope
        else:
            lean = 0.8 * slope + 0.16 * (position - 3) / 5
        angle = side * (lean + wander) + 0.09 * crowding * rng.normal()
        if position == 8:
            angle += side * 0.15 * rng.normal()
        bend, neck, spread = rng.normal((0.009, 1, 1), (0.009, 0.05, 0.2))
        shape = {"bend": side * bend, "neck": neck, "spread": np.clip(spread, 0.5, 1.5)}
        teeth.append(Tooth(position, upper, x, y, angle, width / 2 * 1.02, crown, root, **shape))
        edge += width * (1.02 - 0.12 * crowding * rng.random())
    return teeth


def _tipped(tooth: Tooth, angle: float) -> Tooth:
    """The tooth tipped about its root, as it leans into a gap."""
    arm = tooth.crown + 0.6 * tooth.root
    pivot = tooth.at(arm, 0.0)
    turned = replace(tooth, angle=tooth.angle + angle)
    x, y = pivot - arm * turned.axis
    return replace(turned, x=x, y=y)


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
    reach = 0.62 * patient.numbers["size"]
    x = np.linspace(reach, -reach, 121)
    top = np.stack([x, patient.crest(x, upper=False)], axis=1)
    return np.concatenate([around, top])
