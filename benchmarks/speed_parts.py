"""The parts of speed.py: which steps are measured, at which batch sizes, and what stands beside what."""

import argparse
import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import speed_work as work_of
import torch
from speed_augmentation import augmentations
from speed_reader import tuning_step, whole_step
from stopwatch import Work, compare, free_mib, hand_back, measure, own_mib, ten_most
from torch import nn

from checks import UsageError
from command_line import parse_command
from computing import laid_out
from config import Config
from latent_dataset import LatentDataset
from runtime import start

LATENTS = 512  # rows that phase 3 is timed on, but for the part scaling
GRAPHS = ("cuda",)  # devices that are given many kernels in one launch
# images a step where works stand side by side, unless fewer are asked for: what keeps the device busy
FULL = {"cpu": {"phase 1": 4, "phase 3": 4, "phase 4": 4}, "cuda": {"phase 1": 16, "phase 3": 256, "phase 4": 16}}


class Here:
    """The machine, and what is asked of it."""

    def __init__(self, options: argparse.Namespace, flags: list[str]):
        self.options, self.flags = options, flags
        self.accelerator = start(self.config(options.sizes[0], 1).runtime)
        self.device = self.accelerator.device
        gpu = self.device.type == "cuda"
        self.batches = options.batches or ([1, 4, 16, 64, 256] if gpu else [1, 4, 16])
        self.most = options.most or (4096 if gpu else 32)
        self.ceiling: dict[str, float] = {}  # measured anew for each part

    def config(self, size: int, batch: int, **inference: str) -> Config:
        """The config of a step at this size and batch."""
        config = parse_command("", [*self.flags, "--data.height", str(size), "--data.width", str(size)]).config
        batched = {name: dataclasses.replace(getattr(config, name), batch_size=batch) for name in ("vae", "latent")}
        batched["flowdiff"] = dataclasses.replace(config.flowdiff, batch_size=batch)
        batched["inference"] = dataclasses.replace(config.inference, batch_size=batch, **inference)
        return dataclasses.replace(config, **batched)

    def full(self, kind: str) -> int:
        """Images a step of this kind of work, where works stand side by side."""
        return min(FULL[self.device.type][kind], self.batches[-1])

    def latents(self, size: int, rows: int = LATENTS) -> LatentDataset:
        """Synthetic latents on the disk."""
        config, folder = self.config(size, 1), self.synthetic / f"{size}-{rows}"
        channels = work_of.pretrained_vae(config.vae).latent_channels
        return work_of.latents_on_disk(folder, rows, config, channels)

    @property
    def synthetic(self) -> Path:
        """Where they lie, and nothing else does."""
        return self.options.outputs / "synthetic_latents"

    def forget(self) -> None:
        """Let go of what was prepared."""
        self.accelerator.free_memory()
        hand_back()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def each_batch(make: Callable[[Here, int, int], Work]) -> Callable[[Here, int], list[dict]]:
    """A part that measures one kind of step at every batch size, up to the first that does not fit."""

    def run(here: Here, size: int) -> list[dict]:
        rows = []
        for batch in here.batches:
            rows.append(one_row(lambda batch=batch: make(here, size, batch), batch, here, here.options.seconds))
            if not rows[-1]["fits"]:
                break
        return rows

    return run


def one_row(make: Callable[[], Work], batch: int, here: Here, seconds: float) -> dict:
    """What a kind of step takes at one batch size, or that it does not fit."""
    try:
        row = {"batch": batch, "fits": True, **measure(make(), here.device, seconds, here.ceiling)}
    except torch.OutOfMemoryError:
        row = {"batch": batch, "fits": False}
    here.forget()
    shown = f"{row['images_per_s']:.3g} images/s" if row["fits"] else "does not fit"
    print(f"  batch {batch}: {shown}", flush=True)
    return row


def phase1(here: Here, size: int, batch: int) -> Work:
    """A step of phase 1."""
    return work_of.phase1(here.config(size, batch), here.accelerator)


def phase2(here: Here, size: int, batch: int) -> Work:
    """A batch of phase 2."""
    return work_of.phase2(here.config(size, batch), here.accelerator)


def phase3(here: Here, size: int, batch: int) -> Work:
    """A step of phase 3 before the identity constraint begins."""
    return work_of.phase3(here.config(size, batch), here.accelerator, here.latents(size))


def phase3_identity(here: Here, size: int, batch: int) -> Work:
    """A step of phase 3 with the identity constraint."""
    return work_of.phase3(here.config(size, batch), here.accelerator, here.latents(size), identity=True)


def phase4(method: str) -> Callable[[Here, int, int], Work]:
    """A batch of phase 4 by a method."""
    return lambda here, size, batch: work_of.phase4(here.config(size, batch, method=method), here.accelerator)


