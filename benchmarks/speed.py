"""How fast each phase is, beside what the hardware can do and beside others: python benchmarks/speed.py --parts all

    --parts A,B           which to measure, or all; without it, none: only the table is printed
    --sizes 256,512       pixels of a side
    --batches 1,4,16      images a step; without it 1,4,16 on a CPU and 1,4,16,64,256 on a GPU
    --seconds 20          for each row, after a warm-up
    --fit                 the largest batch that fits, and the fastest, for phases 1 and 3: doubled until memory ends
    --most 32             the largest batch that --fit tries; without it 32 on a CPU, 4096 on a GPU
    --profile             the ten operations of phases 1 and 3 that take most time, as text
    --anew                measure parts again that are there already
    --counts 1000,10000   numbers of latents of the part scaling; a million are 16 GB at 256 pixels
    --outputs FOLDER      where synthetic latents go, and are removed again
    --results FOLDER      where each finished part is kept as JSON, and the table of all parts as table.md
    FLAGS                 anything else goes to the phases, such as --preset cpu --vae.pretrained MODELS/taesd

Networks are untrained, or what --vae.pretrained names. A part measures first what the device can do at most, in a
product of matrices in each precision and in a copy; `share` is what a step computes of that (torch's count of products,
convolutions and attention). `waits` is the share of a step in which the device has nothing to do: on a GPU no kernel
runs, on a CPU the batch is not there. Memory is that of a GPU, or of the whole process at its peak. What is set side by
side takes turns in one run; ratios are of medians, by the clock and of processor time, which other jobs disturb less.
"""

import argparse
import dataclasses
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import accelerate
import diffusers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import speed_table
import speed_work as work_of
from detection import commit
from stopwatch import Work, ceilings, compare, free_mib, measure, own_mib, ten_most

from checks import UsageError
from command_line import field_of, parse_command
from config import Config
from files import write_atomically, write_json
from interruption import remember
from latent_dataset import LatentDataset
from runtime import run_script, start

ROOT = Path(__file__).resolve().parents[1]
OWN_FLAGS = ("data.height", "data.width", "vae.batch_size", "flowdiff.batch_size", "latent.batch_size", "outputs")
OWN_FLAGS += ("inference.batch_size", "inference.method")
LATENTS = 512  # rows that phase 3 is timed on, but for the part scaling
FITTED = ("phase1", "phase3")


def main() -> None:
    options, flags = arguments()
    remember("parts that are finished are kept, the same command goes on with the others")
    if options.parts:
        here = Here(options, flags)
        for part in options.parts:
            for size in options.sizes if part not in ONCE else options.sizes[:1]:
                run_part(part, size, here)
    table = speed_table.table_of(options.results)
    print(table)
    write_atomically(options.results / "table.md", lambda beside: beside.write_text(table + "\n"))


def numbers(text: str) -> list[int]:
    """Of 1,4,16."""
    return [int(number) for number in text.split(",")]


def arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """What was asked for, and the flags of the phases."""
    style = argparse.RawDescriptionHelpFormatter
    epilog = "parts:\n  " + "\n  ".join(PARTS)
    parser = argparse.ArgumentParser(description=__doc__, epilog=epilog, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--parts", type=lambda text: [name.strip() for name in text.split(",")], default=[])
    parser.add_argument("--sizes", type=numbers, default=[256, 512])
    parser.add_argument("--batches", type=numbers)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--most", type=int)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--anew", action="store_true")
    parser.add_argument("--counts", type=numbers, default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--outputs", type=Path, default=Path("outputs/speed"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/speed")
    options, flags = parser.parse_known_args(argv)
    if options.parts == ["all"]:
        options.parts = list(PARTS)
    options.parts += [f"fit-{name}" for name in FITTED if options.fit and f"fit-{name}" not in options.parts]
    options.parts += [
        f"profile-{name}" for name in FITTED if options.profile and f"profile-{name}" not in options.parts
    ]
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        raise UsageError(f"--parts: {unknown[0]} is unknown, choose all or from {', '.join(PARTS)}")
    belied = [flag for flag in flags if flag.startswith("--") and field_of(flag) in OWN_FLAGS]
    if belied:
        raise UsageError(f"{belied[0]} is this command's to give: use --sizes, --batches, --parts or --outputs")
    return options, flags


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
        config = parse_command(__doc__, [*self.flags, "--data.height", str(size), "--data.width", str(size)]).config
        batched = {name: dataclasses.replace(getattr(config, name), batch_size=batch) for name in ("vae", "latent")}
        batched["flowdiff"] = dataclasses.replace(config.flowdiff, batch_size=batch)
        batched["inference"] = dataclasses.replace(config.inference, batch_size=batch, **inference)
        return dataclasses.replace(config, **batched)

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
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def run_part(part: str, size: int, here: Here) -> None:
    """One part: measured and kept, or taken as it is where it was kept before."""
    options = here.options
    preset = parse_command(__doc__, here.flags).words
    named = [Path(word).name if "/" in word else word for word in preset]
    label = named[named.index("--preset") + 1] if "--preset" in named else "default"
    path = options.results / f"{part}-{size}-{here.device.type}-{label}.json"
    asked = {"flags": named}
    if path.is_file() and not options.anew:
        if speed_table.read_part(path)["asked"] != asked:
            raise UsageError(f"{path.name} is of other flags: add --anew, or choose another --results")
        print(f"{part} at {size}: there already ({path.name}; --anew measures it again)")
        return
    options.results.mkdir(parents=True, exist_ok=True)
    print(f"{part} at {size} ...", flush=True)
    began, here.ceiling = time.monotonic(), ceilings(here.device)
    try:
        rows = PARTS[part](here, size)
    finally:
        here.forget()
        shutil.rmtree(here.synthetic, ignore_errors=True)
    said = {"part": part, "size": size, "device": here.device.type, "preset": label, "asked": asked, "commit": commit()}
    said |= {"hardware": hardware(here.device), "versions": versions(), "seconds": options.seconds}
    said |= {"minutes": round((time.monotonic() - began) / 60, 1), "ceiling": here.ceiling}
    write_json(path, said | {"rows": rows})
    if part.startswith("profile"):
        text = f"{part} at {size}, {said['hardware']}, {label} preset, commit {said['commit']}\n\n{rows[0]['text']}\n"
        write_atomically(path.with_suffix(".txt"), lambda beside: beside.write_text(text))


def hardware(device: torch.device) -> str:
    """What it runs on, and on how much of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if "model name" in line]
        if (cpus.is_file())
        else []
    )
    name = names[0] if names else platform.machine()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def versions() -> dict[str, str | None]:
    """Of what the time depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    return found | {"diffusers": diffusers.__version__, "accelerate": accelerate.__version__}


# ---------------------------------------------------------------- parts


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


def profiled(make: Callable[[Here, int, int], Work]) -> Callable[[Here, int], list[dict]]:
    """A part that says which operations take the time."""

    def run(here: Here, size: int) -> list[dict]:
        batch = here.batches[-1] if here.device.type == "cpu" else min(64, here.batches[-1])
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


def examinations(here: Here, size: int) -> list[dict]:
    """Phase 4 beside PatchCore on the same backbone, and beside a diffusion model of pixels: one step, times 250."""
    batch, works = min(4, here.batches[-1]), {}
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
    batch, latents = min(4, here.batches[-1]), here.latents(size)
    config, accelerator = here.config(size, batch), here.accelerator

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


def compiling(here: Here, size: int) -> list[dict]:
    """What runtime.compile changes, once it has compiled."""
    batch, latents, rows = min(4, here.batches[-1]), here.latents(size), []
    config, accelerator = here.config(size, batch), here.accelerator
    other = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, compile=True))
    for kind, make, given in (("phase 1", work_of.phase1, ()), ("phase 3", work_of.phase3, (latents,))):
        pair = {kind: make(config, accelerator, *given), f"{kind}, compiled": make(other, accelerator, *given)}
        rows += side_by_side(pair, here)
    return rows


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
    "examinations": examinations,
    "settings": settings,
    "compile": compiling,
    "scaling": scaling,
    "fit-phase1": fit(phase1),
    "fit-phase3": fit(phase3),
    "profile-phase1": profiled(phase1),
    "profile-phase3": profiled(phase3),
}
ONCE = ("plain-loop", "settings", "compile", "scaling", "profile-phase1", "profile-phase3")  # at the first size alone


if __name__ == "__main__":
    run_script(main)
