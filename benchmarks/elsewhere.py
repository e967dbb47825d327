"""Labelled radiographs as if another machine had taken them: python benchmarks/elsewhere.py --data DATA --out FOLDER

    --data FOLDER         radiographs with a manifest.csv: validation normals and a labelled test split
    --out FOLDER          where the copy goes: PNG of 8 bits, masks, manifest.csv; training normals are left out
    --gamma 1.5           the exponent of grey values in [0, 1]: above 1 darker in the middle; 1 leaves them
    --blur 1.0            sigma of a Gaussian blur, as pixels of the files; 0 leaves them
    --noise 0.02          standard deviation of white noise on grey values in [0, 1]; 0 adds none
    --seed 0              of the noise

Networks and a reader that learnt on DATA can then be judged by `inference.py --data.root FOLDER`: with the thresholds
of DATA's normals (--inference.calibration as it is), or of the copy's (a folder that holds reader.pt alone).
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from augmentation import degraded, exposed
from checks import UsageError
from config import DataConfig
from files import write_atomically, write_csv
from progress import bar
from radiographs.manifest import Record, list_records, split_records
from radiographs.reading import read_radiograph, rescale
from runtime import run_script

COLUMNS = ["image", "split", "label", "kind", "mask", "patient"]


def main() -> None:
    """Write the copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gamma", type=float, default=1.5)
    parser.add_argument("--blur", type=float, default=1.0)
    parser.add_argument("--noise", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    refuse_nonsense(options)
    splits = split_records(list_records(options.data, setting="--data"), DataConfig(), trains=False)
    records = [(split, record) for split in ("val", "test") for record in splits[split]]
    rows = []
    for index, (split, record) in enumerate(bar(records, desc="elsewhere", unit="image")):
        x = rescale(read_radiograph(record.path), 0, 100)
        random = np.random.default_rng([options.seed, index])
        taken = taken_there(x, options.gamma, options.blur, options.noise, random)
        image = f"images/{index:04d}.png"
        write_atomically(options.out / image, lambda beside, taken=taken: Image.fromarray(taken).save(beside, "PNG"))
        label = "" if record.label is None else record.label
        rows.append([image, split, label, record.kind, copied_mask(record, index, options.out), record.patient])
    write_csv(options.out / "manifest.csv", COLUMNS, rows)  # last: nobody takes half a copy for a whole one
    print(f"{len(rows)} radiographs in {options.out}")


def refuse_nonsense(options: argparse.Namespace) -> None:
    """UsageError for numbers that make no radiograph, and for a folder that holds something."""
    numbers = np.array([options.gamma, options.blur, options.noise])
    if not np.isfinite(numbers).all() or options.gamma <= 0 or min(options.blur, options.noise, options.seed) < 0:
        raise UsageError("--gamma must be above 0, --blur, --noise and --seed 0 or more")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UsageError(f"{options.out} holds something already: remove it, or choose another --out")


def taken_there(x: np.ndarray, gamma: float, blur: float, noise: float, random: np.random.Generator) -> np.ndarray:
    """The radiograph x (H, W) in [-1, 1] as uint8: exposed otherwise, blurred, noisy."""
    grain = 2 * noise * random.standard_normal(x.shape)
    return np.round(255 * (degraded(exposed(x, 1, 0, gamma), blur, grain) + 1) / 2).astype(np.uint8)


def copied_mask(record: Record, index: int, out: Path) -> str:
    """The mask beside the copy, as the manifest calls it; nothing where there is none."""
    if record.mask is None:
        return ""
    mask = f"masks/{index:04d}{record.mask.suffix}"
    write_atomically(out / mask, lambda beside: shutil.copyfile(record.mask, beside))
    return mask


if __name__ == "__main__":
    run_script(main)
