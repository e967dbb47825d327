"""A reader judged without a label: python benchmarks/rehearsal.py --preset cpu --data.root ./data --reader.steps 4000

Takes the flags of inference.py and the checkpoints it would take, trains the reader if it is not there (give each one
that is tried its own --inference.calibration), and shows it validation normals with one thing in each that does not
belong. This is where settings of the reader are chosen, never the test split. Two families of things, by size:

corruption   what a reader may learn from (corruption.py), by radius
blob         fainter than most of what a reader learns from: smooth and of one grey, darker in every other normal

Prints for each the image AUROC against the normals as they are, and the pixel AP, of the reader's map alone (what a
score hears beside it is left out). A normal is left out of the statistics that its own map is standardized by.
Radii are pixels of an image 512 high. Writes rehearsal.csv beside the figures of phase 4.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import expit
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anomaly import blur_share, image_score
from calibration import refuse_too_few, views_of_verdicts
from command_line import parse_command
from config import Config
from config_reading import ReaderConfig
from corruption import corrupt
from examination import open_normalizer, read_normals, reader_of
from files import write_csv
from metrics import auroc, pixel_average_precision
from normalizer import Normalizer
from reader import Reader
from runtime import run_script, stream_seed
from standardization import PixelStatistics
from survey import magnification_of

HEIGHT = 512  # of the image whose pixels the radii below are given in
BANDS = ((2.5, 5), (5, 10), (10, 20), (20, 40))  # radii of corruptions
BLOBS = tuple((radius, contrast) for radius in (6, 12, 24) for contrast in (0.15, 0.3))  # in units of [-1, 1]
COLUMNS = ["family", "what", "images", "auroc", "pixel_ap"]


class Rehearsal(NamedTuple):
    """Validation normals with something in each, (N, H, W), and where it is, bool (N, H, W)."""

    family: str
    what: str
    images: np.ndarray
    masks: np.ndarray


def main() -> None:
    model, config = open_normalizer(parse_command(__doc__))
    config = replace(config, inference=replace(config.inference, method="reader"))
    normals = read_normals(model, config, "val")
    refuse_too_few(len(set(normals.patients)), "reader")
    reader = reader_of(model, config)
    rows = rehearse(model, reader, normals.images, config, normals.patients)
    write_table(rows, Path(config.inference.output) / "rehearsal.csv")


def write_table(rows: list[list], out: Path) -> None:
    """As a file, and on the screen."""
    write_csv(out, COLUMNS, rows)
    for row in [COLUMNS, *rows]:
        print("".join(f"{value!s:>22}" for value in row))
    print(f"wrote {out}")


def rehearse(model: Normalizer, reader: Reader, normals: np.ndarray, config: Config, patients: list[str]) -> list[list]:
    """A row of COLUMNS for each kind of thing, and the mean of each family."""
    count, cases = len(normals), rehearsals(normals, config.runtime.seed)
    said = [verdicts(model, reader, normals, config)]
    said += [verdicts(model, reader, case.images, config, f"{case.family} {case.what}") for case in cases]
    maps = left_out_maps(torch.cat(said), patients, config)
    scores = np.array([float(image_score(each, config.reader.top_share)) for each in maps]).reshape(-1, count)
    rows = []
    for number, case in enumerate(cases, 1):
        found = auroc(np.concatenate([scores[0], scores[number]]), np.repeat([0, 1], count))
        own = [each[0, 0].numpy() for each in maps[number * count : (number + 1) * count]]
        rows.append([case.family, case.what, count, found, pixel_average_precision(own, list(case.masks))])
    for family in ("corruption", "blob"):
        means = np.mean([row[3:] for row in rows if row[0] == family], axis=0)
        rows.append([family, "mean", count, *means])
    return [[*row[:3], *(f"{value:.3f}" for value in row[3:])] for row in rows]


def left_out_maps(logits: torch.Tensor, patients: list[str], config: Config) -> list[torch.Tensor]:
    """Maps (1, 1, H, W) of logits (N, 1, H, W): those of these patients' normals, then of the same with something each.

    A patient is left out of the statistics that standardize what is of it or was made of it, as a new one would be.
    """
    count = len(patients)
    views = views_of_verdicts(logits[:count], config, patients)
    known = [views.statistics_without(number) for number in range(count)]
    return [final_map(known[row % count], each, config) for row, each in enumerate(logits)]


def final_map(known: PixelStatistics, logits: torch.Tensor, config: Config) -> torch.Tensor:
    """The map (1, 1, H, W) of an image's logits (1, H, W), as phase 4 makes it."""
    return blur_share(known.standardize(logits[None].float()), config.inference.smooth_share)


def verdicts(
    model: Normalizer, reader: Reader, images: np.ndarray, config: Config, what: str = "normals"
) -> torch.Tensor:
    """The reader's logits of images (N, H, W), (N, 1, H, W) on the CPU, in half precision."""
    times, size, found = magnification_of(config), config.inference.batch_size, []
    for first in tqdm(range(0, len(images), size), desc=what, unit="batch"):
        batch = torch.from_numpy(images[first : first + size]).unsqueeze(1)
        found.append(reader.logits(model.examine(batch, times)).half().cpu())
    return torch.cat(found)


def rehearsals(normals: np.ndarray, seed: int) -> list[Rehearsal]:
    """The same things for every reader, whatever it learnt from."""
    made = []
    for low, high in BANDS:
        one = replace(ReaderConfig(), smallest_corruption=low / HEIGHT, largest_corruption=high / HEIGHT)
        one = replace(one, fewest_corruptions=1, most_corruptions=1)
        pairs = []
        for number, normal in enumerate(normals):
            random = np.random.default_rng(stream_seed(seed, "rehearsal", number, low))
            pairs.append(corrupt(normal, normals[(number + 7) % len(normals)], random, one))
        made.append(Rehearsal("corruption", f"r {low:g} to {high:g}", *map(np.stack, zip(*pairs, strict=True))))
    for radius, contrast in BLOBS:
        pairs = []
        for number, normal in enumerate(normals):
            random = np.random.default_rng(stream_seed(seed, "rehearsal", number, radius, contrast))
            opacity = blob(normal.shape, radius / HEIGHT, random)
            sign = -1 if number % 2 else 1
            pairs.append((np.clip(normal + sign * contrast * opacity, -1, 1).astype(np.float32), opacity > 0.5))
        made.append(Rehearsal("blob", f"r {radius}, {contrast:g}", *map(np.stack, zip(*pairs, strict=True))))
    return made


def blob(shape: tuple[int, int], radius: float, random: np.random.Generator) -> np.ndarray:
    """Opacity (H, W) in [0, 1] of an oval somewhere in the jaws; radius is a share of the height, give or take a fifth.

    Its border is a logistic curve of a twentieth to a quarter of the radius.
    """
    height, width = shape
    row, column = random.uniform(0.35, 0.8) * height, random.uniform(0.15, 0.85) * width
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    turn, stretch = random.uniform(0, np.pi), np.exp(random.uniform(-0.3, 0.3))
    u = (columns - column) * np.cos(turn) + (rows - row) * np.sin(turn)
    v = (rows - row) * np.cos(turn) - (columns - column) * np.sin(turn)
    size = radius * height * random.uniform(0.8, 1.25)
    edge = size * random.choice([0.05, 0.15, 0.25])
    return expit((size - np.hypot(u * stretch, v / stretch)) / edge)


if __name__ == "__main__":
    run_script(main)
