"""Whether the demo detects: python benchmarks/floors.py outputs/demo/phase4_inference/metrics.json

Compares metrics.json with floors.json beside this file, prints one line per floor, and fails if one is missed: a
broken or a blind demo cannot land. Floors only go up: what was reached, less a margin for the seed.
"""

import json
import sys
from pathlib import Path

from seeds import metrics_of

FLOORS = Path(__file__).with_name("floors.json")
METRICS = {"image AUROC": "auroc", "pixel AP": "pixel_ap"}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    metrics = metrics_of(Path(sys.argv[1]))
    missed = False
    for name, floor in json.loads(FLOORS.read_text()).items():
        reached = value_of(name, metrics)
        below = reached is None or reached < floor
        missed |= below
        shown = "undefined" if reached is None else f"{reached:.3f}"
        verdict = "MISSED" if below else "reached"
        print(f"{name}: {shown}, floor {floor:.3f}: {verdict}")
    sys.exit(1 if missed else 0)


def value_of(name: str, metrics: dict) -> float | None:
    """The number that a floor such as "cyst, image AUROC" speaks of; None where it is undefined or absent."""
    kind, _, metric = name.partition(", ")
    entry = metrics["mean_over_kinds"] if kind == "mean of kinds" else metrics["kinds"].get(kind, {})
    return entry.get(METRICS[metric])


if __name__ == "__main__":
    main()
