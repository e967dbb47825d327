"""Phases 1 and 3, killed at random moments: python benchmarks/faults.py --kills 100

Each trial starts a phase on a dozen phantoms in an empty folder, kills it without warning (SIGKILL) at a random moment,
often in the middle of a write (writes are slowed down for that), looks at what it left, and gives the same command
again. Prints for each phase

killed        how many trials; `in a write` those that were killed while a file was being written. One that ended before
              it was killed is no trial: another moment is drawn
resumed       the second run ended well; `went on` those that did not begin anew
identical     weights, moving average, optimizer, best checkpoint and validation log are those of a run that nobody
              killed, to the last bit
whole         every file that the killed run left under its own name can be read
leftovers     files of half a write that are there after the second run

Trials are kept one by one in --folder, and a benchmark that was stopped goes on. Writes benchmarks/results/faults.json.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import ROOT, SETTINGS

from checks import UsageError
from files import load_checkpoint, sha256, write_json
from interruption import remember
from phantoms import phantom
from run_log import read_log
from runtime import run_script, stream_seed

PHASES = {"train_vae": "phase1_vae", "train_flowdiff": "phase3_flowdiff"}
LONGER = """
    --vae.steps 30 --vae.validate-every 10 --flowdiff.total-steps 40 --flowdiff.phase1-steps 20
    --flowdiff.identity-warmup-start 10 --flowdiff.identity-warmup-end 30 --flowdiff.validate-every 20
    --flowdiff.sample-every 40 --runtime.checkpoint-every 3 --runtime.device cpu
