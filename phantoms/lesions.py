"""The six lesions: each draws itself into a copy of the healthy layers and touches nothing else."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from phantoms.canvas import MM, Canvas, Scene
from phantoms.patient import JAW, Patient, Tooth
from phantoms.teeth import draw_tooth, outline, tooth_window


@dataclass(frozen=True)
class Case:
    """A healthy patient about to fall ill; `redraw` draws another patient with the same textures."""

    patient: Patient
    canvas: Canvas
    healthy: Scene
    redraw: Callable[[Patient], Scene]


def choose(rng: np.random.Generator, teeth: list[Tooth]) -> Tooth:
    """One of the teeth, each as likely."""
    return teeth[rng.integers(len(teeth))]


def draw_caries(case: Case, rng: np.random.Generator) -> Scene:
    """A dark notch where two crowns meet, eaten into enamel and dentine."""
    canvas = case.canvas
    scene = case.healthy.copy()
    sound = [t for t in case.patient.teeth if 3 <= t.position <= 7 and not t.crowned and t.filling is None]
    tooth = choose(rng, sound or list(case.patient.teeth))
    radius = rng.uniform(0.015, 0.024)
    side = rng.choice([-1, 1]) * (tooth.half_width - 0.35 * radius)
    centre = tooth.at(rng.uniform(0.35, 0.65) * tooth.crown, side)
    radii = (radius, rng.uniform(0.8, 1.3) * radius)
    notch = canvas.blob(centre, radii, tooth.angle, 0.008, rng.normal(0, 0.06, 3))
    depth, across = tooth.local(canvas.x, canvas.y)
    _, crown, _ = outline(tooth, depth, across)
    scene.teeth *= 1 - rng.uniform(0.75, 0.95) * notch * canvas.soft(crown + 0.002)
    return scene


def draw_periapical(case: Case, rng: np.random.Generator) -> Scene:
    """A dark round patch with a fuzzy border around a root tip."""
    scene = case.healthy.copy()
    tooth = choose(rng, [t for t in case.patient.teeth if t.position <= 7])
    centre = tooth.apex(rng.integers(len(tooth.roots)))
    radius = rng.uniform(0.026, 0.042)
    radii = (radius, radius * rng.uniform(0.85, 1.2))
    turn = rng.uniform(0, 3)
    patch = case.canvas.blob(centre, radii, turn, 0.022, rng.normal(0, 0.05, 3))
    scene.bone -= patch * (rng.uniform(0.55, 0.8) * scene.bone.clip(0) + rng.uniform(0.12, 0.18))
    return scene


def draw_cyst(case: Case, rng: np.random.Generator) -> Scene:
    """A large dark oval with a thin bright rim in the body or the angle of the lower jaw."""
    scene = case.healthy.copy()
    side = rng.choice([-1, 1])
    radii = rng.uniform((0.075, 0.062), (0.115, 0.085))
    along = rng.uniform(0.15, 0.68) * case.patient.numbers["size"]
    border = np.interp(along, *np.array(JAW[:8]).T) - 0.02
    centre = np.array([side * along, border - radii[1] - 0.015])
    angle = -side * np.interp(along, (0, 0.7), (0.1, 0.75))
    lobes = rng.normal(0, 0.025, 3)
    hole = case.canvas.blob(centre, tuple(radii), angle, 0.006, lobes)
    rim = case.canvas.blob(centre, tuple(radii + 0.009), angle, 0.006, lobes) - hole
    scene.bone -= hole * (rng.uniform(0.7, 0.9) * scene.bone.clip(0) + 0.15) - rng.uniform(0.10, 0.18) * rim
    scene.teeth *= 1 - 0.35 * hole
    return scene


def draw_impacted(case: Case, rng: np.random.Generator) -> Scene:
    """A whole tooth across the bone: a third molar behind its neighbour, or another tooth below or above the row."""
    scene = case.healthy.copy()
    free = [t for t in case.patient.missing if t.position == 8 and not t.upper]
    if free:
        model = choose(rng, free)
        x, y = np.array([model.x * rng.uniform(1.05, 1.12), model.y + rng.uniform(0.02, 0.06) + model.crown])
        lying = replace(model, x=x, y=y, angle=np.sign(model.x) * rng.uniform(0.7, 1.5))
    else:
        model = choose(rng, [t for t in case.patient.teeth if not t.upper and 3 <= t.position <= 5])
        turned = replace(model, angle=rng.choice([-1, 1]) * rng.uniform(1.0, 1.45))
        middle = model.at(model.crown + model.root + 0.035, 0.0)
        x, y = middle - turned.axis * 0.5 * (model.crown + model.root)
        lying = replace(turned, x=x, y=y)
    tooth = replace(lying, filling=None, crowned=False, root_filled=False)
    centre = tooth.at(0.45 * tooth.crown, 0)
    radii = (tooth.half_width + 0.011, tooth.crown * 0.62 + 0.008)
    follicle = case.canvas.blob(centre, radii, tooth.angle, 0.008)
    scene.bone -= follicle * 0.4 * scene.bone.clip(0)
    draw_tooth(scene, case.canvas, case.patient, tooth)
    return scene


def draw_implant(case: Case, rng: np.random.Generator) -> Scene:
    """A threaded screw where a tooth is missing (or takes its place), with or without a crown."""
    patient, canvas = case.patient, case.canvas
    sites = [t for t in patient.missing if t.position <= 7]
    tooth = choose(rng, sites or [t for t in patient.teeth if 3 < t.position <= 7])
    others = tuple(t for t in patient.teeth if t is not tooth)
    scene = case.healthy.copy() if sites else case.redraw(replace(patient, teeth=others))
    box = tooth_window(canvas, tooth)
    depth, side = tooth.local(canvas.x[box], canvas.y[box])
    neck = tooth.crown
    length = rng.uniform(0.085, 0.11)
    half = rng.uniform(0.014, 0.019)
    along = np.clip((depth - neck) / length, 0, 1)
    thread = 0.003 * np.abs(np.sin(np.pi * (depth - neck) / (2 * MM)))
    profile = half * (1 - 0.35 * along**2) + thread - np.abs(side)
    screw = np.minimum(profile, np.minimum(depth - neck + 0.004, neck + length - depth))
    metal = 1.3 * canvas.soft(screw)
    if rng.random() < 0.6:
        post = np.minimum(0.75 * half - np.abs(side), np.minimum(depth - 0.4 * neck, neck + 0.01 - depth))
        _, crown, _ = outline(tooth, depth, side)
        superstructure = np.maximum(1.1 * canvas.soft(post), 0.8 * canvas.soft(crown))
        metal = np.maximum(metal, superstructure)
    scene.metal[box] = np.maximum(scene.metal[box], metal)
    return scene


def draw_bone_loss(case: Case, rng: np.random.Generator) -> Scene:
    """The alveolar crest withdrawn along several neighbouring teeth: the bone between their roots is gone."""
    patient = case.patient
    scene = case.healthy.copy()
    tooth = choose(rng, [t for t in patient.teeth if 2 <= t.position <= 7])
    reach = rng.uniform(0.10, 0.17)
    drop = rng.uniform(0.045, 0.075)
    x = np.linspace(tooth.x - reach, tooth.x + reach, 61)
    ripple = 1 + 0.18 * np.sin(60 * x + rng.uniform(0, 6))
    profile = drop * (1 - ((x - tooth.x) / reach) ** 4) * ripple
    edge = np.stack([x, patient.crest(x, tooth.upper, -0.012)], 1)
    bottom = np.stack([x, patient.crest(x, tooth.upper, profile.clip(-0.01))], 1)
    region = case.canvas.fill(np.concatenate([edge, bottom[::-1]]), 0.003)
    scene.bone -= region * (rng.uniform(0.8, 0.95) * scene.bone.clip(0) + 0.12)
    return scene


DRAW = {
    "caries": draw_caries,
    "periapical": draw_periapical,
    "cyst": draw_cyst,
    "impacted": draw_impacted,
    "implant": draw_implant,
    "bone_loss": draw_bone_loss,
}
LESIONS = tuple(DRAW)
