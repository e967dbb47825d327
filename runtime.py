"""What every phase needs around its own work: device and precision, seeds, step batches, EMA; knows no model.

Randomness is a function of what it is for: `generator(seed, "noise", step)` gives the same draws whether or not the run
was interrupted before that step, so a resumed run needs no stored random state.
"""

import copy
import dataclasses
import errno
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import interruption
from checks import UsageError
from computing import keep_memory
from config import Config, InferenceConfig, RuntimeConfig
from files import says_full
from progress import own_voice

UNWRITABLE = (errno.EEXIST, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)
PLACES_OF_PATIENTS = (("data", "root"), ("data", "test"))  # settings whose very names may be a patient's

# how torch and oneDNN call it; what oneDNN cannot do at all is "a primitive descriptor"
NO_MEMORY = re.compile("can't allocate memory|can't start new thread|could not create a primitive(?! descriptor)")
# in front of a command: of malloc's own variables the one that changes nothing, so that it is left alone
HAND_BACK = "MALLOC_PERTURB_=0"

# ---------------------------------------------------------------- scripts


def run_script(main: Callable[[], None]) -> None:
    """Run a phase; what the user can put right ends in one line on stderr and exit code 2, a signal in another."""
    interruption.running()
    keeps = keep_memory()
    try:
        with own_voice():
            main()
    except UsageError as error:
        words = str(error).strip().rpartition(f"{UsageError.__module__}.{UsageError.__name__}: ")[2]  # of a data worker
        sys.exit(_one_line_error(words, code=2))
    except BrokenPipeError:  # such as of `| head -1`
        words = f"nobody reads what is printed any more: print into a file; {interruption.remembered()}"
        sys.exit(_one_line_error(words, code=2))
    except OSError as error:  # a full disk, a folder that cannot be written
        if says_full(error):
            words = "the disk is full or over its quota: make room where results go, and give the same command again"
            sys.exit(_one_line_error(words, code=2))
        remedy = ": choose a folder that can be written, or mend it" if error.errno in UNWRITABLE else ""
        sys.exit(_one_line_error(f"{error.strerror or error}: {error.filename or ''}{remedy}", code=2))
    except (MemoryError, RuntimeError) as error:
        words = _what_ran_out(error, keeps)
        if words is None:
            raise
        sys.exit(_one_line_error(f"{words}; {interruption.remembered()}", code=2))
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes the first speaks
            print(interruption.last_words(error), file=sys.stderr)
        sys.exit(getattr(error, "code", 130))
    finally:
        _end_those_ahead()


def _end_those_ahead() -> None:
    """Kill processes that still read or draw ahead.

    They ignore signals, and an error that they sent keeps their loader alive: the interpreter would wait for them.
    """
    children = multiprocessing.active_children()
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their end as an error
    for child in children:
        child.kill()
    for child in children:
        child.join()


def _what_ran_out(error: Exception, keeps: bool) -> str | None:
    """What to do about memory that is too small, or about a process that was killed for it; None for another error.

    keeps: whether memory that was freed stays with this process.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU has too little memory: lower the batch_size of this phase (vae, latent, flowdiff or inference)"
    told = NO_MEMORY.search(str(error))
    if isinstance(error, MemoryError) or told:
        return (
            f"the machine has too little memory{f' ({told[0]})' if told else ''}: lower this phase's batch_size, "
            f"data.cache_gb or data.num_workers{f', or begin the command with {HAND_BACK}' if keeps else ''}"
        )
    if "DataLoader worker" in str(error):
        return (
            "a process that reads radiographs ahead was killed, perhaps for want of memory: lower data.num_workers "
            "(0 reads in the main process) or data.cache_gb"
        )
    return None


def _one_line_error(error: object, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def all_stop(steps: interruption.Steps, accelerator: Accelerator) -> bool:
    """Whether a signal came to any process: then all of them stop after the same step."""
    if accelerator.num_processes > 1:
        heard = torch.tensor([steps.number or 0], device=accelerator.device)
        steps.number = int(accelerator.gather(heard).max()) or None
    return steps.asked


def said_by_first(word: bool, accelerator: Accelerator) -> bool:
    """What the first process says, for all of them."""
    if accelerator.num_processes == 1:
        return word
    return bool(accelerator.gather(torch.tensor([int(word)], device=accelerator.device))[0])


# ---------------------------------------------------------------- device, precision, seeds


def start(config: RuntimeConfig) -> Accelerator:
    """The accelerator with device and precision resolved, and every global seed set. Once per process."""
    if config.wandb == "online" and not os.environ.get("WANDB_API_KEY"):
        raise UsageError(
            "runtime.wandb is online but WANDB_API_KEY is not set: export the key, or use --runtime.wandb offline"
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("runtime.device is cuda but torch sees no GPU: check nvidia-smi, or use --runtime.device cpu")
    on_cpu = runs_on_cpu(config)
    together = [
        InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # the others wait while the first validates
        DistributedDataParallelKwargs(broadcast_buffers=False),  # no network here learns through a buffer
    ]
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=training_precision(config, on_cpu), kwargs_handlers=together)
    set_seed(config.seed)
    shown = precision_of(accelerator)
    accelerator.print(f"device {accelerator.device}, {accelerator.num_processes} process(es), precision {shown}")
    return accelerator


def runs_on_cpu(config: RuntimeConfig) -> bool:
    """Whether runtime.device comes to a CPU on this machine."""
    return config.device == "cpu" or not torch.cuda.is_available()


def precision_of(accelerator: Accelerator) -> str:
    """What the networks compute in while they train: float32 or bf16."""
    return "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision


def training_precision(config: RuntimeConfig, on_cpu: bool) -> str:
    """runtime.precision with auto resolved: bf16 where the hardware multiplies it, or no."""
    return config.precision if config.precision != "auto" else "bf16" if multiplies_bf16(on_cpu) else "no"


def reading_precision(config: InferenceConfig, device: torch.device) -> str:
    """inference.precision with auto resolved: float32 or bf16."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if multiplies_bf16(device.type == "cpu") else "float32"


