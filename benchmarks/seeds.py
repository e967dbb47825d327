"""Mean and spread over several runs: python benchmarks/seeds.py FOLDER [FOLDER ...]

Each folder is one run's --outputs (it holds phase4_inference/metrics.json). Prints a Markdown table: per kind the mean
over the runs and, after +-, the standard deviation between them (n - 1). Nothing is chosen by it.
"""

import json
import statistics
import sys
from pathlib import Path

COLUMNS = {
    "auroc": "image AUROC",
    "ap": "image AP",
    "pixel_ap": "pixel AP",
    "aupro": "AUPRO",
    "dice": "Dice",
    "best_dice": "best Dice",
}


def main() -> None:
    folders = [Path(argument) for argument in sys.argv[1:]]
    if not folders:
        sys.exit(__doc__)
    if len({folder.resolve() for folder in folders}) < len(folders):
        sys.exit("a folder is named twice: a run beside itself has no spread")
    runs = [metrics_of(folder / "phase4_inference/metrics.json") for folder in folders]
    if len({tuple(sorted(run["kinds"])) for run in runs}) > 1:
        sys.exit("the runs have different kinds: a mean over them would compare nothing")
    print(f"| kind ({len(runs)} runs) | " + " | ".join(COLUMNS.values()) + " |\n|" + " --- |" * (len(COLUMNS) + 1))
    rows = {kind: [run["kinds"][kind] for run in runs] for kind in runs[0]["kinds"]}
    rows |= {
        "**mean of kinds**": [run["mean_over_kinds"] for run in runs],
        "all images": [run["overall"] for run in runs],
    }
    for kind, entries in rows.items():
        print(f"| {kind} | " + " | ".join(spread([entry[column] for entry in entries]) for column in COLUMNS) + " |")


def metrics_of(path: Path) -> dict:
    """A metrics.json of phase 4; ends with one line if it is missing or damaged."""
    try:
        metrics = json.loads(path.read_text())
        whole = {"kinds", "mean_over_kinds"} <= set(metrics)
    except (OSError, ValueError, TypeError):
        whole = False
    if not whole:
        sys.exit(f"{path} is missing or damaged: run make demo, or python inference.py on labelled radiographs")
    return metrics


def spread(values: list[float | None], digits: int = 3) -> str:
    """'0.912 +- 0.010', without the spread for one run, '-' where the metric is undefined."""
    defined = [value for value in values if value is not None]
    if not defined:
        return "-"
    apart = f" ± {statistics.stdev(defined):.{digits}f}" if len(defined) > 1 else ""
    return f"{statistics.mean(defined):.{digits}f}{apart}"


if __name__ == "__main__":
    main()
