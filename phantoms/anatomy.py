"""The healthy head as a whole: soft tissue and midface, jaws, and the teeth in their place."""

import numpy as np

from phantoms.canvas import Canvas, Scene
from phantoms.jaws import draw_jaws
from phantoms.midface import draw_midface
from phantoms.patient import Patient
from phantoms.soft_tissue import draw_soft_tissue
from phantoms.teeth import draw_tooth


def draw_anatomy(patient: Patient, canvas: Canvas, rng: np.random.Generator) -> Scene:
    """All layers of a patient; `rng` feeds the textures, and is asked the same whatever the teeth."""
    base = draw_soft_tissue(patient, canvas, rng) + draw_midface(patient, canvas, rng)
    base = base.astype(np.float32)
    bone = draw_jaws(patient, canvas, rng)
    scene = Scene(base, bone, np.zeros_like(base), np.zeros_like(base))
    for tooth in patient.teeth:
        draw_tooth(scene, canvas, patient, tooth)
    return scene
