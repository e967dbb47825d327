"""Every method on the same radiographs, judged alike: python benchmarks/detection.py --data DATA --rows reader

    --data FOLDER         radiographs with a manifest.csv: training and validation normals, a labelled test split
    --rows A,B            which to run; without it, none: only the table is printed
    --seeds 0,1           one run each
    --size 256            pixels of G's side, and of the peers' images
    --networks FOLDER     --outputs of phases 1 to 3 that are trained already; without it, they are run
    --outputs FOLDER      where networks and maps go; what is there already is taken up, so that a killed run goes on
    --results FOLDER      where each finished part is kept as JSON, and the table of all parts as table.md
    FLAGS                 anything else goes to the four phases, such as --preset cpu --vae.pretrained MODELS/taesd

Rows of this repository run the four phases with the flags in OURS: phases 1 to 3 once for each seed and size, phase 4
for each row. Rows of others are files in peers/. A part says its seed, size, settings, commit, hardware and time.
Nothing is chosen by a label of the test split.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import interruption

    interruption.begin()  # first: a signal may come during the imports below, too

import argparse
import csv
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peers.training import numbers_of
from protocol import Verdicts, examine, judge, splits_of
from seeds import spread

from checks import UsageError
from command_line import parse_command
from config import Config
from config_reading import ReaderConfig
from files import sha256, write_atomically, write_json
from interruption import remember
from radiographs.manifest import list_records, split_records
from reader_training import RECIPE
from runtime import reading_precision, run_script, runs_on_cpu

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("train_vae.py", "extract_latents.py", "train_flowdiff.py")


def without(field: str, *left_out: str) -> tuple[str, ...]:
    """The flags of a reader whose list `field` lacks these."""
    return (f"--reader.{field}", *(name for name in getattr(ReaderConfig(), field) if name not in left_out))


DEAF = ("--reader.plain-weight", "0", "--reader.residual-weight", "0")  # a score that hears the reader's map alone
# flags of phase 4 for each row
OURS: dict[str, tuple[str, ...]] = {
    "reader": ("--inference.method", "reader"),
    "plain": ("--inference.method", "plain"),
    "statistical": ("--inference.method", "statistical"),
    # |x - dec(enc(x))|: G that goes nowhere, the formula's first term alone
    "autoencoder": (
        *("--inference.method", "plain", "--inference.beta-grad", "0", "--inference.gamma-hf", "0"),
        *("--inference.noise-level", "0.001", "--inference.solver", "one_step", "--inference.draws", "1"),
    ),
    # what the reader reads
    "reader: backbone alone": ("--reader.features", "backbone", "--reader.tuned-steps", "0", *DEAF),
    "reader: without G": (*without("features", "latent", "trunk", "residual"), *DEAF),
    "reader: without tuning": ("--reader.tuned-steps", "0"),
    "reader: the tuned backbone alone": ("--reader.tuned-share", "1", *DEAF),
    "reader: without the backbone": (*without("features", "backbone"), "--reader.backbone", "none"),
    "reader: without the image": without("features", "image"),
    "reader: without inner features of G": without("features", "trunk"),
    "reader: its map alone": DEAF,
    # how it reads
    "reader: three networks": ("--reader.members", "3"),
    "reader: near surroundings": ("--reader.distances", "1", "2"),
    "reader: one side": ("--reader.mirror", "False"),
    "reader: at the size of G": ("--reader.magnification", "1"),
    # what it learns from
    "reader: without offset and shade": without("fills", "offset", "shade"),
    "reader: without level and saturate": without("fills", "level", "saturate"),
    "reader: without texture and noise": without("fills", "texture", "noise"),
    "reader: without paste and graft": without("fills", "paste", "graft"),
    "reader: without smear and warp and remove": without("fills", "smear", "warp", "remove"),
    "reader: without rim": without("fills", "rim"),
}
# what a part says of itself, and a flag would belie
OWN_FLAGS = (
    *("--data.root", "--data.test", "--data.height", "--data.width", "--data.max-bad-share", "--runtime.seed"),
    *("--outputs", "--inference.method", "--inference.output", "--inference.calibration"),
    *("--inference.vae-checkpoint", "--inference.flow-checkpoint", "--inference.shard"),
    *("--vae.output", "--latent.output", "--latent.vae-checkpoint"),
    *("--flowdiff.output", "--flowdiff.latents", "--flowdiff.vae-checkpoint"),
)
PEERS = {  # module in peers/ and its class; those of the first line need no training
    **{"nearest": "Nearest", "patchcore": "Patchcore", "padim": "Padim"},
    **{"draem": "Draem", "denoising": "Denoising", "anoddpm": "Anoddpm", "latent_repair": "LatentRepair"},
}


def main() -> None:
    options, flags = arguments()
    remember("parts that are finished are kept, the same command goes on with the others")
    for seed in options.seeds:
        for row in options.rows:
            run_part(row, seed, options, flags)
    table = table_of(options.results)
    print(table)
    write_atomically(options.results / "table.md", lambda beside: beside.write_text(table + "\n"))


def names_in(text: str) -> list[str]:
    """What commas part."""
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers_in(text: str) -> list[int]:
    """The same, as numbers."""
    try:
        found = [int(name) for name in names_in(text)]
    except ValueError:
        found = []
    if not found:
        raise argparse.ArgumentTypeError(f"needs numbers parted by commas, such as 0,1,2, got {text!r}")
    return found


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """What was asked for, and the flags of the four phases."""
    names = "rows:\n  " + "\n  ".join((*OURS, *PEERS))
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=names, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=names_in, default=[])
    parser.add_argument("--seeds", type=numbers_in, default=[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--networks", type=Path)
    parser.add_argument("--outputs", type=Path, default=Path("outputs/detection"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/detection")
    options, flags = parser.parse_known_args()
    unknown = [row for row in options.rows if row not in (*OURS, *PEERS)]
    if unknown:
        raise UsageError(f"--rows: {unknown[0]} is unknown, choose from {', '.join((*OURS, *PEERS))}")
    belied = [flag for flag in flags if flag.split("=")[0].replace("_", "-") in OWN_FLAGS]
    if belied:
        raise UsageError(f"{belied[0]} is this command's to give: use --data, --size, --seeds, --outputs or --rows")
    if options.networks and len(options.seeds) > 1:
        raise UsageError(
            "--networks holds one training, and the spread over seeds is that of trainings: give one seed, or leave "
            "--networks out"
        )
    if options.rows and options.data is None:
        raise UsageError("--data is missing: the folder of the radiographs and their manifest.csv")
    return options, flags


def part_file(row: str, seed: int, options: argparse.Namespace) -> Path:
    """Where a part is kept."""
    return options.results / f"{file_name(row)}-{options.size}-seed{seed}.json"


def file_name(row: str) -> str:
    """A row's name as part of a path."""
    return row.replace(":", "").replace(" ", "_")


