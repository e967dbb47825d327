"""What each part of the reader brings: python benchmarks/ablation.py --preset cpu --rows all

    --rows A,B            which to run; without it, none: only the tables are printed. `all`, `parts`, `levels`
                          and `fills` are groups
    --as NAME             one row under another name: of other networks (--outputs), or with flags that differ; give
                          it a --inference.calibration of its own
    --on test|rehearsal   what rows are judged on: the labelled test split, or validation normals with one thing in each
                          that does not belong (rehearsal.py). Settings are chosen on the second, never on the first
    --results FOLDER      where each finished row is kept as JSON, and the tables of all rows as table.md: a row of
                          several seeds (--runtime.seed, networks and calibration of each) as mean and spread
    FLAGS                 those of inference.py; checkpoints of phases 1 to 3 are those it would take, and what rows
                          share lies in --inference.calibration

A row of detection.py trains a whole reader; here rows share what they have in common. Features of normals, of their
corrupted copies and of all images that are judged are made once, the backbone is tuned once, and a row that leaves a
part out trains the reader's networks alone, on the others. A row that leaves fills out makes corruptions, features and
tuning of its own. Beside those of phase 4, reader.features knows `walk`: z, and what the whole walk of G changed of it.
Each row is judged twice: what the networks that read G say, and their mean with the tuned backbone, which sees the
image alone (--reader.tuned-steps 0 does without). Scores are of these maps, they hear nothing beside. What is finished
is kept, and a training that was killed goes on; what rows share takes gigabytes and stays until it is removed. Nothing
is chosen by a label of the test split.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import interruption

    interruption.begin()  # first: a signal may come during the imports below, too

import argparse
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ablation_ground import GROUNDS, Channel, Ground, Kept, logits_of
from detection import cell, commit, file_name, hardware, names_in, place, read_part, refuse_unlike, rows_in, table_of
from seeds import spread

from checks import UsageError
from command_line import parse_command
from config import Config
from config_reading import ReaderConfig
from examination import open_normalizer
from files import write_atomically, write_json
from holding import hold
from interruption import remember
from reader import Reader
from reader_training import fit_network
from runtime import run_script

ROOT = Path(__file__).resolve().parents[1]
NETWORKS, BOTH = "networks", "with the tuned backbone"  # the two ways a row is judged
TUNED = "the tuned backbone alone"
NAMES = re.compile(r"[^./|\\\x00-\x1f][^/|\\\x00-\x1f]{0,99}")  # that --as may give


# ---------------------------------------------------------------- what is left out


def without(*left_out: str) -> Callable[[Channel], bool]:
    """Keeps what is not one of these features or parts of one."""
    return lambda channel: not set(channel) & set(left_out)


@dataclass(frozen=True)
class Row:
    """Which channels the networks read, and the settings that differ."""

    keep: Callable[[Channel], bool] = without()
    settings: tuple[tuple[str, object], ...] = ()


def fewer_fills(*left_out: str) -> Row:
    """Learns from corruptions without these fills."""
    return Row(settings=(("fills", tuple(name for name in ReaderConfig().fills if name not in left_out)),))


PARTS = {
    "everything": Row(),
    "without the image": Row(without("image")),
    "without x - dec(enc(x))": Row(without("residual")),
    "without z": Row(without("z")),
    "without what G changed": Row(without("changed")),
    "without the heads' disagreement": Row(without("heads")),
    "without inner features of G": Row(without("trunk")),
    "without G": Row(without("changed", "heads", "trunk")),
    "without G and its autoencoder": Row(without("latent", "trunk", "residual")),
    "the frozen backbone alone": Row(lambda channel: channel[0] == "backbone"),
    "without the frozen backbone": Row(without("backbone")),
    "without the other side": Row(settings=(("mirror", False),)),
    "near surroundings": Row(settings=(("distances", (1, 2)),)),
    TUNED: Row(lambda channel: False),
}
FILLS = {
    "without offset and shade": fewer_fills("offset", "shade"),
    "without level and saturate": fewer_fills("level", "saturate"),
    "without texture and noise": fewer_fills("texture", "noise"),
    "without paste and graft": fewer_fills("paste", "graft"),
    "without smear and warp and remove": fewer_fills("smear", "warp", "remove"),
    "without rim": fewer_fills("rim"),
}
USUAL = ReaderConfig().levels
LEVELS = {
    f"G at {level:g} alone": Row(without("trunk", *(f"@{other:g}" for other in USUAL if other != level)))
    for level in USUAL  # without inner features, which are of the lowest
}
ROWS = PARTS | LEVELS | FILLS
GROUPS = {"all": tuple(ROWS), "parts": tuple(PARTS), "levels": tuple(LEVELS), "fills": ("everything", *FILLS)}


# ---------------------------------------------------------------- the command


def main() -> None:
    options, flags = arguments()
    remember("rows that are finished are kept, the same command goes on with the others")
    if options.rows:
        run_rows(options, flags)
    ways = [f"**{way}**\n\n{table_of(options.results / file_name(way), tuple(ROWS))}" for way in (NETWORKS, BOTH)]
    tables = "\n\n".join([side_by_side(options.results), *ways])
    print(tables)
    if options.results.is_dir():
        write_atomically(options.results / "table.md", lambda beside: beside.write_text(tables + "\n"))


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """What was asked for, and the flags of phase 4."""
    names = "rows:\n  " + "\n  ".join((*ROWS, *GROUPS))
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=names, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--rows", type=names_in, default=[])
    parser.add_argument("--as", dest="name", default="")
    parser.add_argument("--on", choices=tuple(GROUNDS), default="test")
    parser.add_argument("--results", type=Path)
    options, flags = parser.parse_known_args()
    own = "ablation" if options.on == "test" else f"ablation-{options.on}"
    options.results = options.results or ROOT / "benchmarks/results" / own
    asked = [name for row in options.rows for name in GROUPS.get(row, (row,))]
    unknown = [row for row in asked if row not in ROWS]
    if unknown:
        raise UsageError(f"--rows: {unknown[0]} is unknown, choose from {', '.join((*ROWS, *GROUPS))}")
    options.rows = list(dict.fromkeys(asked))
    taken = options.name in ROWS or options.name in GROUPS
    if options.name and (len(options.rows) != 1 or taken or not NAMES.fullmatch(options.name)):
        raise UsageError(
            "--as renames one row: choose one with --rows, and a name of its own that can be a file's and a table's, "
            "of 100 characters at most"
        )
    return options, flags


def run_rows(options: argparse.Namespace, flags: list[str]) -> None:
    """Each row that is not kept yet."""
    model, config = open_normalizer(parse_command(__doc__, [*flags, "--inference.method", "reader"]))
    ground = GROUNDS[options.on](model, config)
    if set(options.rows) & set(LEVELS) and ground.config.reader.levels != USUAL:
        raise UsageError(f"rows of one noise level are of {USUAL}: leave reader.levels as it is")
    tuned = ground.config.reader.tuned_steps > 0
    for way in ways_of("everything", tuned):  # now: hours later would be late
        (options.results / file_name(way)).mkdir(parents=True, exist_ok=True)
    with hold(ground.folder, "ablation"):
        for row in options.rows:
            ways, asked = ways_of(row, tuned), ground.asked() | {"row": row}
            if not kept(options.name or row, ways, options.results, asked):
                refuse_other_seeds(options.name or row, ways, options.results, asked, ground.config.data.height)
                run_row(row, ground, asked, options)


def run_row(row: str, ground: Ground, asked: dict, options: argparse.Namespace) -> None:
    """Train it, judge it, keep what is found."""
    began, name, config = time.monotonic(), options.name or row, ground.config
    for way, judged in judged_both_ways(row, ground).items():
        part = {"row": name, "seed": config.runtime.seed, "size": config.data.height, "asked": asked}
        part |= {"settings": {"way": way}, "commit": commit(), "hardware": hardware()}
        part |= {"normals": len(ground.training.images)}  # reader.normals is a bound
        part |= {"minutes": round((time.monotonic() - began) / 60, 1)}
        path = part_file(name, way, options.results, config.runtime.seed)
        write_json(path, part | judged)
        mean = judged["mean_over_kinds"]
        print(f"{name}, {way}: image AUROC {mean['auroc']:.3f}, pixel AP {mean['pixel_ap']:.3f}, kept in {path}")


def side_by_side(results: Path) -> str:
    """Means over the kinds of each row that is kept, both ways, as Markdown."""
    ways = {way: rows_in(results / file_name(way)) for way in (NETWORKS, BOTH)}
    titles = ["row", "size", *(title for way in ways for title in ("seeds", way, "AUPRO"))]
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for row in sorted(ways[NETWORKS] | ways[BOTH], key=lambda row: (place(row[0], tuple(ROWS)), row[1])):
        cells = [text for rows in ways.values() for text in cells_of(rows.get(row, []))]
        lines.append("| " + " | ".join([row[0], str(row[1]), *cells]) + " |")
    return "**means over the kinds, image AUROC / pixel AP**\n\n" + "\n".join(lines)


def cells_of(parts: list[dict]) -> tuple[str, str, str]:
    """Which seeds, their image AUROC and pixel AP, their AUPRO; of a row that was not judged this way, nothing."""
    means = [part["mean_over_kinds"] for part in parts]
    if not means:
        return "-", "-", "-"
    return ", ".join(str(part["seed"]) for part in parts), cell(means), spread([mean["aupro"] for mean in means], 2)


def ways_of(row: str, tuned: bool) -> tuple[str, ...]:
    """How a row is judged; UsageError for the tuned backbone alone where none is tuned."""
    if row == TUNED and not tuned:
        raise UsageError(f"{TUNED}: there is none, as reader.tuned_steps is 0 or no backbone is installed")
    return (BOTH,) if row == TUNED else (NETWORKS, BOTH) if tuned else (NETWORKS,)


def refuse_other_seeds(row: str, ways: tuple[str, ...], results: Path, asked: dict, size: int) -> None:
    """UsageError now, and not hours later, if this row could not be averaged with what is kept of it."""
    mine = {"row": row, "size": size, "seed": asked["seed"], "asked": asked}
    for way in ways:
        if not part_file(row, way, results, asked["seed"]).is_file():
            refuse_unlike([*rows_in(results / file_name(way)).get((row, size), []), mine])


def kept(row: str, ways: tuple[str, ...], results: Path, asked: dict) -> bool:
    """Whether a row is there already, these ways; UsageError if it is of something else."""
    paths = [part_file(row, way, results, asked["seed"]) for way in ways]
    there = [path for path in paths if path.is_file()]
    for path in there:
        part = read_part(path)
        if (part["row"], part["asked"]) != (row, asked):
            raise UsageError(
                f"{path.name} is of another row, or of other radiographs, networks, flags, seed or code: remove it, or "
                "choose another --results"
            )
    if len(there) < len(paths):
        return False
    print(f"{row}: there already")
    return True


def part_file(row: str, way: str, results: Path, seed: int) -> Path:
    """Where a row of this seed is kept."""
    return results / file_name(way) / f"{file_name(row)}-seed{seed}.json"


# ---------------------------------------------------------------- a row


def judged_both_ways(row: str, ground: Ground) -> dict[str, dict]:
    """What is found by the networks of a row, and of their mean with the tuned backbone."""
    config = replace(ground.config, reader=replace(ground.config.reader, **dict(ROWS[row].settings)))
    chosen = [[i for i, channel in enumerate(part) if ROWS[row].keep(channel)] for part in ground.channels]
    if row == TUNED:
        return {BOTH: ground.judged(ground.tuned_logits(config.reader.fills), config)}
    if not any(chosen):
        raise UsageError(f"{row}: nothing is left to read, as no backbone is installed or reader.features lacks it")
    said = said_by_networks(row, chosen, ground, config)
    found = {NETWORKS: ground.judged(said, config)}
    if config.reader.tuned_steps:
        share = config.reader.tuned_share
        mean = (1 - share) * said.astype(np.float32) + share * ground.tuned_logits(config.reader.fills)
        found[BOTH] = ground.judged(mean.astype(np.float16), config)
    return found


def said_by_networks(row: str, chosen: list[list[int]], ground: Ground, config: Config) -> np.ndarray:
    """Networks are trained on these channels and asked of everybody: logits, float16 (N, k H, k W)."""
    pool = ground.pool(config)
    pool = replace(pool, features=selected(pool.features, chosen))
    statistics = pool.statistics(config)
    identity = ground.identity(config) | {"row": row}
    last = ground.folder / "networks_last.pt"
    network = fit_network(pool, statistics, config, identity, last, ground.model.device)
    on_device = [part.to(ground.model.device) for part in statistics]
    reader = Reader(network, on_device, Kept(config.reader), {})
    said = logits_of(reader, ground.model, ground.everybody, selected(ground.features, chosen), config)
    last.unlink(missing_ok=True)  # not before: who is stopped while features are made has learnt already
    return said


def selected(maps: list[np.ndarray], chosen: list[list[int]]) -> list[np.ndarray]:
    """These channels of each map, without maps of which none is chosen; a copy only where some are left out."""
    return [
        array if len(channels) == array.shape[1] else array[:, channels]
        for array, channels in zip(maps, chosen, strict=True)
        if channels
    ]


if __name__ == "__main__":
    run_script(main)
