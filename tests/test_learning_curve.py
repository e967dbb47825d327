"""The learning curve: which kept rows make it up, and what is drawn of them."""

import sys

import pytest
from PIL import Image
from pipeline import ROOT, run_benchmark

sys.path.insert(0, str(ROOT / "benchmarks"))
import learning_curve
from learning_curve import MEAN, OVER_NORMALS, OVER_STEPS

from checks import UsageError
from files import write_json

ROWS = {"usual": (1200, 198), "half the steps": (600, 198), "50 normals": (1200, 50), "both": (600, 50)}


def keep(results, row, steps, normals, seed=0, value=0.5, kinds=("implant",), size=256, **reader):
    """What ablation.py keeps of a row, as far as this asks."""
    measures = {"auroc": value, "pixel_ap": None if value is None else value / 2, "aupro": value}
    judged = {"cyst": measures} | {kind: measures | {"pixel_ap": None} for kind in kinds}
    part = {"row": row, "seed": seed, "size": size, "normals": normals, "kinds": judged, "mean_over_kinds": measures}
    settings = {"tuned_steps": steps, "steps": steps} | reader
    part["asked"] = {"manifest_sha256": "m", "flow_sha256": str(seed), "reader": settings}
    folder = results / "with_the_tuned_backbone"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{row}-seed{seed}.json", part)


def test_a_curve_varies_one_thing():
    over = learning_curve.curves_of(list(ROWS.values())[:3])
    assert over == {OVER_STEPS: [(600, 198), (1200, 198)], OVER_NORMALS: [(1200, 50), (1200, 198)]}


def test_what_is_drawn_are_means_over_the_seeds(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(learning_curve, "save_growth", lambda path, rows, title: drawn.update(rows))
    for row, (steps, normals) in list(ROWS.items())[:3]:
        for seed, value in enumerate((0.25, 0.75)):
            keep(tmp_path, row, steps, normals, seed, value + normals / 1_000)
    run_benchmark(learning_curve.main, monkeypatch, "--results", tmp_path)
    assert drawn["image AUROC"][OVER_NORMALS]["implant"] == ([50, 198], pytest.approx([0.55, 0.698]))
    assert set(drawn["pixel AP"][OVER_STEPS]) == {MEAN, "cyst"}  # implants have no masks


def test_the_figure_is_drawn_and_the_table_printed(tmp_path, monkeypatch, capsys):
    for row, amounts in ROWS.items():
        keep(tmp_path, row, *amounts)
    run_benchmark(learning_curve.main, monkeypatch, "--results", tmp_path, "--out", tmp_path / "curve.png")
    assert min(Image.open(tmp_path / "curve.png").size) > 500
    assert "| 50 normals | 256 | 0 |" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [["usual"], ["usual", "50 normals"]])
def test_a_curve_of_one_point_is_refused(rows, tmp_path, monkeypatch):
    for row in rows:
        keep(tmp_path, row, *ROWS[row])
    with pytest.raises(UsageError, match="needs two rows"):
        run_benchmark(learning_curve.main, monkeypatch, "--results", tmp_path, "--out", tmp_path / "curve.png")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"size": 512}, "differ in size"),
        ({"width": 8}, "differ in reader.width"),
        ({"kinds": ("caries",)}, "differ in kinds"),
        ({"normals": None}, "does not say how long"),
        ({"steps": -1}, "does not say how long"),
        ({"seed": 1, "row": "usual", "normals": 150, "steps": 1200}, "different numbers of normals"),
    ],
)
def test_rows_that_are_no_curve_are_refused(other, words, tmp_path, monkeypatch):
    keep(tmp_path, "usual", 1200, 198)
    keep(**{"results": tmp_path, "row": "half", "steps": 600, "normals": 198} | other)
    with pytest.raises(UsageError, match=words):
        run_benchmark(learning_curve.main, monkeypatch, "--results", tmp_path)


def test_more_kinds_than_colours_are_in_the_table(tmp_path, monkeypatch, capsys):
    for row, amounts in ROWS.items():
        keep(tmp_path, row, *amounts, kinds=[f"kind {number}" for number in range(9)])
    run_benchmark(learning_curve.main, monkeypatch, "--results", tmp_path, "--out", tmp_path / "curve.png")
    shown = capsys.readouterr().out
    assert "the mean and 7 of 10 kinds" in shown and "kind 8" in shown


def test_nothing_to_draw_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no row is kept in"):
        run_benchmark(learning_curve.main, monkeypatch, "--results", tmp_path)
    for row, amounts in ROWS.items():
        keep(tmp_path, row, *amounts, value=None)
    with pytest.raises(UsageError, match="no row has an image AUROC"):
        run_benchmark(learning_curve.main, monkeypatch, "--results", tmp_path)
    with pytest.raises(UsageError, match="a figure is a .png"):
        run_benchmark(learning_curve.main, monkeypatch, "--results", tmp_path, "--out", "curve.jpg")


def test_two_rows_of_the_same_amounts_are_refused(tmp_path, monkeypatch):
    for row in ("usual", "once more"):
        keep(tmp_path, row, 1200, 198)
    with pytest.raises(UsageError, match="usual.*once more|once more.*usual"):
        run_benchmark(learning_curve.main, monkeypatch, "--results", tmp_path)
