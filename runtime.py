"""What every phase needs around its own work: device and precision, seeds, EMA, checkpoints, log; knows no model.

Randomness is a function of what it is for: `generator(seed, "noise", step)` gives the same draws whether or not the run was
interrupted before that step, so a resumed run needs no stored random state.
"""

import csv
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from config import Config, RuntimeConfig, UsageError
from files import load_checkpoint, write_csv

# ---------------------------------------------------------------- scripts


def run_script(main: Callable[[], None]) -> None:
    """Run a phase; what the user can put right ends in one line on stderr and exit code 2."""
    try:
        main()
    except UsageError as error:
        sys.exit(_one_line_error(error, code=2))
    except OSError as error:  # a full disk, a folder that cannot be written
        sys.exit(_one_line_error(f"{error.strerror or error}: {error.filename or ''}", code=2))
    except KeyboardInterrupt:
        sys.exit(
            _one_line_error("interrupted; run the same command again to continue from the last checkpoint", code=130)
        )


def _one_line_error(error: object, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


# ---------------------------------------------------------------- device, precision, seeds


def start(config: RuntimeConfig) -> Accelerator:
    """The accelerator with device and precision resolved, and every global seed set. Once per process."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("runtime.device is cuda but torch sees no GPU: check nvidia-smi, or use --runtime.device cpu")
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(on_cpu) else "no"
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision)
    set_seed(config.seed)
    accelerator.print(
        f"device {accelerator.device}, {accelerator.num_processes} process(es), precision {'float32' if precision == 'no' else precision}"
    )
    return accelerator


def multiplies_bf16(on_cpu: bool) -> bool:
    """Whether the hardware multiplies bfloat16 itself: GPUs since Ampere, CPUs with AVX512-BF16."""
    return torch.cpu._is_avx512_bf16_supported() if on_cpu else torch.cuda.is_bf16_supported(including_emulation=False)


def stream_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of `key`: SHA-256, so that neighbouring steps are unrelated."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for one purpose, such as generator(seed, "noise", step, rank)."""
    return torch.Generator().manual_seed(stream_seed(*key))


class StepBatches:
    """Batches of (epoch, index) keys for steps start + 1 to total: a batch sampler that can begin anywhere.

    Every epoch is a permutation drawn from (seed, epoch); a batch may span two epochs, so small sets fill large batches.
    Processes take disjoint parts of one global order.
    """

    def __init__(self, size: int, batch_size: int, start: int, total: int, seed: int, rank: int = 0, ranks: int = 1):
        self.size, self.batch_size, self.start, self.total = size, batch_size, start, total
        self.seed, self.rank, self.ranks = seed, rank, ranks

    def __len__(self) -> int:
        return max(0, self.total - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, drawn = None, -1
        for step in range(self.start, self.total):
            keys = []
            first = (step * self.ranks + self.rank) * self.batch_size
            for position in range(first, first + self.batch_size):
                epoch, place = divmod(position, self.size)
                if epoch != drawn:
                    order, drawn = (
                        torch.randperm(self.size, generator=generator(self.seed, "order", epoch)).tolist(),
                        epoch,
                    )
                keys.append((epoch, order[place]))
            yield keys


def learning_rate(step: int, lr: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up, then a cosine from lr to a tenth of it (Loshchilov and Hutter 2017); a function of the step alone."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def build_ema(model: nn.Module, decay: float) -> torch.optim.swa_utils.AveragedModel:
    """EMA of the weights; the decay starts low, (1 + n) / (10 + n), so that short runs forget their random start."""

    @torch.no_grad()
    def average(ema: list[torch.Tensor], weights: list[torch.Tensor], count: torch.Tensor | int) -> None:
        current = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(ema, weights, 1 - current)

    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average).requires_grad_(False).eval()


# ---------------------------------------------------------------- files that appear whole


def plain(config: object) -> dict:
    """A config as dicts, lists and scalars: what checkpoints and JSON may hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def without(fields: dict, *names: str) -> dict:
    """The dict less some keys."""
    return {key: value for key, value in fields.items() if key not in names}


def resume_point(path: Path, kind: str, config: dict, resume: bool, made_by: str) -> dict | None:
    """The content of checkpoint_last.pt to continue from, or None for a new run.

    Raises UsageError, naming every field that differs, if that checkpoint was written under another config.
    """
    if not resume or not path.is_file():
        return None
    content = load_checkpoint(path, kind, made_by)
    changes = [f"{key} was {old!r}, now {new!r}" for key, old, new in _differences(content["config"], config)]
    if changes:
        raise UsageError(
            f"{path} was written under another config ({'; '.join(changes)}): go back to it, choose another --outputs folder, "
            "or start anew with --runtime.resume False"
        )
    return content


def _differences(old: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", before, after


# ---------------------------------------------------------------- log


class RunLog:
    """Numbers of a run: always rows of (step, name, value) in log.csv; by config also wandb, which never gets an image or a path.

    A resumed run drops the rows after the step it resumes from, so that the file reads as if nothing had happened.
    """

    def __init__(self, folder: Path | str, name: str, config: Config, from_step: int = 0, enabled: bool = True):
        self.path, self.enabled, self.run = Path(folder) / "log.csv", enabled, None
        if not enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if from_step and self.path.is_file():
            kept = [row for row in _whole_rows(self.path) if int(row[0]) <= from_step]
        write_csv(self.path, ["step", "name", "value"], kept)
        if config.runtime.wandb != "disabled":
            self.run = _start_wandb(self.path.parent, name, config)

    def write(self, step: int, values: dict[str, float | str]) -> None:
        """Append one row per value; a string such as "n/a" says why there is no number."""
        if not self.enabled:
            return
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerows(
                [step, name, value if isinstance(value, str) else f"{value:.6g}"] for name, value in values.items()
            )
        if self.run is not None:
            self.run.log({name: value for name, value in values.items() if not isinstance(value, str)}, step=step)

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


def _start_wandb(folder: Path, name: str, config: Config):
    if config.runtime.wandb == "online" and not os.environ.get("WANDB_API_KEY"):
        raise UsageError(
            "runtime.wandb is online but WANDB_API_KEY is not set: export the key, or use --runtime.wandb offline"
        )
    if config.runtime.wandb == "offline":
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # offline mode looks a host up without this
    import wandb

    shown = plain(config)
    numbers = {
        phase: {key: value for key, value in fields.items() if not isinstance(value, str)}
        for phase, fields in shown.items()
    }
    settings = wandb.Settings(
        disable_git=True,
        disable_code=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        console="off",
        silent=True,
    )
    return wandb.init(
        project=config.runtime.wandb_project,
        name=name,
        mode=config.runtime.wandb,
        dir=folder,
        config=numbers,
        settings=settings,
    )


def read_log(folder: Path | str) -> dict[str, tuple[list[int], list[float]]]:
    """log.csv as name -> (steps, values), numbers only."""
    history: dict[str, tuple[list[int], list[float]]] = {}
    for step, name, value in _whole_rows(Path(folder) / "log.csv"):
        if value != "n/a":
            steps, values = history.setdefault(name, ([], []))
            steps.append(int(step))
            values.append(float(value))
    return history


def _whole_rows(path: Path) -> list[list[str]]:
    """The rows of a log below its header, less a last one that a power cut tore."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [row for row in rows if len(row) == 3 and row[2]]


class Meter:
    """Running means between two log lines, and the images per second over the same stretch."""

    def __init__(self):
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.images, self.began = 0, time.perf_counter()

    def add(self, values: dict[str, float | torch.Tensor], images: int = 0) -> None:
        for name, value in values.items():
            if not isinstance(value, str):
                self.sums[name] = self.sums.get(name, 0.0) + float(value)
                self.counts[name] = self.counts.get(name, 0) + 1
        self.images += images

    def flush(self) -> dict[str, float]:
        """The means since the last flush."""
        means = {name: self.sums[name] / self.counts[name] for name in self.sums}
        if self.images:
            means["images_per_s"] = self.images / max(1e-9, time.perf_counter() - self.began)
        self.__init__()
        return means
