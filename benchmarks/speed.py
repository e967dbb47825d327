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

Networks are untrained, or what --vae.pretrained names. A part measures before and after what the device can do at most,
in a product of matrices in each precision and in a copy; `share` is what a step computes of the higher one (torch's
count of products, convolutions and attention). `waits` is the share of a step in which the device has nothing to do: on
a GPU no kernel runs, on a CPU the batch is not there (phases 2 and 4 are timed on one batch in memory: `-`). Memory is
that of a GPU, or of the whole process at its peak. What is set side by side takes turns in one run; ratios are of
medians, by the clock and of processor time, which other jobs disturb less.
"""

import argparse
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import accelerate
import diffusers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import speed_table
from detection import commit
from speed_parts import ONCE, PARTS, Here
from stopwatch import ceilings

from checks import UsageError
from command_line import field_of
from files import write_atomically, write_json
from interruption import remember
from runtime import reading_precision, run_script

ROOT = Path(__file__).resolve().parents[1]
OWN_FLAGS = ("data.height", "data.width", "vae.batch_size", "flowdiff.batch_size", "latent.batch_size", "outputs")
OWN_FLAGS += ("inference.batch_size", "inference.method")
FITTED = ("phase1", "phase3")
READS = ("phase4-plain", "phase4-statistical", "phase4-reader", "examinations")


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


def run_part(part: str, size: int, here: Here) -> None:
    """One part: measured and kept, or taken as it is where it was kept before."""
    options = here.options
    label, asked = label_of(here.flags), asked_for(part, size, here)
    path = options.results / f"{part}-{size}-{here.device.type}-{label.replace(', ', '-')}.json"
    if path.is_file() and not options.anew:
        if speed_table.read_part(path)["asked"] != asked:
            other = "of other flags, or read in another precision"
            raise UsageError(f"{path.name} is {other}: add --anew, or choose another --results")
        print(f"{part} at {size}: there already ({path.name}; --anew measures it again)")
        return
    options.results.mkdir(parents=True, exist_ok=True)
    print(f"{part} at {size} ...", flush=True)
    began, here.ceiling = time.monotonic(), ceilings(here.device)
    try:
        rows = PARTS[part](here, size)
        here.ceiling = higher(rows, here.ceiling, ceilings(here.device))
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


def higher(rows: list[dict], before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The higher ceiling of each precision, and the rows' shares of it: another job may lower one of the two."""
    highest = {name: max(before[name], after[name]) for name in before}
    for row in rows:
        if "share" in row:
            row["share"] *= before[row["precision"]] / highest[row["precision"]]
    return highest


def asked_for(part: str, size: int, here: Here) -> dict:
    """What makes a part that is kept the one that is asked for: flags, and what a preset may change of phase 4."""
    asked = {"flags": [Path(word).name if "/" in word else word for word in here.flags]}
    precision = reading_precision(here.config(size, 1).inference, here.device)
    return asked | {"reads_in": precision} if part in READS and precision != "float32" else asked


def label_of(flags: list[str]) -> str:
    """The preset, and whether more of it was changed than the autoencoder's source."""
    preset = flags[flags.index("--preset") + 1] if "--preset" in flags else "default"
    changed = [word for word in flags if word.startswith("--") and word not in ("--preset", "--vae.pretrained")]
    return f"{preset}, changed" if changed else preset


def hardware(device: torch.device) -> str:
    """What it runs on, and on how much of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")  # of Linux
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def versions() -> dict[str, str | None]:
    """Of what the time depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    return found | {"diffusers": diffusers.__version__, "accelerate": accelerate.__version__}


if __name__ == "__main__":
    run_script(main)