def fit(make: Callable[[Here, int, int], Work]) -> Callable[[Here, int], list[dict]]:
    """A part that doubles the batch until memory ends; a CPU is not driven so far: it would take what others need."""

    def run(here: Here, size: int) -> list[dict]:
        rows, batch = [], 1
        while batch <= here.most:
            rows.append(one_row(lambda batch=batch: make(here, size, batch), batch, here, here.options.seconds / 4))
            left, needed = free_mib(here.device), rows[-1].get("peak_mib")
            if not rows[-1]["fits"] or (here.device.type == "cpu" and left and needed and 2 * needed > left):
                break
            batch *= 2
        return rows

    return run


def profiled(kind: str, make: Callable[[Here, int, int], Work]) -> Callable[[Here, int], list[dict]]:
    """A part that says which operations of this kind of work take the time."""

    def run(here: Here, size: int) -> list[dict]:
        batch = here.batches[-1] if here.device.type == "cpu" else here.full(kind)
        return [{"batch": batch, "text": ten_most(make(here, size, batch), here.device)}]

    return run


def side_by_side(works: dict[str, Work], here: Here) -> list[dict]:
    """Rows of what takes turns, each with how many times as fast as the first an image goes through."""
    times = compare(works, here.device, here.options.seconds)
    first, rows = next(iter(works)), []
    for name, work in works.items():
        per_image = {clock: times[name][clock] / work.images for clock in ("step_ms", "core_ms")}
        against = {clock: times[first][clock] / works[first].images for clock in per_image}
        row = {"row": name, "batch": work.images, "images_per_s": 1e3 / per_image["step_ms"], **times[name]}
        row |= {
            "times": against["step_ms"] / per_image["step_ms"],
            "core_times": against["core_ms"] / per_image["core_ms"],
        }
        rows.append(row)
        print(f"  {name}: {row['images_per_s']:.3g} images/s, {row['times']:.2f} times the first", flush=True)
    here.forget()
    return rows


def plain_loop(here: Here, size: int) -> list[dict]:
    """Phase 3 beside a plain loop on the same network and latents, at the largest batch asked for."""
    config, latents = here.config(size, here.batches[-1]), here.latents(size)
    theirs, ours = work_of.plain_loop(config, here.accelerator, latents), phase3(here, size, here.batches[-1])
    return side_by_side({"a plain loop in float32": theirs, "phase 3": ours}, here)


def tuning(here: Here, size: int) -> list[dict]:
    """The reader's tuned backbone: our backward pass of depthwise convolutions beside torch's."""
    config, accelerator = here.config(size, 1), here.accelerator
    names = {"tuned backbone, torch's backward pass": False, "tuned backbone": True}
    return side_by_side({name: tuning_step(config, accelerator, ours) for name, ours in names.items()}, here)


def lessons(here: Here, size: int) -> list[dict]:
    """The reader's tuned backbone, steps with the corruptions that they learn from."""
    config = here.config(size, 1)
    return [one_row(lambda: whole_step(config, here.accelerator), config.reader.crops, here, here.options.seconds)]


def augmentation(here: Here, size: int) -> list[dict]:
    """Augmentation by the host, image by image, beside batches on the device."""
    batches = [here.config(size, batch) for batch in here.batches]
    works = (augmentations(config, here.accelerator) for config in batches)
    return [row for each in works for row in side_by_side(each, here)]


def examinations(here: Here, size: int) -> list[dict]:
    """Phase 4 beside PatchCore on the same backbone, and beside a diffusion model of pixels: one step, times 250."""
    batch, works = here.full("phase 4"), {}
    works["PatchCore"] = work_of.patchcore(here.config(size, batch), here.accelerator)
    for method in ("reader", "statistical", "plain"):
        works[f"phase 4, {method}"] = phase4(method)(here, size, batch)
    rows = side_by_side(works, here)
    one = {"one step of it": work_of.pixel_diffusion_step(here.config(size, 1), here.accelerator)}
    walk = side_by_side(one, here)[0]
    walk |= {"row": f"a diffusion model of pixels, {work_of.WALK} steps (one was timed)"}
    for clock in ("step_ms", "core_ms"):
        walk[clock] *= work_of.WALK
    walk["images_per_s"] /= work_of.WALK
    walk["times"], walk["core_times"] = (
        rows[0][clock] / rows[0]["batch"] / walk[clock] for clock in ("step_ms", "core_ms")
    )
    return [*rows, walk]


