"""Attenuation of what is not bone: the head's soft tissue, air, tongue, and the veils that the moving beam leaves."""

import numpy as np

from phantoms.canvas import Canvas, bands, both_sides, haze
from phantoms.patient import JAW, Patient

# Airway of the right side: behind the soft palate, down across the ramus, to the throat.
PHARYNX = ((0.60, 0.27), (0.70, 0.30), (0.79, 0.38), (0.82, 0.50), (0.79, 0.62), (0.74, 0.74))
SOFT_PALATE = ((0.50, 0.265), (0.60, 0.30), (0.68, 0.36), (0.715, 0.43))


def draw_soft_tissue(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Soft tissue with its air, the ghosts of what lay out of focus, and uneven exposure: (H, W) float32."""
    layers = (
        _draw_head(patient, canvas)
        + _draw_veils(patient, canvas, rng)
        + _draw_tongue(patient, canvas, rng)
        - _draw_mouth(patient, canvas)
        - _draw_airway(patient, canvas, rng)
        + _draw_unevenness(canvas, rng)
    )
    return layers.astype(np.float32)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def _draw_head(patient: Patient, canvas: Canvas) -> np.ndarray:
    """Cheeks and neck; below the jaw's border the beam meets ever less."""
    n, y = patient.numbers, canvas.y
    side = np.abs(canvas.x)
    across, down = np.array(JAW[:8]).T
    border = 0.5 + (np.interp(side / n["size"], across, down) - 0.5) * n["jaw_height"]
    below = _sigmoid((y - border - 0.004) / (0.008 + 0.05 * side))
    thin = 0.05 + n["neck"] * np.clip((y - 0.58) / 0.36, 0, 1)
    upper = np.clip((0.25 - y) / 0.2, 0, 1)
    return 0.43 + 0.07 * side + 0.05 * upper - below * thin


def _draw_veils(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Cervical spine and bite rod over the middle; over either ramus the opposite jaw, whose lower edge is a step."""
    n, x, y = patient.numbers, canvas.x, canvas.y
    ridges = 1 + 0.12 * bands(rng, canvas, 0.06)
    column = np.exp(-(np.abs(x / n["spine_width"]) ** 3)) * ridges
    layer = n["spine"] * column * (0.10 + 0.90 * np.clip((y - 0.35) / 0.5, 0, 1))
    rod = np.array([(0.0, n["occlusal_y"]), (rng.normal(0, 0.01), 1.05)])
    layer += rng.uniform(0, 0.08) * canvas.line(rod, 0.02, 0.004)
    for side in (-1, 1):
        lowest = n["ghost_y"] + rng.normal(0, 0.015)
        slope = rng.normal(0.04, 0.03)
        away = side * x
        above = _sigmoid((lowest + slope * (away - 0.7) - y) / 0.006)
        layer += n["ghost"] * above * np.clip((away - 0.42) / 0.25, 0, 1) * np.clip((y - 0.33) / 0.2, 0, 1)
    return layer


def _draw_tongue(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """The tongue's wide dome and the soft palate."""
    n = patient.numbers
    layer = n["tongue"] * canvas.blob(np.array([0.0, 0.62]), (0.60, 0.32), 0.0, 0.05, rng.normal(0, 0.03, 3))
    for curve in both_sides(rng, SOFT_PALATE):
        layer += 0.06 * rng.uniform(0.5, 1.3) * canvas.line(curve, 0.05, 0.012)
    return layer


def _draw_mouth(patient: Patient, canvas: Canvas) -> np.ndarray:
    """How much the air between the rows of teeth, wider in the cheeks, and above the tongue takes away."""
    n, x, y = patient.numbers, canvas.x, canvas.y
    side = np.abs(x)
    cheek = np.clip((side - 0.50) / 0.12, 0, 1)
    half = patient.gap(x) / 2 + 0.018 + n["cheek"] * cheek
    between = np.clip((half - np.abs(y - patient.occlusal(x))) / (0.016 + 0.03 * cheek), 0, 1)
    mouth = 0.17 * between * (1 - 0.4 * cheek) * np.clip((0.68 - side) / 0.05, 0, 1)
    roof = n["palate_y"] + 0.035 - n["palate_arch"] * (1 - (x / 0.5) ** 2)
    above_tongue = np.exp(-(((y - roof) / n["palate_gap"]) ** 2)) * np.clip((0.5 - side) / 0.1, 0, 1)
    return mouth + n["palate_air"] * above_tongue


def _draw_airway(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """How much the pharynx, dark over either ramus, and the air beside the front teeth take away."""
    n, x, y = patient.numbers, canvas.x, canvas.y
    layer = np.zeros((canvas.height, canvas.width), np.float32)
    for curve in both_sides(rng, PHARYNX):
        layer += n["airway"] * rng.uniform(0.7, 1.2) * canvas.line(curve, rng.uniform(0.05, 0.10), 0.014)
    for side in (-1, 1):
        away = side * x - rng.normal(0.13, 0.02)
        tall = np.clip((y - 0.24) / 0.1, 0, 1) * np.clip((0.62 - y) / 0.15, 0, 1)
        layer += 0.07 * rng.uniform(0.3, 1.2) * np.exp(-((away / 0.05) ** 2)) * tall
    return layer


def _draw_unevenness(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Exposure that drifts across the picture, clouds of soft tissue, and bands where the scanner's speed wavers."""
    lean = rng.normal(0, (0.02, 0.03))
    drift = lean[0] * canvas.x + lean[1] * (canvas.y - 0.5)
    clouds = 0.022 * haze(rng, canvas, 0.16) + 0.014 * haze(rng, canvas, 0.05, 0.16)
    return drift + clouds + 0.012 * bands(rng, canvas, 0.12) + 0.006 * bands(rng, canvas, 0.03)
