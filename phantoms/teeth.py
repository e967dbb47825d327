"""Attenuation of one tooth: enamel, dentine, pulp, the socket it leaves in the bone, and its restorations."""

import numpy as np

from phantoms.canvas import Canvas, Scene
from phantoms.patient import Patient, Tooth

# Half-width of a crown at 0, 20, 45, 75 and 100 % of its height, over its largest, by position (6 stands for molars).
CROWN_SHAPE = {
    1: (0.86, 0.97, 1.00, 0.92, 0.74),
    2: (0.86, 0.97, 1.00, 0.92, 0.74),
    3: (0.22, 0.74, 1.00, 0.93, 0.74),
    4: (0.62, 0.94, 1.00, 0.93, 0.76),
    5: (0.62, 0.94, 1.00, 0.93, 0.76),
    6: (0.84, 0.97, 1.00, 0.94, 0.84),
}


def outline(tooth: Tooth, depth: np.ndarray, side: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed distance to the tooth's outline (positive inside), the same for its crown alone, and for its canals."""
    half_width = tooth.half_width
    neck = tooth.crown
    crown = crown_outline(tooth, depth, side)
    whole = crown
    canals = _band(side, 0.26 * half_width, depth, 0.55 * neck, 1.15 * neck)
    if tooth.position > 5:
        trunk_width = CROWN_SHAPE[6][-1] * half_width
        whole = np.maximum(whole, _band(side, trunk_width, depth, 0.9 * neck, neck + 0.28 * tooth.root))
    for apex, width, length in tooth.roots:
        long = length * tooth.root
        along = np.clip((depth - 0.95 * neck) / long, 0, 1.0)
        centre = half_width * apex * (0.72 + 0.5 * along) + tooth.bend * along**2
        offset = np.abs(side - centre)
        taper = half_width * width * np.sqrt(np.clip(1.0 - along**2.2, 0, 1)) * (1 - 0.36 * along)
        whole = np.maximum(whole, _band(offset, taper, depth, 0.95 * neck, 0.95 * neck + long))
        bore = 0.3 * half_width * width * (1.05 - along) + 0.0006
        canals = np.maximum(canals, _band(offset, bore, depth, 0.9 * neck, 0.93 * length * tooth.root + neck))
    return whole, crown, canals


def crown_outline(tooth: Tooth, depth: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of the crown, cusps included."""
    half_width = tooth.half_width
    neck = tooth.crown
    shape = np.array(CROWN_SHAPE[min(tooth.position, 6)]) * (1, 1, 1, 1, tooth.neck)
    half = half_width * np.interp(depth / neck, (0, 0.2, 0.45, 0.75, 1.0), shape)
    if tooth.position <= 3:
        cusps = 0.0
    elif tooth.position <= 5:
        cusps = 0.06 * neck * (1 - np.cos(1.25 * np.pi * side / half_width))
    else:
        cusps = 0.10 * neck * (1 + np.cos(1.9 * np.pi * side / half_width))
    rounded = 0.25 * neck * np.clip(np.abs(side) / half_width, 0, 1) ** 6
    top = depth - cusps - rounded
    return np.minimum(np.minimum(half - np.abs(side), top), 1.03 * neck - depth)


def _band(side: np.ndarray, half: np.ndarray | float, depth: np.ndarray, start: float, end: float) -> np.ndarray:
    """Signed distance to the border of what lies within `half` of the axis, from `start` to `end` along it."""
    return np.minimum(half - np.abs(side), np.minimum(depth - start, end - depth))


def tooth_window(canvas: Canvas, tooth: Tooth, margin: float = 0.03) -> tuple[slice, slice]:
    """The pixels a tooth and its socket can touch."""
    reach = 1.3 * tooth.half_width + abs(tooth.bend) + margin
    long = tooth.crown + 1.1 * tooth.root + margin
    corners = [tooth.at(depth, side) for depth in (-margin, long) for side in (-reach, reach)]
    return canvas.window(np.array(corners))


def draw_tooth(scene: Scene, canvas: Canvas, patient: Patient, tooth: Tooth) -> None:
    """Add a tooth with ligament space and restorations to the layers, in place."""
    n = patient.numbers
    box = tooth_window(canvas, tooth)
    depth, side = tooth.local(canvas.x[box], canvas.y[box])
    whole, crown, canals = outline(tooth, depth, side)
    cover = canvas.soft(whole)
    in_bone = np.clip((depth - tooth.crown) / 0.01, 0, 1)
    near = canvas.soft(whole + 0.006)
    ligament = near - cover
    lamina = canvas.soft(whole + 0.013) - near
    scene.bone[box] *= 1 - 0.55 * cover - in_bone * (0.40 * ligament - 0.22 * lamina)

    thickness = np.sqrt(np.clip(np.maximum(whole, 0) / (0.55 * tooth.half_width), 0.12, 1))
    fading = 1 - 0.20 * in_bone * np.clip((depth - tooth.crown) / tooth.root, 0, 1)
    dentine = cover * (0.12 + 0.18 * thickness) * fading
    crown_cover = canvas.soft(crown)
    enamel_depth = 0.0135 * np.clip(1.12 - depth / tooth.crown, 0, 1) * (1.15 if tooth.position > 5 else 1.0)
    above_neck = np.clip((tooth.crown - depth) / (0.12 * tooth.crown), 0, 1)
    enamel = crown_cover * (1 - canvas.soft(crown - enamel_depth)) * above_neck
    pulp = 0.11 * n["pulp"] * fading**2 * canvas.soft(canals)
    tissue = dentine + n["enamel"] * (0.15 * enamel + 0.10 * crown_cover) - pulp
    # Where neighbours overlap only a part of each lies in focus, so they do not quite add up.
    others = scene.teeth[box]
    scene.teeth[box] = np.maximum(others, tissue) + 0.35 * np.minimum(others, tissue)
    scene.metal[box] += _restorations(canvas, tooth, depth, side, crown, canals)


def _restorations(
    canvas: Canvas, tooth: Tooth, depth: np.ndarray, side: np.ndarray, crown: np.ndarray, canals: np.ndarray
) -> np.ndarray:
    """Fillings, crowns and root fillings of one tooth."""
    metal = np.zeros_like(depth)
    if tooth.filling:
        centre, half, deep = tooth.filling
        wide = half * tooth.half_width
        tall = deep * tooth.crown
        sideways = (side - centre * tooth.half_width) / wide
        inlay = (1 - sideways**4 - (depth / tall).clip(0) ** 4) * min(wide, tall) / 4
        metal += 0.9 * canvas.soft(np.minimum(inlay, crown))
    if tooth.crowned:
        metal = np.maximum(metal, 0.8 * canvas.soft(crown + 0.003))
    if tooth.root_filled:
        metal += 0.5 * canvas.soft(canals)
    return metal
