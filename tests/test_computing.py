"""How a training computes: kernels, layouts and compiled networks change the time it takes, no more than rounding."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import computing
from checks import UsageError
from computing import adamw, compiled, continue_optimizer, fast_products, laid_out, leaves_out
from config import RuntimeConfig, UNetConfig, VAEConfig
from flowdiff_model import FlowDiffUNet
from guard import StepGuard
from model import pretrained_vae
from run_log import Meter
from runtime import EMA, HAND_BACK

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # the second only by name: none is needed to ask for its settings


@pytest.fixture
def fused(monkeypatch):
    """A CPU that leaves steps out itself, as a GPU does."""
    monkeypatch.setattr(computing, "WAITED_FOR", ())


def stepped(network, optimizer, steps=3):
    """The network after some steps on a fixed task."""
    for _ in range(steps):
        network(torch.linspace(-1, 1, 12).reshape(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return network.weight.detach().clone()


def test_a_cpu_keeps_the_optimizer_it_had():
    network = nn.Linear(3, 2)
    optimizer = adamw(network.parameters(), 0.01, 0.1, CPU)
    known = torch.optim.AdamW(copy.deepcopy(network).parameters(), lr=0.01, weight_decay=0.1)
    assert optimizer.defaults == known.defaults and leaves_out(optimizer) is None


def test_one_kernel_steps_as_many_do(fused):
    one, many = nn.Linear(3, 2), nn.Linear(3, 2)
    many.load_state_dict(one.state_dict())
    found = stepped(one, adamw(one.parameters(), 0.01, 0.1, CPU))
    expected = stepped(many, torch.optim.AdamW(many.parameters(), lr=0.01, weight_decay=0.1))
    torch.testing.assert_close(found, expected)


def test_an_optimizer_of_an_earlier_version_goes_on_and_can_leave_steps_out(fused):
    network = nn.Linear(3, 2)
    earlier = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.1)
    stepped(network, earlier)
    other = copy.deepcopy(network)
    optimizer = adamw(other.parameters(), 0.01, 0.1, CPU)
    continue_optimizer(optimizer, copy.deepcopy(earlier.state_dict()))
    assert leaves_out(SimpleNamespace(optimizer=optimizer)) is optimizer
    torch.testing.assert_close(stepped(other, optimizer), stepped(network, earlier))


def test_what_an_optimizer_knew_is_laid_out_as_the_weights_are(fused):
    network = nn.Conv2d(3, 4, 3)
    earlier = torch.optim.AdamW(network.parameters(), lr=0.01)
    network(torch.randn(1, 3, 8, 8)).sum().backward()
    earlier.step()
    other = laid_out(copy.deepcopy(network), GPU)
    optimizer = adamw(other.parameters(), 0.01, 0.1, CPU)
    continue_optimizer(optimizer, copy.deepcopy(earlier.state_dict()))
    found, known = optimizer.state[other.weight]["exp_avg"], earlier.state[network.weight]["exp_avg"]
    assert torch.equal(found, known) and found.stride() == other.weight.stride() != known.stride()


def test_the_guard_of_a_gpu_hears_of_a_bad_step_when_it_is_asked(fused, capsys):
    network = nn.Linear(3, 2)
    optimizer = adamw(network.parameters(), 0.01, 0.1, CPU)
    guard = StepGuard("vae.lr", limit=3, skipped=5, optimizer=leaves_out(optimizer))
    before = stepped(network, optimizer, steps=1)
    network.weight.grad = torch.full((2, 3), torch.nan)
    assert guard.passes(7, torch.tensor(torch.nan))
    optimizer.step()
    assert torch.equal(network.weight, before) and not capsys.readouterr().out
    assert guard.skipped == 6 and "step 7: the gradient is not finite" in capsys.readouterr().out


def test_too_many_bad_steps_on_a_gpu_are_heard_before_weights_are_written():
    guard = StepGuard("vae.lr", limit=2, quiet=True, optimizer=SimpleNamespace())
    for step, norm in enumerate([1.0, torch.inf, torch.nan, 1.0], start=1):
        guard.passes(step, torch.tensor(norm))
    with pytest.raises(UsageError, match="in the 2 steps up to 3: lower vae.lr"):
        guard.check(4, {"weight": torch.ones(2)})


def test_a_step_that_does_not_count_weighs_nothing_in_a_mean():
    guard, meter = StepGuard("vae.lr", limit=9, quiet=True, optimizer=SimpleNamespace()), Meter()
    for loss in (1.0, torch.nan, 4.0):
        guard.passes(1, torch.tensor(loss))
        meter.add(guard.counted({"loss": torch.tensor(loss), "bin": (torch.tensor(loss), 2.0), "kl": "n/a"}))
    assert meter.flush() == {"loss": 2.5, "bin": 1.25, "kl": "n/a"}


@pytest.mark.parametrize("counts", [True, False])
def test_an_average_takes_in_what_counts_and_nothing_else(counts):
    network = nn.Linear(3, 2)
    told, known = EMA(network, 0.9), EMA(network, 0.9)
    for _ in range(3):
        nn.init.normal_(network.weight)
        told.update(network, torch.tensor(True))
        known.update(network)
    before = told.module.weight.clone()
    nn.init.normal_(network.weight)
    told.update(network, torch.tensor(counts))
    known.update(network)
    torch.testing.assert_close(told.module.weight, known.module.weight if counts else before, rtol=0, atol=1e-6)


def test_a_layout_changes_no_number_that_is_saved():
    network = nn.Conv2d(3, 4, 3)
    other = laid_out(copy.deepcopy(network), GPU)
    assert other.weight.is_contiguous(memory_format=torch.channels_last) and not other.weight.is_contiguous()
    assert laid_out(network, CPU).weight.is_contiguous()
    torch.testing.assert_close(other.state_dict(), network.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("device", "expected"), [(CPU, "highest"), (GPU, "high")])
def test_only_a_gpu_multiplies_in_tf32(device, expected):
    try:
        fast_products(device)
        assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_compiled_network_keeps_its_names_and_its_answers():
    network, x = nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 2)), torch.randn(4, 3)
    names, expected = list(network.state_dict()), network(x).detach()
    same = compiled(network, RuntimeConfig(compile=True), CPU)
    torch.testing.assert_close(same(x), expected)
    assert same is network and list(network.state_dict()) == names and network._compiled_call_impl is not None


def test_nothing_is_compiled_unasked():
    network = nn.Linear(3, 2)
    assert compiled(network, RuntimeConfig(), CPU) is network and network._compiled_call_impl is None


def test_where_nothing_can_be_compiled_the_remedy_is_one_line():
    torch._dynamo.reset()
    with torch._inductor.utils.fresh_cache(), torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(UsageError, match="install it, or leave --runtime.compile False") as refused:
            compiled(nn.Linear(3, 2), RuntimeConfig(compile=True), CPU)
    assert "\n" not in str(refused.value)


UNET = UNetConfig(channels=(8, 16), attention=(False, True), norm_groups=4, attention_head_dim=8, layers_per_block=1)
VAE = VAEConfig(pretrained="scratch", freeze_encoder=False, scratch_channels=(8, 8, 8, 8))
NETWORKS = {
    "UNet": (lambda: FlowDiffUNet(UNET, 4), (torch.randn(2, 4, 8, 8), torch.rand(2))),
    "VAE": (lambda: pretrained_vae(VAE), (torch.randn(1, 1, 32, 32),)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_can_be_traced_and_then_prepared_as_the_scripts_do(name, monkeypatch):
    real, (make, given) = nn.Module.compile, NETWORKS[name]
    monkeypatch.setattr(nn.Module, "compile", lambda network: real(network, backend="eager"))  # seconds, not minutes
    network = make()
    names, expected = list(network.state_dict()), network(*given)
    model = Accelerator(cpu=True).prepare(compiled(network, RuntimeConfig(compile=True), CPU))
    torch.testing.assert_close(model(*given), expected)
    assert list(network.state_dict()) == names and model is network


FAULTS = """
import resource, sys
import torch
from runtime import run_script

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
alone = faults()
run_script(faults)
print(alone, faults())
"""


@pytest.mark.skipif(computing.of_malloc("mallopt") is None, reason="another system's malloc")
def test_memory_that_was_freed_is_not_asked_for_again():
    path = str(Path(computing.__file__).parent)
    untuned = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run([sys.executable, "-c", FAULTS], cwd=path, env=untuned, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    alone, keeping = map(int, run.stdout.split())
    if alone < 100_000:
        pytest.skip("this kernel counts no pages of 4 KiB")
    assert keeping < 0.1 * alone


@pytest.mark.parametrize("named", [HAND_BACK, "GLIBC_TUNABLES=glibc.malloc.trim_threshold=131072"])
def test_malloc_is_left_alone_where_somebody_tuned_it(named, monkeypatch):
    monkeypatch.setenv(*named.split("=", 1))
    monkeypatch.setattr(computing, "of_malloc", lambda name: pytest.fail)
    assert not computing.keep_memory()