def run_part(row: str, seed: int, options: argparse.Namespace, flags: list[str]) -> None:
    """One method under one seed: run, judged, and kept; taken as it is where it was kept before."""
    path, asked = part_file(row, seed, options), asked_for(row, options, flags)
    if path.is_file():
        kept, asked = in_order(read_part(path)["asked"]), in_order(asked)
        other = [name for name in sorted({*kept, *asked}) if kept.get(name) != asked.get(name)]
        if other:
            raise UsageError(
                f"{path.name} is of other radiographs, networks, flags or code ({', '.join(other)}): remove it, or "
                "choose another --results"
            )
        print(f"{row}, seed {seed}: there already ({path.name}; remove it to run it again)")
        return
    options.results.mkdir(parents=True, exist_ok=True)  # now: hours later would be late to hear that it cannot be
    began = time.monotonic()
    whole = ["--data.root", str(options.data), "--runtime.seed", str(seed), *size_flags(options.size), *flags]
    whole += ["--data.max-bad-share", "0"]  # a comparison leaves nothing out
    folder = options.outputs / f"size{options.size}-seed{seed}"
    if row in OURS:
        verdicts, settings = run_ours(row, whole, folder, options.networks)
    else:
        verdicts, settings = run_peer(row, seed, [*whole, "--inference.calibration", str(folder / row)])
    judged = judge(verdicts)
    part = {"row": row, "seed": seed, "size": options.size, "asked": asked, "settings": settings, "commit": commit()}
    part |= {"minutes": round((time.monotonic() - began) / 60, 1), "hardware": hardware()}
    write_json(path, part | judged)
    if row in PEERS:
        shutil.rmtree(folder / row, ignore_errors=True)  # what an interrupted training would have gone on from
    mean = judged["mean_over_kinds"]
    auroc, pixel_ap = (spread([mean[name]]) for name in ("auroc", "pixel_ap"))
    print(f"{row}, seed {seed}: image AUROC {auroc}, pixel AP {pixel_ap}, kept in {path}")


