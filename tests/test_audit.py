"""The audit of how small a lesion survives: its discs, what is left of them, and a run on the tiny pipeline."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipeline import ROOT, flags_of, run_benchmark, sources, table

sys.path.insert(0, str(ROOT / "benchmarks"))
import audit

from checks import UsageError


@pytest.mark.parametrize("radius", [0.05, 0.1])
def test_a_disc_has_the_area_of_its_radius_and_lies_inside(radius):
    opacity = audit.disc((200, 400), radius, np.random.default_rng(0))
    assert opacity.sum() == pytest.approx(np.pi * (radius * 200) ** 2, rel=0.02)
    assert max(opacity[0].max(), opacity[-1].max(), opacity[:, 0].max(), opacity[:, -1].max()) == 0


@pytest.mark.parametrize("left", [0.0, 0.3, 1.0])
def test_what_survives_is_the_share_that_the_autoencoder_keeps(left):
    normal, change = torch.rand(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    change[..., 4:9, 4:9] = 0.3
    seen = [SimpleNamespace(x=x, reconstruction=y) for x, y in ((normal + change, left * change), (normal, 0 * change))]
    assert audit.survival(*seen) == pytest.approx(left, abs=1e-5)


def test_the_audit_prints_and_writes_a_row_per_radius(examined, monkeypatch, capsys, tmp_path):
    flags = flags_of(tmp_path, examined.phantoms, *sources("inference", examined))
    run_benchmark(audit.main, monkeypatch, *flags, "--inference.method", "plain")
    rows = table(Path(tmp_path) / "phase4_inference" / "audit.csv")
    assert [row["radius"] for row in rows] == ["0.005", "0.01", "0.02", "0.04", "0.08"]
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("found", "false"))
    assert "survives" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "least"), [("plain", 2), ("statistical", 3), ("reader", 5)])
def test_too_few_normals_for_an_audit_are_told_before_anything_is_trained(
    method, least, examined, monkeypatch, tmp_path
):
    flags = flags_of(tmp_path, examined.phantoms, *sources("inference", examined))
    few = SimpleNamespace(images=np.zeros((least, 8, 8), np.float32), patients=[max(1, row) for row in range(least)])
    monkeypatch.setattr(audit, "read_normals", lambda *given: few)
    monkeypatch.setattr(audit, "reader_of", lambda *given: pytest.fail("trained before it was looked"))
    with pytest.raises(UsageError, match=f"needs validation normals of {least} patients.* they are of {least - 1}"):
        run_benchmark(audit.main, monkeypatch, *flags, "--inference.method", method)
