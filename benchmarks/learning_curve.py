"""What more training, and more normals, bring the reader: python benchmarks/learning_curve.py --results FOLDER

    --results FOLDER      where ablation.py keeps rows of one reader that learnt longer or shorter (--reader.steps,
                          --reader.tuned-steps), on more or fewer normals (--reader.normals), each by a name (--as)
    --out FILE            the figure, outputs/learning_curve.png without it

Rows that learnt on all normals are the curve over steps of the tuned backbone; rows of the same steps, of which there
are most, are that over normals. Seeds are averaged. The table of all rows is printed as Markdown. It shows what is
missing where a lesion is not found, and chooses nothing: the rows are of the test split.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ablation import BOTH
from detection import file_name, rows_in, table_of

from checks import UsageError
from reporting.figures import save_growth
from runtime import run_script

MEASURES = {"auroc": "image AUROC", "pixel_ap": "pixel AP"}
OVER_STEPS, OVER_NORMALS = "optimizer steps of the tuned backbone", "training normals"
MEAN = "mean of kinds"
Amounts = tuple[int, int]  # steps of the tuned backbone, training normals


def main() -> None:
    """Draw what is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("outputs/learning_curve.png"))
    options = parser.parse_args()
    folder = options.results / file_name(BOTH)
    rows = by_amounts(list(rows_in(folder).values()))
    over = curves_of(list(rows))
    save_growth(options.out, figure_of(rows, over), "What more training and more normals bring")
    print(table_of(folder, tuple(rows[amounts][0]["row"] for amounts in sorted(rows))))
    print(f"drawn in {options.out}")


def by_amounts(groups: list[list[dict]]) -> dict[Amounts, list[dict]]:
    """The seeds of each row; UsageError where two rows learnt as long on as many: only one of them can be drawn."""
    rows: dict[Amounts, list[dict]] = {}
    for seeds in groups:
        first = rows.setdefault(amounts_of(seeds[0]), seeds)
        if first is not seeds:
            names = f"{first[0]['row']!r} and {seeds[0]['row']!r}"
            raise UsageError(f"{names} learnt as long, on as many normals: keep one of them in --results")
    return rows


def amounts_of(part: dict) -> Amounts:
    """How long, and on how many, the reader of a row learnt."""
    if "normals" not in part:
        raise UsageError(f"the row {part['row']!r} does not say how many normals it learnt on: run it again")
    return part["asked"]["reader"]["tuned_steps"], part["normals"]


def curves_of(amounts: list[Amounts]) -> dict[str, list[Amounts]]:
    """Which rows make up each curve; UsageError if one of them would be a point."""
    all_normals = max((normals for _, normals in amounts), default=0)
    usual_steps = Counter(steps for steps, _ in amounts).most_common(1)[0][0] if amounts else 0
    curves = {
        OVER_STEPS: sorted(each for each in amounts if each[1] == all_normals),
        OVER_NORMALS: sorted(each for each in amounts if each[0] == usual_steps),
    }
    for name, points in curves.items():
        if len(points) < 2:
            raise UsageError(f"a curve over {name} needs two rows, and there is {len(points)}: see --help")
    return curves


def figure_of(rows: dict[Amounts, list[dict]], over: dict[str, list[Amounts]]) -> dict:
    """What `save_growth` draws: measure -> cause -> name -> (amounts, values)."""
    kinds = sorted(next(iter(rows.values()))[0]["kinds"])
    found: dict = {}
    for measure, title in MEASURES.items():
        found[title] = {}
        for cause, points in over.items():
            place = list(over).index(cause)
            found[title][cause] = {
                name: ([point[place] for point in points], values)
                for name in (MEAN, *kinds)
                if None not in (values := [value_of(rows[point], name, measure) for point in points])
            }
    return found


def value_of(seeds: list[dict], name: str, measure: str) -> float | None:
    """The mean over the seeds; None where the measure is not defined, as that of pixels without masks."""
    values = [(part["mean_over_kinds"] if name == MEAN else part["kinds"][name])[measure] for part in seeds]
    return None if None in values else mean(values)


if __name__ == "__main__":
    run_script(main)
