"""The floors of the demo: a blind demo fails, one that detects passes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = json.loads((ROOT / "benchmarks/floors.json").read_text())


def run(tmp_path, auroc, pixel_ap, **kinds):
    metrics = {"mean_over_kinds": {"auroc": auroc, "pixel_ap": pixel_ap}}
    metrics["kinds"] = {kind: {"auroc": value, "pixel_ap": 0.5} for kind, value in kinds.items()}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    command = [sys.executable, "benchmarks/floors.py", tmp_path / "metrics.json"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("text", [None, "", "{}", "7"])
def test_metrics_that_are_missing_or_damaged_are_named(tmp_path, text):
    metrics = tmp_path / "phase4_inference/metrics.json"
    metrics.parent.mkdir()
    if text is not None:
        metrics.write_text(text)
    for command in (["floors.py", metrics], ["seeds.py", tmp_path]):
        script = [sys.executable, f"benchmarks/{command[0]}", *command[1:]]
        done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and "metrics.json is missing or damaged" in done.stderr


def test_a_demo_that_detects_passes(tmp_path):
    assert run(tmp_path, 1.0, 1.0, cyst=1.0, implant=1.0).returncode == 0


@pytest.mark.parametrize(
    "values",
    [
        {"auroc": 0.5, "pixel_ap": 1.0, "cyst": 1.0, "implant": 1.0},
        {"auroc": 1.0, "pixel_ap": 0.01, "cyst": 1.0, "implant": 1.0},
        {"auroc": 1.0, "pixel_ap": 1.0, "cyst": 0.9, "implant": 1.0},
        {"auroc": 1.0, "pixel_ap": 1.0, "cyst": 1.0, "implant": None},
        {"auroc": 1.0, "pixel_ap": 1.0, "cyst": 1.0},
    ],
    ids=["blind", "pixels", "cyst", "undefined", "absent"],
)
def test_a_demo_below_one_floor_fails_and_names_it(values, tmp_path):
    result = run(tmp_path, **values)
    assert result.returncode == 1 and result.stdout.count("MISSED") == 1


def test_floors_only_go_up():
    first = {"mean of kinds, image AUROC": 0.78, "mean of kinds, pixel AP": 0.32}
    first |= {"cyst, image AUROC": 0.95, "implant, image AUROC": 0.80}
    assert set(first) <= set(FLOORS) and all(FLOORS[name] >= value for name, value in first.items())
