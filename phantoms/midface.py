"""Attenuation of the thin bones above the teeth: nose, palate with its ghost, cheekbone, skull base, hyoid."""

import numpy as np

from phantoms.canvas import Canvas, both_sides, haze, smooth_curve, trabeculae
from phantoms.patient import Patient

SEPTUM = ((0.004, -0.05), (-0.004, 0.08), (0.006, 0.17), (0, 0.25))
# Bright lines of the right side: points, thickness, attenuation, blur.
LINES = (
    (((0.46, 0.29), (0.52, 0.20), (0.62, 0.13), (0.80, 0.095), (1.05, 0.10)), 0.030, 0.08, 0.006),  # zygomatic arch
    (((0.50, 0.22), (0.60, 0.10), (0.78, 0.045), (1.05, 0.03)), 0.010, 0.11, 0.004),
    (((0.545, -0.03), (0.555, 0.10), (0.57, 0.20), (0.55, 0.30)), 0.007, 0.12, 0.003),  # back wall of the sinus
    (((0.60, -0.03), (0.60, 0.09), (0.585, 0.18), (0.56, 0.27)), 0.007, 0.08, 0.003),  # pterygoid plate
    (((0.14, 0.01), (0.28, 0.05), (0.43, 0.045), (0.58, -0.01)), 0.008, 0.11, 0.003),  # floor of the orbit
    (((0.18, 0.09), (0.32, 0.12), (0.47, 0.10), (0.56, 0.05)), 0.006, 0.07, 0.003),
    (((0.10, -0.03), (0.125, 0.08), (0.13, 0.16), (0.10, 0.23)), 0.008, 0.10, 0.004),  # wall of the nose
    (((0.80, 0.12), (0.86, 0.10), (0.94, 0.10), (1.02, 0.15)), 0.016, 0.12, 0.005),  # joint socket
    (((0.98, 0.16), (0.965, 0.28), (0.945, 0.42)), 0.008, 0.07, 0.004),  # styloid process
    (((1.05, 0.80), (0.92, 0.83), (0.82, 0.845), (0.73, 0.86)), 0.024, 0.07, 0.010),  # hyoid
    (((0.78, 0.845), (0.75, 0.855), (0.725, 0.87)), 0.055, 0.09, 0.012),
)
PALATE_REACH = 0.64


def draw_midface(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Nose, palate, bright lines and the dense skull base: (H, W)."""
    layer = _draw_nose(patient, canvas, rng) + _draw_palate(patient, canvas, rng) + _draw_skull(canvas, rng)
    for points, thickness, strength, blur in LINES:
        for curve in both_sides(rng, points):
            layer += strength * rng.uniform(0.7, 2.2) * canvas.line(curve, thickness, blur)
    return layer


def _draw_nose(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Two dark cavities with a shell in each, and the septum between."""
    n, y = patient.numbers, canvas.y
    side = np.abs(canvas.x)
    layer = -n["nasal"] * np.exp(-(((side - 0.065) / 0.045) ** 2) - np.clip((y - 0.17) / 0.05, 0, None) ** 2)
    for sign in (-1, 1):
        centre = np.array([sign * rng.normal(0.085, 0.008), rng.normal(0.13, 0.015)])
        shell = canvas.blob(centre, (rng.uniform(0.02, 0.035), rng.uniform(0.035, 0.06)), sign * 0.2, 0.02)
        layer += n["nasal"] * rng.uniform(0.4, 1.0) * shell
    return layer + 0.13 * canvas.line(smooth_curve(SEPTUM), 0.014, 0.003)


def _draw_palate(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """The hard palate as two bright lines, and above them its ghost, blurred along the beam's way."""
    n = patient.numbers
    t = np.linspace(-PALATE_REACH, PALATE_REACH, 41)
    dome = 1 - (t / PALATE_REACH) ** 2
    ghost = -rng.uniform(0.04, 0.08)
    layer = np.zeros((canvas.height, canvas.width), np.float32)
    lines = ((0.0, 0.016, 0.34, 0.004), (0.028, 0.008, 0.20, 0.003), (ghost, 0.024, 0.14, 0.008))
    for drop, thickness, strength, blur in lines:
        warp = np.interp(t, np.linspace(-0.7, 0.7, 7), rng.normal(0, 0.005, 7)) + rng.normal(0, 0.012) * t
        roof = n["palate_y"] + warp + (drop - n["palate_arch"]) * dome
        layer += n["palate"] * strength * canvas.line(smooth_curve(np.stack([t, roof], 1)[::5]), thickness, blur)
    fade = np.clip((PALATE_REACH - np.abs(canvas.x)) / 0.12, 0, 1)
    return layer * fade * (1 + 0.25 * haze(rng, canvas, 0.3, 0.12))


def _draw_skull(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """The dense bone in the upper corners, and sideways streaks over the middle."""
    side = np.abs(canvas.x)
    corner = np.clip((side - 0.62) / 0.3, 0, 1) * np.clip((0.26 - canvas.y) / 0.2, 0, 1)
    cells = trabeculae(rng, canvas, 0.008, 0.02)
    streaks = haze(rng, canvas, 0.035, 0.22) * np.clip((0.30 - canvas.y) / 0.1, 0, 1)
    return corner * (0.34 + 0.40 * cells) + 0.05 * streaks
