"""Attenuation of both jaws: cortex, canal and trabecular bone below; alveolar process and sinuses above."""

import numpy as np

from phantoms.canvas import Canvas, both_sides, haze, smooth_curve, trabeculae
from phantoms.patient import Patient

# Mandibular canal of the right side, from its entry behind the ramus to the mental foramen.
CANAL = (
    (0.80, 0.38), (0.775, 0.48), (0.71, 0.60), (0.60, 0.70), (0.48, 0.765), (0.37, 0.79), (0.305, 0.78), (0.285, 0.755),
)  # fmt: skip
OBLIQUE_RIDGE = ((0.695, 0.36), (0.685, 0.46), (0.64, 0.56), (0.54, 0.65))
CHIN_RIDGE = ((-0.16, 0.90), (-0.07, 0.875), (0, 0.86), (0.07, 0.875), (0.16, 0.90))
# Outline of the right maxillary sinus.
SINUS = (
    (0.13, 0.17), (0.16, 0.10), (0.27, 0.06), (0.43, 0.06), (0.53, 0.11), (0.55, 0.21), (0.52, 0.28), (0.44, 0.32),
    (0.34, 0.325), (0.25, 0.29), (0.17, 0.235),
)  # fmt: skip


def draw_jaws(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Both jaws without teeth: (H, W) float32."""
    bone = _draw_mandible(patient, canvas, rng) + _draw_maxilla(patient, canvas, rng)
    return (patient.numbers["bone"] * bone).astype(np.float32)


def _draw_mandible(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Lower jaw: its density varies from place to place, its lower cortex is a soft bright band."""
    n, x, y = patient.numbers, canvas.x, canvas.y
    jaw = canvas.fill(patient.jaw, 0.003)
    body = np.clip((0.75 - np.abs(x)) / 0.25, 0, 1)
    density = 1 + 0.22 * haze(rng, canvas, 0.12) + 0.12 * haze(rng, canvas, 0.04)
    net = 0.6 * trabeculae(rng, canvas, 0.004, 0.006) + 0.35 * trabeculae(rng, canvas, 0.006, 0.011)
    patchy = np.clip(1 + 0.6 * haze(rng, canvas, 0.15), 0.1, None)
    bone = jaw * (0.06 + 0.05 * body) * density
    bone += 0.13 * n["texture"] * jaw * (0.25 + 0.75 * body) * patchy * net

    lower = np.clip((y - 0.55) / 0.2, 0, 1)
    cortex = n["cortex"] * canvas.line(patient.lower_border, 0.044, 0.006) * jaw * lower
    bone += cortex + 0.06 * canvas.line(patient.lower_border, 0.012, 0.003)
    bone += 0.05 * canvas.line(smooth_curve(CHIN_RIDGE), 0.02, 0.010)
    for curve in both_sides(rng, OBLIQUE_RIDGE, n["size"], (0.0, 0.5)):
        bone += 0.07 * rng.uniform(0.3, 1.2) * canvas.line(curve, 0.018, 0.006)
    return bone + _draw_canals(patient, canvas, rng) * jaw


def _draw_canals(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """The mandibular canals: dark between two thin walls, seen better here than there, ending in a dark opening."""
    n, x, y = patient.numbers, canvas.x, canvas.y
    layer = np.zeros((canvas.height, canvas.width), np.float32)
    visible = np.clip(0.8 + 0.5 * haze(rng, canvas, 0.2), 0, None)
    for curve in both_sides(rng, CANAL, n["size"], (0.0, 0.72)):
        walls = 0.8 * canvas.line(curve, 0.030, 0.002) - 1.5 * canvas.line(curve, 0.018, 0.003)
        foramen = np.exp(-(((x - curve[-1, 0]) / 0.014) ** 2) - ((y - curve[-1, 1]) / 0.012) ** 2)
        layer += n["canal"] * (visible * walls - 0.8 * foramen)
    return layer


def _draw_maxilla(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Alveolar process of the upper jaw, tuberosities, sinuses with a bright floor."""
    n = patient.numbers
    reach = 0.63 * n["size"]
    t = np.linspace(-reach, reach, 121)
    crest = patient.crest(t, upper=True) - 0.05 * np.clip((np.abs(t) - reach + 0.06) / 0.06, 0, 1) ** 2
    roof = n["palate_y"] - 0.01 - n["palate_arch"] * (1 - (t / reach) ** 2)
    border = np.concatenate([np.stack([t, crest], 1), np.stack([t[::-1], roof], 1)])
    fade = np.clip((canvas.y - 0.20) / 0.12, 0, 1) * np.clip((reach - np.abs(canvas.x)) / 0.06, 0, 1)
    maxilla = canvas.fill(border, 0.004) * fade
    density = 1 + 0.25 * haze(rng, canvas, 0.10)
    bone = maxilla * (0.08 * density + 0.13 * n["texture"] * trabeculae(rng, canvas, 0.006, 0.005))
    for curve in both_sides(rng, SINUS + SINUS[:1], n["sinus"], (0.33, 0.14)):
        wall = 0.12 * canvas.line(curve, 0.008, 0.002) * np.clip(canvas.y / 0.25, 0, 1)
        bone += wall - n["sinus_dark"] * canvas.fill(curve, 0.012)
    return bone
