"""Repair training: its loss against that of phase 3, and a run on the tiny pipeline."""

import sys

import pytest
import torch
from pipeline import ROOT, flags_of, run_benchmark, sources

sys.path.insert(0, str(ROOT / "benchmarks"))
import repair

from checks import UsageError
from config import Config
from files import load_checkpoint, sha256
from flowdiff_loss import generative_loss
from flowdiff_process import clean_from_velocity, interpolate, two_heads
from normalizer import Normalizer

SHAPE = (4, 3, 4, 4)


def network(z_t, t):
    """Stands where the UNet would."""
    return 0.5 * z_t, z_t.roll(1, dims=1) + t.reshape(-1, 1, 1, 1)


def test_of_a_normal_it_is_the_loss_of_phase_3():
    z, noise, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0.25, 0.5, 0.7, 0.95])
    usual = generative_loss(two_heads(network), z, noise, t, Config().flowdiff).total
    assert repair.repair_loss(network, z, z, noise, t, Config()).item() == pytest.approx(usual.item(), rel=1e-5)


def test_who_leads_back_to_the_normal_makes_no_error():
    clean, foreign, noise, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE), torch.full((4,), 0.3)
    z_t = interpolate(foreign, noise, t)
    velocity = (z_t - clean) / 0.3
    assert torch.allclose(clean_from_velocity(z_t, velocity, t), clean, atol=1e-5)
    assert repair.repair_loss(lambda *_: (noise, velocity), clean, foreign, noise, t, Config()).item() < 1e-9


def test_an_error_at_small_t_counts_little():
    z, t = torch.zeros(SHAPE), torch.full((4,), 0.05)
    z_t = interpolate(z, z, t)
    wrong = repair.repair_loss(lambda *_: (z, z_t + 1), z, z, z, t, Config()).item()
    assert wrong == pytest.approx(0.04 * Config().flowdiff.lambda_flow, rel=1e-4)


def test_the_network_that_learnt_on_stands_where_phase_4_looks(examined, tmp_path, monkeypatch):
    flags = flags_of(
        tmp_path / "first", examined.phantoms, *sources("inference", examined), "--reader.magnification", 2
    )
    asked = [*flags, "--out", tmp_path / "out", "--pairs", 1, "--repair-steps", 2]
    run_benchmark(repair.main, monkeypatch, *asked)
    vae, flow = (tmp_path / "out" / name / "checkpoint_best.pt" for name in ("phase1_vae", "phase3_flowdiff"))
    Normalizer.load(vae, flow)
    learnt = load_checkpoint(flow, "flowdiff", "")["weights"]
    before = load_checkpoint(examined.phase3 / "checkpoint_best.pt", "flowdiff", "")["weights"]
    assert learnt.keys() == before.keys() and any(not learnt[name].equal(before[name]) for name in learnt)
    monkeypatch.setattr(repair, "repair_loss", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(repair, "pair", lambda *_: pytest.fail("encoded again"))
    run_benchmark(repair.main, monkeypatch, *asked)
    again = load_checkpoint(flow, "flowdiff", "")["weights"]
    assert all(again[name].equal(learnt[name]) for name in learnt)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--repair-steps", 0), "1 or more"),
        (("--pairs", 0), "1 or more"),
        (("--repair-lr", "nan"), "must lie in"),
        (("--repair-lr", -1), "must lie in"),
    ],
)
def test_what_cannot_be_trained_is_refused(words, found, examined, tmp_path, monkeypatch):
    flags = flags_of(tmp_path / "first", examined.phantoms, *sources("inference", examined))
    with pytest.raises(UsageError, match=found):
        run_benchmark(repair.main, monkeypatch, *flags, "--out", tmp_path / "out", *words)


def test_the_networks_that_learn_on_are_not_written_over(examined, tmp_path, monkeypatch):
    flags = flags_of(tmp_path / "first", examined.phantoms, *sources("inference", examined))
    before = sha256(examined.phase3 / "checkpoint_best.pt")
    with pytest.raises(UsageError, match="another folder for --out"):
        run_benchmark(repair.main, monkeypatch, *flags, "--out", examined.phase3.parent)
    assert sha256(examined.phase3 / "checkpoint_best.pt") == before
    other = tmp_path / "other" / "phase3_flowdiff" / "checkpoint_best.pt"
    other.parent.mkdir(parents=True)
    other.write_text("of another run")
    with pytest.raises(UsageError, match="not this command's"):
        run_benchmark(repair.main, monkeypatch, *flags, "--out", tmp_path / "other")
    assert other.read_text() == "of another run"
