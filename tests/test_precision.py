"""What phase 4 computes in: bfloat16 where inference.precision says so, what lies between networks in float32."""

import dataclasses

import pytest
import torch
from test_calibration import config_with, tiny_normalizer
from test_reader import config_for, normals, seen_by

import runtime
from calibration import shaping
from config import InferenceConfig
from reader_training import train_reader
from runtime import reading_precision

IN_BF16 = InferenceConfig(precision="bf16", solver="one_step")
SEEN = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
PARTS = ("normal", "reconstruction", "z")


def both(seen_in):
    """The same in float32 and in bfloat16."""
    return [seen_in(dataclasses.replace(IN_BF16, precision=name)) for name in ("float32", "bf16")]


@pytest.mark.parametrize("part", PARTS)
def test_what_g_says_in_bfloat16_is_float32_and_differs_by_rounding_alone(part):
    exact, rounded = both(lambda settings: getattr(tiny_normalizer(settings).examine(SEEN), part))
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().mean() < 0.1 * exact.abs().mean()  # many roundings of 2^-9


def test_one_step_estimates_too():
    exact, rounded = both(lambda settings: tiny_normalizer(settings).examine(SEEN).estimate(0.2))
    for name in ("z", "z_diffusion", "features"):
        one, other = getattr(exact, name), getattr(rounded, name)
        assert other.dtype == torch.float32 and 0 < (one - other).abs().mean() < 2**-4 * one.abs().mean()


def test_a_reader_reads_in_the_precision_of_g_and_its_logits_stay_float32(tmp_path):
    reader = train_reader(tiny_normalizer(IN_BF16), normals(), "pictures", config_for(), tmp_path)
    exact, rounded = both(lambda settings: reader.logits(seen_by(tiny_normalizer(settings))))
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().mean() < 2**-4 * exact.abs().mean()


@pytest.mark.parametrize(("multiplies", "expected"), [(True, "bf16"), (False, "float32")])
def test_auto_is_what_the_hardware_multiplies(multiplies, expected, monkeypatch):
    monkeypatch.setattr(runtime, "multiplies_bf16", lambda on_cpu: multiplies)
    assert reading_precision(InferenceConfig(precision="auto"), torch.device("cpu")) == expected
    assert reading_precision(InferenceConfig(precision="bf16"), torch.device("cpu")) == "bf16"
    assert reading_precision(InferenceConfig(), torch.device("cpu")) == "float32"


def test_normals_calibrate_the_precision_that_they_were_seen_in():
    config = config_with("plain")
    in_bf16 = dataclasses.replace(config, inference=dataclasses.replace(config.inference, precision="bf16"))
    model = tiny_normalizer(config.inference)
    assert shaping(model, config) != shaping(model, in_bf16)
    assert "precision" not in shaping(model, config)  # calibrations of float32 never said so


def test_networks_that_learnt_on_features_of_one_precision_do_not_go_on_with_those_of_another(tmp_path, monkeypatch):
    kept = []
    for settings in (InferenceConfig(solver="one_step"), IN_BF16):
        config = dataclasses.replace(config_for(), inference=settings)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr("reader_training.fit_network", lambda *given: kept.append(given[3]) or 1 / 0)
            train_reader(tiny_normalizer(settings), normals(), "pictures", config, tmp_path)
    assert kept[0] != kept[1]  # by this a training knows whether what it left is its own
