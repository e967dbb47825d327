"""Attenuation of a healthy head: soft tissue and air, the midface, both jaws, and the teeth in their place."""

import numpy as np

from phantoms.canvas import Canvas, Scene, both_sides, haze, smooth_curve, trabeculae
from phantoms.patient import Patient
from phantoms.teeth import draw_tooth

# Mandibular canal of the right side, from its entry behind the ramus to the mental foramen.
CANAL = (
    (0.735, 0.40), (0.715, 0.49), (0.66, 0.60), (0.56, 0.695), (0.45, 0.755), (0.35, 0.775), (0.295, 0.765),
    (0.275, 0.745),
)  # fmt: skip
# Outline of the right maxillary sinus.
SINUS = (
    (0.13, 0.17), (0.16, 0.10), (0.27, 0.06), (0.43, 0.06), (0.53, 0.11), (0.55, 0.21), (0.52, 0.29), (0.44, 0.335),
    (0.34, 0.34), (0.25, 0.30), (0.17, 0.24),
)  # fmt: skip
# Bright lines of the right side: points, thickness, attenuation.
MIDFACE_LINES = (
    (((0.47, 0.30), (0.55, 0.22), (0.68, 0.15), (0.84, 0.12), (1.05, 0.13)), 0.020, 0.10),
    (((0.50, 0.24), (0.62, 0.13), (0.78, 0.06), (1.05, 0.04)), 0.010, 0.12),
    (((0.545, -0.03), (0.55, 0.10), (0.565, 0.20), (0.55, 0.31)), 0.006, 0.12),
    (((0.16, 0.03), (0.30, 0.055), (0.45, 0.05), (0.58, 0.0)), 0.008, 0.12),
    (((0.78, 0.15), (0.86, 0.15), (0.92, 0.19), (1.05, 0.2)), 0.014, 0.14),
    (((0.66, 0.905), (0.75, 0.875), (0.84, 0.89), (0.90, 0.87)), 0.034, 0.13),
)
SEPTUM = ((0.004, -0.05), (-0.004, 0.08), (0.006, 0.17), (0, 0.27))