""".split()
SLOW_DISK = 0.1  # seconds that a write waits for its disk, at most
KINDS = {"checkpoint_best.pt": ("vae", "flowdiff"), "checkpoint_last.pt": ("vae-training", "flowdiff-training")}


def main() -> None:
    """All trials that are not there yet, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="trials of each phase")
    parser.add_argument("--folder", type=Path, default=Path("outputs/faults"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/faults.json")
    options = parser.parse_args()
    remember("trials that are finished are kept, the same command goes on with the others")
    folder = options.folder.resolve()
    os.chdir(ROOT)
    processes = multiprocessing.get_context("forkserver")  # torch is imported once
    processes.set_forkserver_preload(["train_vae", "train_flowdiff"])
    seconds = reference(processes, folder)
    trials = {script: [] for script in PHASES}
    with tqdm(total=options.kills * len(PHASES), unit="kill") as progress:
        for script, found in trials.items():
            for number in range(options.kills):
                found.append(one_trial(processes, script, number, seconds[script], folder))
                progress.update()
    table = {script: summary(found) for script, found in trials.items()}
    write_json(options.results, {"kills": options.kills, "phases": table})
    print("| phase | " + " | ".join(next(iter(table.values()))) + " |\n|" + " --- |" * (1 + len(table["train_vae"])))
    for script, row in table.items():
        print(f"| {script}.py | " + " | ".join(map(str, row.values())) + " |")


def flags(script: str, outputs: Path, folder: Path) -> list[str]:
    """The command line of a phase; phase 3 reads what the reference left."""
    known = folder / "reference"
    vae = known / "phase1_vae/checkpoint_best.pt"
    reads = ["--flowdiff.vae-checkpoint", vae, "--flowdiff.latents", known / "phase2_latents"]
    words = [*SETTINGS, *LONGER, "--outputs", outputs, "--data.root", folder / "phantoms"]
    return [*map(str, words), *(map(str, reads) if script == "train_flowdiff" else ())]


def reference(processes, folder: Path) -> dict[str, float]:
    """The runs that nobody kills, once; how long each phase takes."""
    note = folder / "reference.json"
    if not note.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        size = {"height": 64, "width": 128, "workers": 1}
        phantom.write_dataset(folder / "phantoms", train=12, val=4, test_normal=1, test_per_lesion=0, **size)
        seconds = {}
        run(processes, "train_vae", ["--help"], folder / "reference.log")  # the first process waits for its parent
        for script in ("train_vae", "extract_latents", "train_flowdiff"):
            began = time.monotonic()
            code = run(processes, script, flags(script, folder / "reference", folder), folder / "reference.log")
            if code:
                raise UsageError(f"{script}.py ended with {code}, see {folder / 'reference.log'}")
            seconds[script] = time.monotonic() - began
        write_json(note, seconds)
    return json.loads(note.read_text())


def one_trial(processes, script: str, number: int, seconds: float, folder: Path) -> dict:
    """Run, kill, look, run again, compare; taken as it is where it was kept before."""
    kept = folder / "trials" / f"{script}-{number:04d}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    here, random = folder / f"trial-{script}", np.random.default_rng(stream_seed(0, "faults", script, number))
    words, log = flags(script, here, folder), folder / f"trial-{script}.log"
    code = None
    while code != -signal.SIGKILL:
        shutil.rmtree(here, ignore_errors=True)
        code = run(processes, script, words, log, kill_after=random.uniform(0.02, 1.0) * seconds)
    mine = here / PHASES[script]
    found = {"in_a_write": any(mine.glob(".*.tmp")), "whole": is_whole(mine, script)}
    found["resumed"] = run(processes, script, words, log) == 0
    found["went_on"] = "continuing from step" in log.read_text()
    found["leftovers"] = len(list(mine.rglob("*.tmp")))
    found["identical"] = found["resumed"] and same(mine, folder / "reference" / PHASES[script], script)
    write_json(kept, found)
    return found


def run(processes, script: str, words: list[str], log: Path, kill_after: float | None = None) -> int:
    """A phase in a process of its own: its exit code."""
    process = processes.Process(target=phase, args=(script, words, str(log)))
    process.start()
    process.join(kill_after)
    if kill_after is not None and process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode


def phase(script: str, words: list[str], log: str) -> None:
    """What that process does, on a slow disk."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    flush, random = os.fsync, np.random.default_rng()

    def slow(descriptor: int) -> None:
        time.sleep(random.uniform(0, SLOW_DISK))
        flush(descriptor)

    os.fsync = slow
    sys.argv = [f"{script}.py", *words]
    run_script(importlib.import_module(script).main)


def is_whole(folder: Path, script: str) -> bool:
    """Whether every file that carries its own name can be read."""
    try:
        for path in folder.glob("checkpoint_*.pt"):
            kinds = KINDS.get(path.name, KINDS["checkpoint_best.pt"])
            load_checkpoint(path, kinds[script == "train_flowdiff"], "")
        for path in folder.glob("*.png"):
            with Image.open(path) as image:
                image.load()
        if (folder / "config.json").is_file():
            json.loads((folder / "config.json").read_text())
        if (folder / "log.csv").is_file():
            read_log(folder)
    except (UsageError, OSError, ValueError):
        return False
    return True


def same(ours: Path, theirs: Path, script: str) -> bool:
    """Whether two runs ended alike, to the last bit."""
    for name, kinds in KINDS.items():
        kind = kinds[script == "train_flowdiff"]
        mine, other = (load_checkpoint(folder / name, kind, "") for folder in (ours, theirs))
        if not all(
            equal(mine.get(part), other.get(part)) for part in ("weights", "ema", "optimizer", "scores", "step")
        ):
            return False
    logs = ({name: rows for name, rows in read_log(run).items() if name.startswith("val/")} for run in (ours, theirs))
    pictures = [path for path in ours.glob("*.png") if path.name != "curves.png"]  # drawn from the log
    return equal(*logs) and all(sha256(path) == sha256(theirs / path.name) for path in pictures)


def equal(mine: object, other: object) -> bool:
    """Of nested plain values and tensors."""
    if isinstance(mine, torch.Tensor):
        return torch.equal(mine, other)
    if isinstance(mine, dict):
        return mine.keys() == other.keys() and all(equal(mine[name], other[name]) for name in mine)
    if isinstance(mine, (list, tuple)):
        return len(mine) == len(other) and all(map(equal, mine, other))
    return mine == other


def summary(found: list[dict]) -> dict[str, str | int]:
    """The counts of the table."""
    counted = {name: sum(trial[name] for trial in found) for name in found[0]}
    every = len(found)
    return {
        "killed": every,
        "in a write": counted["in_a_write"],
        "resumed": f"{counted['resumed']}/{every}",
        "went on": counted["went_on"],
        "identical": f"{counted['identical']}/{every}",
        "whole": f"{counted['whole']}/{every}",
        "leftovers": counted["leftovers"],
    }


if __name__ == "__main__":
    run_script(main)