def settings(here: Here, size: int) -> list[dict]:
    """Each setting of computing.py one way and the other, and a crop in phase 1, beside what the scripts do here."""
    latents, accelerator = here.latents(size), here.accelerator
    whole = dataclasses.replace(here.config(size, here.full("phase 1")).vae, crop=0)
    config = dataclasses.replace(here.config(size, here.full("phase 3")), vae=whole)

    def of(make: Callable[..., Work], *given: object) -> dict[str, Work]:
        def changed(**change: object) -> Work:
            return make(config, accelerator, *given, **change)

        found = {"": changed()}
        found["channels first"] = changed(change=lambda network: network.to(memory_format=torch.contiguous_format))
        found["channels last"] = changed(change=lambda network: network.to(memory_format=torch.channels_last))
        return found | {"AdamW in many kernels": changed(fused=False), "AdamW in one": changed(fused=True)}

    kinds = {"phase 1": of(work_of.phase1), "phase 3": of(work_of.phase3, latents)}
    half = dataclasses.replace(config, vae=dataclasses.replace(config.vae, crop=size // 2))
    kinds["phase 1"]["crops of half a side"] = work_of.phase1(half, accelerator)
    rows = []
    for kind, works in kinds.items():
        rows += side_by_side({f"{kind}, {name}" if name else kind: work for name, work in works.items()}, here)
    return rows


def compiling(kind: str) -> Callable[[Here, int], list[dict]]:
    """A part that says what runtime.compile brings, once it has compiled; of phase 3 on a GPU CUDA graphs of that, too.

    For graphs there is no setting: they get one if they pay.
    """

    def run(here: Here, size: int) -> list[dict]:
        make, given = (work_of.phase1, ()) if kind == "phase 1" else (work_of.phase3, (here.latents(size),))
        config = here.config(size, here.full(kind))
        other = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, compile=True))
        works = {kind: make(config, here.accelerator, *given)}
        works[f"{kind}, compiled"] = make(other, here.accelerator, *given)
        if kind == "phase 3" and here.device.type in GRAPHS:
            works[f"{kind}, compiled, CUDA graphs"] = make(config, here.accelerator, *given, change=as_graphs)
        return side_by_side(works, here)

    return run


def as_graphs(network: nn.Module) -> nn.Module:
    """The same module, laid out as phase 3 does, whose calls are compiled and launched as CUDA graphs."""
    network = laid_out(network, next(network.parameters()).device)
    network.compile(mode="reduce-overhead")
    return network


def scaling(here: Here, size: int) -> list[dict]:
    """Time and memory of phase 3 against the number of latents."""
    rows, batch = [], min(16, here.batches[-1])
    for count in here.options.counts:
        needed = count * here.config(size, 1).data.height * size // 64 * 16 / 2**20  # MiB, of four channels
        if needed > shutil.disk_usage(Path.cwd()).free / 2**20 * 0.9:
            raise UsageError(
                f"{count} latents are {needed / 1024:.0f} GiB, more than the disk has: give other --counts"
            )
        here.latents(size, count)
        began, folder = time.monotonic(), here.synthetic / f"{size}-{count}"
        latents = LatentDataset(folder, "train")
        opened = time.monotonic() - began
        work = work_of.phase3(here.config(size, batch), here.accelerator, latents)
        row = {"latents": count, "batch": batch, **compare({"it": work}, here.device, here.options.seconds)["it"]}
        rows.append(row | {"open_s": opened, "own_mib": own_mib()})
        print(f"  {count} latents: {row['step_ms']:.0f} ms a step", flush=True)
        shutil.rmtree(folder)
        here.forget()
    return rows


PARTS: dict[str, Callable[[Here, int], list[dict]]] = {
    "phase1": each_batch(phase1),
    "phase2": each_batch(phase2),
    "phase3": each_batch(phase3),
    "phase3-identity": each_batch(phase3_identity),
    "phase4-plain": each_batch(phase4("plain")),
    "phase4-statistical": each_batch(phase4("statistical")),
    "phase4-reader": each_batch(phase4("reader")),
    "plain-loop": plain_loop,
    "tuning": tuning,
    "tuning-whole": lessons,
    "augmentation": augmentation,
    "examinations": examinations,
    "settings": settings,
    "compile-phase1": compiling("phase 1"),
    "compile-phase3": compiling("phase 3"),
    "scaling": scaling,
    "fit-phase1": fit(phase1),
    "fit-phase3": fit(phase3),
    "profile-phase1": profiled("phase 1", phase1),
    "profile-phase3": profiled("phase 3", phase3),
}
# at the first size alone
ONCE = (
    *("plain-loop", "tuning", "tuning-whole", "settings", "compile-phase1", "compile-phase3"),
    *("scaling", "profile-phase1", "profile-phase3"),
)
