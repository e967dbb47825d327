"""What more training, and more normals, bring the reader: python benchmarks/learning_curve.py --results FOLDER

    --results FOLDER      where ablation.py keeps rows of one reader that learnt longer or shorter (--reader.steps and
                          --reader.tuned-steps in proportion), on more or fewer normals (--reader.normals), each by a
                          name of its own (--as)
    --out FILE.png        the figure, outputs/learning_curve.png without it

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
from detection import OF_A_SEED, file_name, rows_in, table_of

from checks import UsageError
from reporting.figures import OKABE_ITO, save_growth
from runtime import run_script

MEASURES = {"auroc": "image AUROC", "pixel_ap": "pixel AP"}
OVER_STEPS, OVER_NORMALS = "optimizer steps of the tuned backbone", "training normals"
MEAN = "mean of kinds"
VARIED = ("steps", "tuned_steps", "normals")  # of the reader's settings
Amounts = tuple[int, int]  # steps of the tuned backbone, training normals


def main() -> None:
    """Draw what is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("outputs/learning_curve.png"))
    options = parser.parse_args()
    if options.out.suffix != ".png":
        raise UsageError(f"--out {options.out}: a figure is a .png")
    folder = options.results / file_name(BOTH)
    groups = list(rows_in(folder).values())
    if not groups:
        raise UsageError(f"no row is kept in {folder}: run benchmarks/ablation.py with this --results first")
    refuse_other_readers(groups)
    rows = by_amounts(groups)
    over = curves_of(list(rows))
    save_growth(options.out, figure_of(rows, over), "What more training and more normals bring")
    print(table_of(folder, tuple(rows[amounts][0]["row"] for amounts in sorted(rows))))
    print(f"drawn in {options.out}")


def refuse_other_readers(groups: list[list[dict]]) -> None:
    """UsageError if rows differ in more than how long, and on how many, their readers learnt."""
    first = shared_of(groups[0][0])
    for seeds in groups[1:]:
        other = shared_of(seeds[0])
        differ = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
        if differ:
            names = f"{groups[0][0]['row']!r} and {seeds[0]['row']!r}"
            raise UsageError(f"{names} differ in {', '.join(differ)}: a curve is of one reader, keep them apart")


def shared_of(part: dict) -> dict:
    """What all rows of a curve have in common."""
    reader = part["asked"].get("reader", {})
    shared = {name: value for name, value in part["asked"].items() if name not in (*OF_A_SEED, "reader")}
    shared |= {f"reader.{name}": value for name, value in reader.items() if name not in VARIED}
    return shared | {"size": part["size"], "kinds": sorted(part["kinds"])}


def by_amounts(groups: list[list[dict]]) -> dict[Amounts, list[dict]]:
    """The seeds of each row; UsageError where two rows took as many steps on as many normals: which is to be drawn?"""
    rows: dict[Amounts, list[dict]] = {}
    for seeds in groups:
        several = {amounts_of(part) for part in seeds}
        if len(several) > 1:
            raise UsageError(f"the seeds of {seeds[0]['row']!r} learnt on different numbers of normals: run one again")
        first = rows.setdefault(several.pop(), seeds)
        if first is not seeds:
            names = f"{first[0]['row']!r} and {seeds[0]['row']!r}"
            raise UsageError(f"{names} tuned the backbone as long, on as many normals: keep one of them in --results")
    return rows


def amounts_of(part: dict) -> Amounts:
    """How long, and on how many, the reader of a row learnt; UsageError if it does not say so."""
    amounts = part["asked"].get("reader", {}).get("tuned_steps"), part.get("normals")
    if not all(isinstance(amount, int) and 0 < amount < 2**31 for amount in amounts):
        raise UsageError(
            f"the row {part['row']!r} does not say how long, and on how many normals, its backbone was tuned: run it "
            "again"
        )
    return amounts


def curves_of(amounts: list[Amounts]) -> dict[str, list[Amounts]]:
    """Which rows make up each curve; UsageError if one of them would be a point."""
    all_normals = max(normals for _, normals in amounts)
    usual_steps = Counter(steps for steps, _ in amounts).most_common(1)[0][0]
    curves = {
        OVER_STEPS: sorted(each for each in amounts if each[1] == all_normals),
        OVER_NORMALS: sorted(each for each in amounts if each[0] == usual_steps),
    }
    for name, points in curves.items():
        if len(points) < 2:
            raise UsageError(f"a curve over {name} needs two rows, and there is {len(points)}: see --help")
    return curves


def figure_of(rows: dict[Amounts, list[dict]], over: dict[str, list[Amounts]]) -> dict:
    """What `save_growth` draws: measure -> cause -> name -> (amounts, values); as many kinds as there are colours."""
    kinds = sorted(next(iter(rows.values()))[0]["kinds"])
    if len(kinds) >= len(OKABE_ITO):
        print(f"drawn are the mean and {len(OKABE_ITO) - 1} of {len(kinds)} kinds, the table has all")
    found: dict = {}
    for measure, title in MEASURES.items():
        panels: dict = {}
        for place, (cause, points) in enumerate(over.items()):
            panels[cause] = {
                name: ([point[place] for point in points], values)
                for name in (MEAN, *kinds[: len(OKABE_ITO) - 1])
                if None not in (values := [value_of(rows[point], name, measure) for point in points])
            }
        if all(panels.values()):
            found[title] = panels
    if not found:
        raise UsageError("no row has an image AUROC or a pixel AP: was there anything to find?")
    return found


def value_of(seeds: list[dict], name: str, measure: str) -> float | None:
    """The mean over the seeds; None where the measure is not defined, as that of pixels without masks."""
    values = [(part["mean_over_kinds"] if name == MEAN else part["kinds"][name])[measure] for part in seeds]
    return None if None in values else mean(values)


if __name__ == "__main__":
    run_script(main)