def draw_anatomy(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> Scene:
    """All layers of a patient; `rng` feeds the textures."""
    base = draw_soft_tissue(patient, canvas, rng)
    bone = draw_bone(patient, canvas, rng)
    scene = Scene(base, bone, np.zeros_like(base), np.zeros_like(base))
    for tooth in patient.teeth:
        draw_tooth(scene, canvas, patient, tooth)
    return scene


def draw_soft_tissue(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Soft tissue, air, spine ghost, and the thin bones of the midface."""
    n, x, y = patient.numbers, canvas.x, canvas.y
    side = np.abs(x)
    below = 1 / (1 + np.exp(-(y - (0.99 - 0.42 * side**1.5)) / 0.045))
    base = 0.42 - 0.05 * y - 0.20 * below * np.minimum(1, side / 0.35) - 0.10 * np.clip(side - 0.8, 0, 1)
    base += n["spine"] * np.exp(-(np.abs(x / n["spine_width"]) ** 2.5)) * (0.15 + 0.85 * y)
    base += 0.045 * haze(rng, canvas, 0.14) + 0.05 * haze(rng, canvas, 0.05) * np.clip((0.36 - y) / 0.1, 0, 1)

    between = np.clip((patient.gap(x) / 2 + 0.022 - np.abs(y - patient.occlusal(x))) / 0.016, 0, 1)
    mouth = between * np.clip((0.60 - side) / 0.06, 0, 1)
    base -= 0.20 * mouth
    throat = np.exp(-(((side - 0.63 - 0.08 * (y - 0.5)) / 0.045) ** 2))
    base -= n["airway"] * throat * np.clip((y - 0.3) / 0.1, 0, 1) * np.clip((0.85 - y) / 0.15, 0, 1)
    roof = 0.285 - n["palate_arch"] * (1 - (x / 0.5) ** 2)
    base -= n["palate_air"] * np.exp(-(((y - roof - 0.03) / 0.018) ** 2)) * np.clip((0.5 - side) / 0.1, 0, 1)
    return (base + draw_midface(patient, canvas, rng)).astype(np.float32)


def draw_midface(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Nasal cavity and septum, palate, zygoma, skull base, hyoid: bright lines and soft patches (H, W)."""
    n, y = patient.numbers, canvas.y
    side = np.abs(canvas.x)
    layer = -n["nasal"] * np.exp(-(((side - 0.06) / 0.035) ** 2) - np.clip((y - 0.2) / 0.05, 0, None) ** 2)
    layer += 0.5 * n["nasal"] * np.exp(-(((side - 0.075) / 0.016) ** 2) - ((y - 0.14) / 0.05) ** 2)
    layer += 0.16 * canvas.line(smooth_curve(SEPTUM), 0.012, 0.003)
    t = np.linspace(-0.56, 0.56, 41)
    for drop, thickness, strength in ((0.0, 0.012, 0.20), (0.024, 0.007, 0.12)):
        roof = 0.262 + drop * (1 - (t / 0.56) ** 2) - n["palate_arch"] * (1 - (t / 0.56) ** 2)
        layer += n["palate"] * strength * canvas.line(np.stack([t, roof], 1), thickness, 0.004)
    skull = np.clip((side - 0.60) / 0.25, 0, 1) * np.clip((0.28 - y) / 0.15, 0, 1)
    layer += skull * (0.13 + 0.17 * trabeculae(rng, canvas, 0.009, 0.018))
    for points, thickness, strength in MIDFACE_LINES:
        for curve in both_sides(rng, points):
            layer += strength * rng.uniform(0.6, 1.3) * canvas.line(curve, thickness, 0.005)
    return layer


def draw_bone(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Mandible with cortex and canal, maxilla with sinuses, both with trabecular texture."""
    n, x, y = patient.numbers, canvas.x, canvas.y
    jaw = canvas.fill(patient.jaw, 0.002)
    body = np.clip((0.72 - np.abs(x)) / 0.2, 0, 1)
    bone = jaw * (0.13 + 0.13 * body)
    net = 0.6 * trabeculae(rng, canvas, 0.004, 0.006) + 0.5 * trabeculae(rng, canvas, 0.008, 0.013)
    bone += 0.22 * n["texture"] * jaw * (0.35 + 0.65 * body) * net
    thick_cortex = 0.24 * canvas.line(patient.lower_border, 0.022, 0.003) * jaw * np.clip((y - 0.50) / 0.2, 0, 1)
    bone += thick_cortex + 0.09 * canvas.line(patient.lower_border, 0.010, 0.003)
    for curve in both_sides(rng, CANAL, n["size"], (0.0, 0.72)):
        walls = 0.8 * canvas.line(curve, 0.030, 0.002) - 1.7 * canvas.line(curve, 0.018, 0.003)
        bone += n["canal"] * walls * jaw
        foramen = np.exp(-(((x - curve[-1, 0]) / 0.013) ** 2) - ((y - curve[-1, 1]) / 0.012) ** 2)
        bone -= 0.8 * n["canal"] * foramen
    bone += draw_maxilla(patient, canvas, rng)
    return (n["bone"] * bone).astype(np.float32)


def draw_maxilla(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Alveolar process of the upper jaw, tuberosities, sinuses with a bright floor."""
    n = patient.numbers
    reach = 0.60 * n["size"]
    t = np.linspace(-reach, reach, 121)
    crest = patient.crest(t, upper=True) - 0.05 * np.clip((np.abs(t) - reach + 0.06) / 0.06, 0, 1) ** 2
    roof = 0.245 - n["palate_arch"] * (1 - (t / reach) ** 2)
    border = np.concatenate([np.stack([t, crest], 1), np.stack([t[::-1], roof], 1)])
    fade = np.clip((canvas.y - 0.23) / 0.10, 0, 1) * np.clip((reach - np.abs(canvas.x)) / 0.05, 0, 1)
    maxilla = canvas.fill(border, 0.003) * fade
    bone = maxilla * (0.15 + 0.17 * n["texture"] * trabeculae(rng, canvas, 0.006, 0.005))
    for curve in both_sides(rng, SINUS + SINUS[:1], n["sinus"], (0.33, 0.14)):
        wall = 0.14 * canvas.line(curve, 0.007, 0.002) * np.clip((canvas.y - 0.02) / 0.25, 0, 1)
        bone += wall - n["sinus_dark"] * canvas.fill(curve, 0.012)
    return bone