def asked_for(row: str, options: argparse.Namespace, flags: list[str]) -> dict:
    """What makes two parts comparable: radiographs by their manifest, flags with paths by their last name, networks."""
    named = [Path(word).name if "/" in word else word for word in flags]
    asked = {"manifest_sha256": manifest_sha256(options.data), "flags": named}
    if row.startswith("reader"):
        asked["reader_recipe"] = RECIPE  # what no flag says: how today's code makes a reader
    if row in PEERS:
        asked["peer"] = numbers_of(importlib.import_module(f"peers.{row}"))
    if row in OURS and options.networks:
        trained = options.networks / "phase3_flowdiff/checkpoint_best.pt"
        if not trained.is_file():
            raise UsageError(f"--networks: {trained} is missing; it is the --outputs of phases 1 to 3")
        asked["flow_sha256"] = sha256(trained)
    if row in OURS:
        config = parse_command(__doc__, [*flags, *OURS[row]]).config
        device = torch.device("cpu" if runs_on_cpu(config.runtime) else "cuda")
        precision = reading_precision(config.inference, device)
        asked |= {"reads_in": precision} if precision != "float32" else {}  # a preset may say it, and the hardware
    return asked


def in_order(asked: dict) -> dict:
    """The same, whatever the order of its flags, each with its values."""
    flags: list[list[str]] = []
    for word in asked.get("flags", []):
        flags.append([word]) if word.startswith("--") or not flags else flags[-1].append(word)
    return asked | {"flags": sorted(flags)}


def manifest_sha256(data: Path) -> str:
    """Of the manifest that names the radiographs; UsageError where there is none."""
    manifest = data if data.is_file() else data / "manifest.csv"
    if not manifest.is_file():
        raise UsageError(f"{data.name} has no manifest.csv: a comparison needs splits and labels")
    return sha256(manifest)


def size_flags(size: int) -> list[str]:
    """The flags that make radiographs squares of this size."""
    return ["--data.height", str(size), "--data.width", str(size)]


def run_peer(row: str, seed: int, flags: list[str]) -> tuple[Verdicts, dict]:
    """A method from elsewhere."""
    config = parse_command(__doc__, flags).config
    peer = getattr(importlib.import_module(f"peers.{row}"), PEERS[row])(seed, config)
    return examine(peer, splits_of(config.data), config.data), {"peer": row}


def run_ours(row: str, flags: list[str], folder: Path, networks: Path | None) -> tuple[Verdicts, dict]:
    """The four phases as a user runs them; phases 1 to 3 go on where they were, or are done."""
    flags = [*flags, "--outputs", str(networks or folder)]
    for phase in () if networks else PHASES:
        call(phase, flags)
    here = folder / file_name(row)
    mine = ["--inference.output", str(here), "--inference.calibration", str(here / "calibration"), *OURS[row]]
    mine += ["--inference.save-maps", "True", "--inference.figures", "12", "--inference.report", "False"]
    call("inference.py", [*flags, *mine])
    config = parse_command(__doc__, [*flags, *mine]).config
    return verdicts_of(here, config), {"flags": [*OURS[row]]}


def call(script: str, flags: list[str]) -> None:
    """A phase in a process of its own, which a signal ends, too; UsageError if it fails."""
    with subprocess.Popen([sys.executable, str(ROOT / script), *flags]) as phase:
        try:
            code = phase.wait()
        except KeyboardInterrupt as signal:  # it finishes its step, and says how it goes on
            if str(signal) == "SIGTERM":  # a terminal tells both
                phase.terminate()
            raise
    if code:
        raise UsageError(f"{script} failed, see above: run the same command again when it is mended")


