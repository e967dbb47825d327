"""What speed.py measures with: time on one device, what that device can do at most, memory, and where time goes."""

import os
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from computing import of_malloc

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux
FEWEST = 3  # rounds, however long one takes
CUDA_BLOCK = 0.25  # seconds of steps between two waits for a GPU: waiting after each would slow it down


@dataclass
class Work:
    """Something that is done again and again."""

    step: Callable[[], object]
    images: int  # that one step takes
    precision: str = "float32"  # of most of its products: whose ceiling it is held against
    waited: list[float] = field(default_factory=list)  # seconds of each step spent until its batch was there


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(device: torch.device, seconds: float = 0.5) -> dict[str, float]:
    """What the device can do at most: matrix products in TFLOP/s by precision, copies in GB/s (read and written)."""
    side = 8192 if device.type == "cuda" else 1024
    found = {}
    for name in ("bf16", "tf32", "float32") if device.type == "cuda" else ("bf16", "float32"):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        with products_in(name):
            found[name] = 2 * side**3 / _best(lambda a=one, b=other: a @ b, device, seconds) / 1e12
    source = torch.empty((2**30 if device.type == "cuda" else 2**27) // 4, device=device).zero_()
    target = torch.empty_like(source)
    found["copy"] = 2 * source.nbytes / _best(lambda: target.copy_(source), device, seconds) / 1e9
    return found


@contextmanager
def products_in(precision: str):
    """Float32 as it is, or in TF32 where the hardware has it."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _best(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The least seconds that a call took."""
    times, end = [], time.perf_counter() + seconds
    call()
    while len(times) < FEWEST or time.perf_counter() < end:
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - began)
    return min(times)


def compare(works: dict[str, Work], device: torch.device, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds a step of each, by the clock and of the processor: medians of rounds in which all take turns.

    So what disturbs the machine disturbs all of them. The first round warms up and does not count.
    """
    wall, core = ({name: [] for name in works} for _ in range(2))
    blocks = {name: _warm_up(work, device) for name, work in works.items()}
    for work in works.values():
        work.waited.clear()
    end = time.perf_counter() + seconds
    while len(next(iter(wall.values()))) < FEWEST or time.perf_counter() < end:
        for name, work in works.items():
            began, cpu = time.perf_counter(), time.process_time()
            for _ in range(blocks[name]):
                work.step()
            wait(device)
            wall[name].append(1e3 * (time.perf_counter() - began) / blocks[name])
            core[name].append(1e3 * (time.process_time() - cpu) / blocks[name])
    medians = {name: (statistics.median(wall[name]), statistics.median(core[name])) for name in works}
    return {name: {"step_ms": clock, "core_ms": cpu} for name, (clock, cpu) in medians.items()}


def _warm_up(work: Work, device: torch.device) -> int:
    """How many steps are timed together: one, on a GPU as many as fill CUDA_BLOCK."""
    for _ in range(2 if device.type == "cpu" else 5):
        wait(device)
        began = time.perf_counter()
        work.step()
        wait(device)
    took = time.perf_counter() - began
    return max(1, round(CUDA_BLOCK / took)) if device.type == "cuda" else 1


def measure(work: Work, device: torch.device, seconds: float, ceiling: dict[str, float]) -> dict[str, object]:
    """Everything a row of the table says of one kind of step."""
    flops = flops_of(work)
    forget_peak(device)
    times = compare({"it": work}, device, seconds)["it"]
    tflops = flops / (times["step_ms"] / 1e3) / 1e12
    row = {"images_per_s": 1e3 * work.images / times["step_ms"], **times, "precision": work.precision}
    row |= {"gflop": flops / 1e9, "tflops": tflops, "share": tflops / ceiling[work.precision]}
    return row | {"idle": idle_share(work, device, times["step_ms"]), "peak_mib": peak_mib(device)}


def flops_of(work: Work) -> int:
    """Of one step, as torch counts them: products, convolutions and attention, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        work.step()
    return counter.get_total_flops()


def idle_share(work: Work, device: torch.device, step_ms: float) -> float | None:
    """The share of a step's time in which the device does nothing: a GPU no kernel, a CPU until the batch is there.

    None on a CPU where the batch is there from the beginning: nobody waits for what is not read.
    """
    if device.type == "cpu":
        return statistics.median(work.waited) * 1e3 / step_ms if work.waited else None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(FEWEST):
            work.step()
        wait(device)
    busy = sum(event.self_device_time_total for event in seen.key_averages()) / 1e3 / FEWEST  # microseconds
    return max(0.0, 1 - busy / step_ms)


def ten_most(work: Work, device: torch.device, steps: int = 3) -> str:
    """torch.profiler's ten operations that take most time of their own."""
    for _ in range(2):
        work.step()
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as seen:
        for _ in range(steps):
            work.step()
        wait(device)
    sort = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = seen.key_averages().table(sort_by=sort, row_limit=10, max_name_column_width=50)
    return "\n".join(line.rstrip() for line in table.strip().splitlines())


# ---------------------------------------------------------------- memory


def forget_peak(device: torch.device) -> None:
    """From now on `peak_mib` is of what comes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    hand_back()
    if device.type != "cuda" and os.access(FORGET, os.W_OK):
        FORGET.write_text("5")


def hand_back() -> None:
    """Free memory that a script would keep: what was measured before may have needed more."""
    trim = of_malloc("malloc_trim")
    if trim:
        trim(0)


def peak_mib(device: torch.device) -> float | None:
    """Most memory since then, of a GPU what torch took, else of the process; None where the system does not say."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else _status("VmHWM")


def own_mib() -> float | None:
    """Memory of the process that no file backs; None where the system does not say."""
    return _status("RssAnon")


def free_mib(device: torch.device) -> float | None:
    """What is left on the device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    return _status("MemAvailable", Path("/proc/meminfo"))


def _status(name: str, path: Path = STATUS) -> float | None:
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) / 2**10 if found else None