def autocast(config: RuntimeConfig, device: torch.device) -> torch.autocast:
    """The same as a context, for what is trained without an accelerator."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=training_precision(config, device.type == "cpu") == "bf16"
    )


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

    Every epoch is a permutation drawn from (seed, epoch); a batch may span two epochs, so small sets fill large
    batches. Processes take disjoint parts of one global order.
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
                    order = torch.randperm(self.size, generator=generator(self.seed, "order", epoch)).tolist()
                    drawn = epoch
                keys.append((epoch, order[place]))
            yield keys


def step_batches(
    dataset: Dataset, batch_size: int, steps: tuple[int, int], config: Config, accelerator: Accelerator
) -> StepBatches:
    """The keys of one batch per step after steps[0] up to steps[1]: this process's part of the whole batch."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    return StepBatches(len(dataset), batch_size, *steps, config.runtime.seed, rank, ranks)


def step_loader(
    dataset: Dataset, batch_size: int, steps: tuple[int, int], config: Config, accelerator: Accelerator
) -> DataLoader:
    """Those batches, read."""
    batches = step_batches(dataset, batch_size, steps, config, accelerator)
    pinned = accelerator.device.type == "cuda"
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=config.data.num_workers,
        pin_memory=pinned,
        worker_init_fn=interruption.ignore_signals,
    )


def made_ahead(pictures: Dataset, order: Sequence[int], config: Config) -> DataLoader:
    """These items of it in this order, made by data.num_workers processes while the device computes."""
    forks = multiprocessing.get_start_method() == "fork"  # else each worker would get a copy of all images
    return DataLoader(
        pictures,
        batch_size=None,
        sampler=order,
        num_workers=config.data.num_workers if forks else 0,
        collate_fn=_as_it_is,
        worker_init_fn=interruption.ignore_signals,
    )


def _as_it_is(item: object) -> object:
    return item


def own_part(whole: Tensor, accelerator: Accelerator) -> Tensor:
    """This process's rows of something drawn for the whole batch: so the draws do not depend on how many share it."""
    return whole.tensor_split(accelerator.num_processes)[accelerator.process_index]


def learning_rate(step: int, lr: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up, then a cosine from lr to a tenth of it (Loshchilov and Hutter 2017), by the step alone."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class EMA:
    """Moving average of a network's weights; the decay starts low, (1 + n) / (10 + n): short runs forget their start.

    It counts on the host: torch's AveragedModel asks the device at every update, and stops it.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.module = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, network: nn.Module, counts: Tensor | None = None) -> None:
        """Take in the weights of now; the first ones as they are.

        Not if `counts` is False, which the device alone knows; the number of updates then rises all the same.
        """
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0
        average, current = list(self.module.parameters()), list(network.parameters())
        if counts is None:
            torch._foreach_lerp_(average, current, 1 - decay)
        else:
            change = torch._foreach_sub(current, average)
            torch._foreach_mul_(change, (1 - decay) * counts.float())
            torch._foreach_add_(average, change)
        self.updates += 1

    def state_dict(self) -> dict:
        """Weights and count, to go on from."""
        return {"weights": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave."""
        self.module.load_state_dict(state["weights"])
        self.updates = state["updates"]


# ---------------------------------------------------------------- config


def plain(config: object) -> dict:
    """A config as dicts, lists and scalars: what checkpoints and JSON may hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def shareable(config: Config) -> dict:
    """A config as `plain` gives it, less what says where things lie: that may name a patient, a clinic or a user.

    Of a path the last name stays, of data.root and data.test nothing.
    """
    shown = plain(config)
    for phase, fields in shown.items():
        for name, value in fields.items():
            if isinstance(value, str) and ("/" in value or os.sep in value or (phase, name) in PLACES_OF_PATIENTS):
                fields[name] = "" if (phase, name) in PLACES_OF_PATIENTS else Path(value).name
    return shown


def without(fields: dict, *names: str) -> dict:
    """The dict less some keys."""
    return {key: value for key, value in fields.items() if key not in names}