def verdicts_of(folder: Path, config: Config) -> Verdicts:
    """What phase 4 wrote: scores, and maps at the size of the files."""
    records = split_records(list_records(config.data.root, config.data.patient_from), config.data)["test"]
    calibration = Path(config.inference.calibration) / f"{config.inference.method}.json"
    verdicts = Verdicts(pixel_threshold=json.loads(calibration.read_text())["pixel_threshold"])
    with open(folder / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if len(rows) != len(records):
        raise UsageError(f"{len(records) - len(rows)} files could not be read: a comparison leaves nothing out")
    for row, record in zip(rows, records, strict=True):
        path = folder / "maps" / f"{row['index']}.npy"
        if not path.is_file():
            raise UsageError(f"{path} is missing: was another run writing there? Run the same command again")
        if record.label is not None:
            verdicts.add(record, float(row["score"]), np.load(path))
    return verdicts


# ---------------------------------------------------------------- what a part says beside its numbers


def commit() -> str:
    """The commit of this repository, with a plus where files other than results were changed since."""
    git = ("git", "-C", str(ROOT))
    changes = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    try:
        head, changed = (
            subprocess.run([*git, *asked], capture_output=True, text=True, check=True).stdout.strip()
            for asked in (("rev-parse", "--short=10", "HEAD"), changes)
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+" if changed else head


def hardware() -> str:
    """What it ran on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


# ---------------------------------------------------------------- the table


def table_of(folder: Path, order: tuple[str, ...] = (*OURS, *PEERS)) -> str:
    """All parts in a folder as Markdown: a line per row and size, in this order, the mean over its seeds."""
    groups = rows_in(folder)
    if not groups:
        return f"no part is kept in {folder} yet: choose rows with --rows"
    kinds = sorted({kind for group in groups.values() for part in group for kind in part["kinds"]})
    titles = ["row", "size", "seeds", *kinds, "mean of kinds", "AUPRO"]
    lines = ["image AUROC / pixel AP, mean over the seeds", "", "| " + " | ".join(titles) + " |"]
    lines.append("|" + " --- |" * len(titles))
    for (row, size), group in sorted(groups.items(), key=lambda item: (place(item[0][0], order), item[0][1])):
        cells = [cell([part["kinds"][kind] for part in group if kind in part["kinds"]]) for kind in kinds]
        means = [part["mean_over_kinds"] for part in group]
        aupro = spread([mean["aupro"] for mean in means], 2)
        seeds = ", ".join(str(part["seed"]) for part in group)
        lines.append("| " + " | ".join([row, str(size), seeds, *cells, cell(means), aupro]) + " |")
    return "\n".join(lines)


def rows_in(folder: Path) -> dict[tuple[str, int], list[dict]]:
    """What is kept in a folder, by row and size, seeds in their order; UsageError where it cannot be averaged."""
    parts = [read_part(path) for path in sorted(folder.glob("*.json"))]
    if len({part["asked"]["manifest_sha256"] for part in parts}) > 1:
        raise UsageError("the parts are of different radiographs: give each manifest a --results of its own")
    groups: dict[tuple[str, int], list[dict]] = {}
    for part in sorted(parts, key=lambda part: part["seed"]):
        groups.setdefault((part["row"], part["size"]), []).append(part)
    for seeds in groups.values():
        refuse_unlike(seeds)
    return groups


def place(row: str, order: tuple[str, ...]) -> int:
    """Where a row stands in the table; one that is run no longer stands last."""
    return order.index(row) if row in order else len(order)


def read_part(path: Path) -> dict:
    """What `run_part` kept; UsageError if it is damaged or something else."""
    try:
        part = json.loads(path.read_text())
        missing = {"row", "seed", "size", "asked", "kinds", "mean_over_kinds"} - set(part)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path.name} in --results is damaged: remove it") from error
    if missing:
        raise UsageError(f"{path.name} in --results is no part of a comparison: move it elsewhere")
    return part


OF_A_SEED = {"seed", "vae_sha256", "flow_sha256"}  # what differs between the seeds of one row


def refuse_unlike(seeds: list[dict]) -> None:
    """UsageError if these parts of one row are not one training each, asked for alike."""
    row, numbers = seeds[0]["row"], [part["seed"] for part in seeds]
    asked = [{name: it for name, it in in_order(part["asked"]).items() if name not in OF_A_SEED} for part in seeds]
    networks = [part["asked"]["flow_sha256"] for part in seeds if "flow_sha256" in part["asked"]]
    if any(other != asked[0] for other in asked):
        raise UsageError(f"the seeds of {row} were run with different flags: remove one, or run it again")
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"a seed of {row} is kept twice: remove one of its files")
    if len(set(networks)) < len(networks):
        raise UsageError(f"two seeds of {row} are of the same networks: train each seed's own (--outputs)")


def cell(entries: list[dict]) -> str:
    """Image AUROC and pixel AP."""
    both = [spread([entry[name] for entry in entries], 2) for name in ("auroc", "pixel_ap")]
    return both[0] if both[1] == "-" else " / ".join(both)


if __name__ == "__main__":
    run_script(main)
