"""Leaf: how a phase computes, beyond what it computes: layout, optimizer, compiled networks, memory, TF32.

What changes no more than rounding, and only where it was measured to pay or where a GPU is known for it; a CPU computes
to the bit what it did before, unless runtime.compile says otherwise. `python benchmarks/speed.py --parts settings`
measures each.
"""

import ctypes
import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from checks import UsageError
from config import RuntimeConfig

WAITED_FOR = ("cpu",)  # devices whose gradients the host looks at, for that stops nothing there
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as malloc.h numbers them
Network = TypeVar("Network", bound=nn.Module)


def adamw(weights: Iterable[Tensor], lr: float, weight_decay: float, device: torch.device) -> torch.optim.AdamW:
    """AdamW, on a GPU in one kernel that can also leave a step out (`leaves_out`).

    On a CPU that kernel is quicker, too, but with it two processes of phase 1 do not end where one does, and it takes
    gradients in the order of memory: those of other strides than their weights would be scrambled.
    """
    fused = device.type not in WAITED_FOR
    return torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay, fused=True if fused else None)


def continue_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Take up what an optimizer knew, whatever its kernel and layout: an earlier version's, or of another device."""
    fused = optimizer.param_groups[0]["fused"]
    groups = [{**group, "fused": fused} for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for weight, known in optimizer.state.items():
        for name, value in known.items():
            if value.shape == weight.shape:  # one kernel wants both laid out alike
                known[name] = torch.empty_like(weight, requires_grad=False).copy_(value)


def leaves_out(optimizer: torch.optim.Optimizer) -> torch.optim.AdamW | None:
    """The optimizer itself, without accelerate's wrapper, if the device can leave a step out; None on a CPU."""
    own = getattr(optimizer, "optimizer", optimizer)
    return own if own.param_groups[0]["fused"] else None


def laid_out(network: Network, device: torch.device) -> Network:
    """Channels last on a GPU, which is what its convolutions of half precision compute in."""
    return network if device.type in WAITED_FOR else network.to(memory_format=torch.channels_last)


def fast_products(device: torch.device) -> None:
    """On a GPU what a training leaves in float32 is multiplied in TF32: of its inputs 10 bits of mantissa are read."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def keep_memory() -> bool:
    """Let this process keep what it frees for what it needs next; False where there is no mallopt.

    By itself glibc hands the memory of a large array back when it is freed, and the kernel clears it anew, page by
    page, for the next one: of a network on a CPU, every layer, every time. What was needed once stays until the end.
    Who sets one of malloc's own variables, such as MALLOC_PERTURB_, has decided otherwise.
    """
    mallopt = of_malloc("mallopt")
    tuned = any(name.startswith("MALLOC_") for name in os.environ)
    if mallopt is None or tuned or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1)])


def of_malloc(name: str) -> Callable[..., int] | None:
    """A function of GNU's malloc; None on other systems, which keep memory as they see fit."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # a python without a dynamic linker, and Windows
        return None


def busy(device: torch.device) -> Callable[[], bool]:
    """Asks a GPU whether it still computes what it was given, without waiting for it; a CPU has always done it."""
    if device.type != "cuda":
        return lambda: False
    return lambda: not torch.cuda.current_stream(device).query()


def compiled(network: Network, config: RuntimeConfig, device: torch.device) -> Network:
    """The same module, whose calls are compiled if runtime.compile says so; its weights keep their names.

    UsageError where nothing can be compiled.
    """
    if config.compile:
        _refuse_without_a_compiler(device)
        network.compile()
    return network


def _refuse_without_a_compiler(device: torch.device) -> None:
    try:
        torch.compile(lambda x: (x + 1).relu())(torch.zeros(8, device=device))
    except (RuntimeError, OSError, ImportError) as error:  # whatever is missing, torch tells it in one of these
        said = [line for line in str(error).splitlines() if line.strip()]
        needs = "a C++ compiler such as g++" if device.type == "cpu" else "Triton and a C compiler"
        raise UsageError(
            f"runtime.compile needs {needs}, and compiling fails here ({said[0] if said else type(error).__name__}): "
            "install it, or leave --runtime.compile False"
        ) from error
