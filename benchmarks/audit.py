"""How small a lesion survives, before any GPU day is spent: python benchmarks/audit.py --preset cpu --data.root ./data

Takes the flags of inference.py and the checkpoints it would take. The normals of every other validation patient say
what is usual, and the discs lie in the rest: a normal that had a say in its own threshold would flatter it. Implants
discs of known radius and contrast, darker and brighter in turn, and prints per radius

survives     what is left of the contrast in dec(enc(x)): near 0, the autoencoder has lost the lesion, and G with it
found        share of the discs in which the final map exceeds its threshold somewhere
false        the same for the places without their discs: what chance would find

Radii are shares of the image's height: 0.01 is 5 pixels at 512. Writes audit.csv beside the figures of phase 4.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from calibration import NEEDED, Calibration, calibrate
from checks import UsageError
from command_line import parse_command
from config import Config
from examination import open_normalizer, read_normals, reader_of
from files import write_csv
from normalizer import Examined, Normalizer
from runtime import run_script, stream_seed
from survey import magnification_of

RADII = (0.005, 0.01, 0.02, 0.04, 0.08)  # shares of the height: a caries, a periapical lesion, a cyst
CONTRAST = 0.3  # in units of [-1, 1]
NORMALS = 30  # at most
COLUMNS = ["radius", "radius_px", "discs", "survives", "found", "false"]


def main() -> None:
    model, config = open_normalizer(parse_command(__doc__))
    normals, method = read_normals(model, config, "val"), config.inference.method
    least, everyone = max(2, 2 * NEEDED[method] - 1), list(dict.fromkeys(normals.patients))
    if len(everyone) < least:
        raise UsageError(
            f"the audit with method {method} needs validation normals of {least} patients, half of them for "
            f"thresholds, and they are of {len(everyone)}: add some to the split val"
        )
    reader = reader_of(model, config) if method == "reader" else None
    heard = set(everyone[::2])
    usual = [row for row, patient in enumerate(normals.patients) if patient in heard]
    whose, shapes = ([each[row] for row in usual] for each in (normals.patients, normals.shapes))
    calibration = calibrate(model, normals.images[usual], config, reader, whose, shapes)
    images = normals.images[[row for row, patient in enumerate(normals.patients) if patient not in heard][:NORMALS]]
    found = np.zeros((len(RADII), len(images), 3))
    for number in tqdm(range(found.shape[1]), desc="audit", unit="image"):
        found[:, number] = audit_one(images[number], number, model, calibration, config)
    rows = [
        [f"{radius:g}", f"{radius * images.shape[1]:.1f}", found.shape[1], *(f"{mean:.2f}" for mean in means)]
        for radius, means in zip(RADII, found.mean(axis=1), strict=True)
    ]
    out = Path(config.inference.output) / "audit.csv"
    write_csv(out, COLUMNS, rows)
    for row in [COLUMNS, *rows]:
        print("".join(f"{value!s:>11}" for value in row))
    print(f"contrast {CONTRAST}, method {config.inference.method}; wrote {out}")


def audit_one(
    image: np.ndarray, number: int, model: Normalizer, calibration: Calibration, config: Config
) -> list[tuple[float, bool, bool]]:
    """A disc of each radius in one normal: what survives of it, is it found, and is its place without it."""
    normal, times = torch.from_numpy(image)[None, None], magnification_of(config)
    without = model.examine(normal, times)
    above_without = calibration.anomaly_map(without, config).cpu() > calibration.pixel_threshold
    rows = []
    for radius in RADII:
        random = np.random.default_rng(stream_seed(config.runtime.seed, "audit", number, radius))
        opacity = torch.from_numpy(disc(image.shape, radius, random))[None, None]
        sign = -1 if number % 2 else 1
        with_it = model.examine((normal + sign * CONTRAST * opacity).clamp(-1, 1), times)
        above = calibration.anomaly_map(with_it, config).cpu() > calibration.pixel_threshold
        inside = opacity > 0.5
        rows.append((survival(with_it, without), bool(above[inside].any()), bool(above_without[inside].any())))
    return rows


def disc(shape: tuple[int, int], radius: float, random: np.random.Generator) -> np.ndarray:
    """Opacity (H, W) in [0, 1] of a disc of this radius with an edge of two pixels, somewhere in the jaws."""
    height, width = shape
    row, column = round(random.uniform(0.35, 0.8) * height), round(random.uniform(0.15, 0.85) * width)
    rows, columns = np.mgrid[:height, :width]
    distance = np.hypot(rows - row, columns - column)
    return np.clip(0.5 + (radius * height - distance) / 2, 0, 1).astype(np.float32)


def survival(with_it: Examined, without: Examined) -> float:
    """The share of a change of x that is left in dec(enc(x)): its projection on the change (least squares)."""
    change = with_it.x - without.x
    left = with_it.reconstruction - without.reconstruction
    return float((change * left).sum() / change.square().sum().clamp_min(1e-12))


if __name__ == "__main__":
    run_script(main)
