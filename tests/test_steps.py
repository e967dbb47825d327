"""One step of training: a gradient that is no number does no harm; the host waits for a CPU once, for a GPU never."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import augmentation
import computing
import flowdiff_batch
import train_flowdiff
import train_vae
from run_log import read_log

MODULES = {"train_vae": train_vae, "train_flowdiff": train_flowdiff}
PLACES = {"train_vae": "phase1_vae", "train_flowdiff": "phase3_flowdiff"}
LOSSES = {"train_vae": "vae_loss", "train_flowdiff": "generative_loss"}
QUICK = ["--flowdiff.validate-every", 8, "--flowdiff.sample-every", 8]  # no pictures on the way


def learnt(content):
    """What training changed, of a checkpoint_last.pt."""
    parts = {name: content[name] for name in ("weights", "ema") if name in content}
    return parts | {"optimizer": content["optimizer"]["state"]}


OFTEN = ["--vae.log-every", 1, "--flowdiff.log-every", 1, "--runtime.checkpoint-every", 1, *QUICK]


@pytest.fixture
def poison(monkeypatch):
    """Make the training loss of a phase not a number at these steps."""

    def poison(script, steps):
        module, name = MODULES[script], LOSSES[script]
        real, calls = getattr(module, name), itertools.count(1)

        def loss(*args):
            found = real(*args)
            if torch.is_grad_enabled() and next(calls) in steps:
                return dataclasses.replace(found, total=found.total * math.nan)
            return found

        monkeypatch.setattr(module, name, loss)

    return poison


@pytest.fixture
def checkpoints(monkeypatch):
    """Every checkpoint_last.pt that a phase writes, by step."""
    found = {}
    for module in MODULES.values():
        real = module.save_checkpoint

        def save(path, kind, content, real=real):
            real(path, kind, content)
            if path.name == "checkpoint_last.pt":
                found[content["step"]] = torch.load(path, weights_only=True)

        monkeypatch.setattr(module, "save_checkpoint", save)
    return found


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The CPU treated as a GPU is: it augments, nobody waits for it, latents lie in its memory, kernels are its own."""
    monkeypatch.setattr(augmentation, "AUGMENTING", ("cpu",))
    monkeypatch.setattr(computing, "WAITED_FOR", ())
    monkeypatch.setattr(flowdiff_batch, "RESIDENT", ("cpu",))


@pytest.fixture(params=["cpu", "gpu"])
def device(request):
    """Both ways to take a step."""
    if request.param == "gpu":
        request.getfixturevalue("as_on_a_gpu")
    return request.param


@pytest.mark.parametrize("script", PLACES)
def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(
    script, device, poison, checkpoints, call, tmp_path
):
    poison(script, steps={3, 5})
    result = call(script, *OFTEN)
    assert result.code == 0, result.error
    assert result.out.count("the gradient is not finite, the step is skipped") == 2
    if device == "gpu" and script == "train_flowdiff":  # the host counts an update of the average before it hears
        assert checkpoints[3]["ema"].pop("updates") == 1 + checkpoints[2]["ema"].pop("updates")
    torch.testing.assert_close(learnt(checkpoints[3]), learnt(checkpoints[2]), rtol=0, atol=0)
    for part, before in learnt(checkpoints[3]).items():
        with pytest.raises(AssertionError):
            torch.testing.assert_close(learnt(checkpoints[4])[part], before, rtol=0, atol=0)
    log = read_log(tmp_path / PLACES[script])
    assert log["train/skipped_steps"][1][:6] == [0, 0, 1, 1, 2, 2]
    assert all(np.isfinite(values).all() for _, values in log.values())


@pytest.mark.parametrize("script", PLACES)
def test_too_many_in_a_row_stop_the_run_and_a_lower_rate_goes_on_from_the_last_good_weights(
    script, device, poison, call, tmp_path
):
    poison(script, steps={3, 4, 5})
    few = [*OFTEN, "--runtime.max-skipped-steps", 3]
    result = call(script, *few)
    assert result.code == 2 and "no gradient was finite in the 3 steps up to 5" in result.error
    last = tmp_path / PLACES[script] / "checkpoint_last.pt"
    assert all(torch.isfinite(weight).all() for weight in torch.load(last, weights_only=True)["weights"].values())
    lower = [*few, "--vae.lr", 1e-6, "--flowdiff.lr", 1e-6, "--runtime.resume-changed", "True"]
    assert call(script, *lower).code == 0
    assert read_log(last.parent)["train/skipped_steps"][1][-1] == 2  # the third is taken anew


class HostWaits(TorchDispatchMode):
    """Counts what would stop a GPU: numbers fetched to the host, and indexing by truth values."""

    def __init__(self):
        super().__init__()
        self.count, self.paused = 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        mask = name.startswith("aten.index.") and any(part is not None and part.dtype == torch.bool for part in args[1])
        fetches = name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select"))
        self.count += (mask or fetches) and not self.paused
        return function(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """HostWaits that leaves the optimizer out, which keeps its count of steps on the host and reads it there."""
    counter, real = HostWaits(), torch.optim.AdamW.step

    def step(*args, **kwargs):
        counter.paused = True
        real(*args, **kwargs)
        counter.paused = False

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return counter


@pytest.mark.parametrize("script", PLACES)
def test_a_step_waits_for_a_cpu_once_and_for_a_gpu_never(script, device, waits, call, tmp_path, monkeypatch):
    scores = {"loss_diff": 1.0, "loss_flow": 1.0, "loss_id": 1.0, "objective": 1.0}
    monkeypatch.setattr(train_flowdiff, "validate", lambda *_: scores)
    monkeypatch.setattr(train_flowdiff, "draw_samples", lambda *_: None)
    rare = ["--vae.log-every", 99, "--flowdiff.log-every", 99, "--vae.validate-every", 99]
    rare += ["--flowdiff.validate-every", 99, "--flowdiff.identity-space", "pixel"]
    counts = []
    for steps in (10, 14):
        waits.count = 0
        with waits:
            many = ["--vae.steps", steps, "--flowdiff.total-steps", steps]
            result = call(script, *rare, *many, outputs=tmp_path / str(steps))
        assert result.code == 0
        counts.append(waits.count)
    assert counts[1] - counts[0] == {"cpu": 4, "gpu": 0}[device]
