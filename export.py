"""A trained normalizer as one folder, which can be passed on or uploaded to a model hub as it is.

Reads   the checkpoints of phases 1 and 3 and what phase 4 left in outputs/calibration/; metrics.json of phase 4 where
        it belongs to them

Writes  --out DIR: vae, network, calibration and reader as .safetensors, normalizer.json, README.md (a model card),
        example.png (a phantom), contents.json with the hash of every file

Beside the flags of config.py, which are phase 4's:

--out DIR           the folder; one that holds something else is left alone, an earlier export stays whole until the new
                    one is (in .DIR.exporting, beside it), and a README.md that you edited since is kept
--members True      also who trained, as salted hashes, so that they are refused as in phase 4; for use at home
--license NAME      the hub's name of the licence that the card shall say (other)

Look for: example.png, and what README.md says of data and limits: it is yours to complete.
"""

if __name__ == "__main__":
    import interruption

    interruption.begin()  # first: a signal may come during the imports below, too


import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch

from calibration import Calibration
from checks import UsageError
from command_line import parse_command
from config import Config
from examination import fitting_calibration, kept_reader, open_normalizer
from exported import CONTENTS, load, read_contents, seal, write_weights
from files import sha256, write_atomically
from normalizer import Normalizer
from phantoms.phantom import draw_phantom
from radiographs.geometry import fit_detail, fit_mask
from reporting.card import CardFacts, model_card
from reporting.figures import ColourScale, save_result
from reporting.summary import metrics_table
from runtime import run_script
from showing import panels_of
from survey import magnification_of

CARD, PICTURE = "README.md", "example.png"


def main() -> None:
    """The folder, from the command line."""
    own, rest = own_flags(sys.argv[1:])
    command = parse_command(__doc__, rest)
    folder = folder_to_write(own.out)
    model, config = open_normalizer(command)
    calibration = kept_calibration(model, config)
    metrics = metrics_of(calibration, config)

    staged = new_beside(folder)
    try:
        write_weights(staged, model, calibration, config, own.members == "True")
        draw_example(staged / PICTURE, model, calibration, config)
        edited = edited_card(folder)
        if edited is None:
            card = model_card(facts_of(folder, own, model, calibration, config, metrics)).encode()
        else:
            print(f"{folder / CARD} was edited and is kept; remove it to have one written anew")
            card = edited
        write_atomically(staged / CARD, lambda beside: beside.write_bytes(card))
        seal(staged, frozenset() if edited is None else frozenset({CARD}))
        load(staged)  # what cannot be read back is told here and not where it was sent
        put_in_place(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)

    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    print(f"wrote {folder}: {size:.1f} MiB, method {calibration.method}; read {folder / CARD} before you pass it on")


def own_flags(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this script alone, and the words that are left; UsageError for one that is wrong or missing."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--members", choices=["True", "False"], default="False")
    parser.add_argument("--license", default="other")
    try:
        own, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error.argument_name}: {error.message}") from error
    if not {"--help", "-h"} & set(rest) and own.out is None:
        raise UsageError("nowhere to write: add --out DIR, the folder that shall hold the normalizer")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", own.license):
        raise UsageError(f"--license takes the hub's name of a licence, such as mit or cc-by-nc-4.0, got {own.license}")
    return own, rest


def folder_to_write(folder: Path) -> Path:
    """A new folder, an empty one, or one of an earlier export, whole; UsageError for any other. Writes nothing new."""
    try:
        f"{folder}{folder.resolve()}".encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"--out {ascii(str(folder))} is not UTF-8: choose a name that is") from error
    before = beside(folder, "before")
    if (before / CONTENTS).is_file() and not folder.exists():
        os.rename(before, folder.resolve())  # an earlier export was killed between two names
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose another --out")
    if os.path.ismount(folder):
        raise UsageError(f"{folder} is a disk of its own, which cannot be replaced as a whole: name a folder inside it")
    refuse_strangers(folder)
    return folder


def refuse_strangers(folder: Path) -> None:
    """UsageError if there is a file that no export wrote: the folder is replaced as a whole."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / CONTENTS).is_file():
        raise UsageError(f"{folder} holds something else: choose another --out, or empty it")
    try:
        written = {*read_contents(folder), CONTENTS, CARD}
    except UsageError as error:
        reason = f"its {CONTENTS} is damaged or of another version, so that nobody knows which files an export wrote"
        raise UsageError(f"{folder}: {reason}: choose another --out, or empty it") from error
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in written or not path.is_file())
    if strangers:
        raise UsageError(
            f"{folder} holds what no export wrote ({ascii(strangers[0])}, {len(strangers)} in all): move it away, or "
            "choose another --out"
        )


def edited_card(folder: Path) -> bytes | None:
    """The card of an earlier export if its owner changed it since; contents.json then names none or another."""
    path = folder / CARD
    if not path.is_file() or sha256(path) == read_contents(folder).get(CARD):
        return None
    return path.read_bytes()


def beside(folder: Path, what: str) -> Path:
    """A hidden neighbour of a folder, which may not exist, such as .normalizer.exporting."""
    place = folder.resolve()
    return place.with_name(f".{place.name}.{what}")


def new_beside(folder: Path) -> Path:
    """The empty folder in which the new export is made; what a killed one left there is removed."""
    staged, before = beside(folder, "exporting"), beside(folder, "before")
    leftovers = [staged] if staged.exists() else []
    if (before / CONTENTS).is_file():
        leftovers.append(before)
    for leftover in leftovers:
        shutil.rmtree(leftover)
    staged.mkdir(parents=True)
    if folder.is_dir():
        shutil.copymode(folder, staged)
    return staged


def put_in_place(staged: Path, folder: Path) -> None:
    """The new folder under the name of the old one, which is removed last, or has its name again if this fails."""
    refuse_strangers(folder)  # somebody may have put something there meanwhile
    place, before = folder.resolve(), beside(folder, "before")
    try:
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
        if place.is_dir():
            os.rename(place, before)
        os.rename(staged, place)
    except BaseException:
        if (before / CONTENTS).is_file() and not place.exists():
            os.rename(before, place)
        raise
    if (before / CONTENTS).is_file():
        shutil.rmtree(before)


def kept_calibration(model: Normalizer, config: Config) -> Calibration:
    """What phase 4 left for these checkpoints and settings; UsageError if there is none."""
    method, folder = config.inference.method, config.inference.calibration
    reader = kept_reader(model, config) if method == "reader" else None
    return fitting_calibration(
        model,
        config,
        reader,
        f"{folder} has no calibration of method {method} for these checkpoints and settings: run python inference.py "
        "with the same flags first",
    )


def metrics_of(calibration: Calibration, config: Config) -> dict | None:
    """What phase 4 measured, if it did so with this calibration; otherwise a line says why the card has no figures."""
    path = Path(config.inference.output) / "metrics.json"
    try:
        if not path.is_file():
            print(f"{path} is missing: the card goes without figures")
            return None
        metrics = json.loads(path.read_text(encoding="utf-8"))
        same = metrics["validation_normals"] == calibration.validation_normals()
        metrics_table(metrics)  # whether the card can show them
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        again = "python inference.py --runtime.resume False writes it anew"
        print(f"{path} is damaged ({type(error).__name__}): the card goes without figures; {again}")
        return None
    if not same:
        again = "python inference.py --runtime.resume False measures with these"
        print(f"{path} is of other checkpoints, settings or version: the card goes without figures; {again}")
    return metrics if same else None


def draw_example(path: Path, model: Normalizer, calibration: Calibration, config: Config) -> None:
    """A phantom with a cyst, as phase 4 draws it: a picture that shows nobody."""
    data, times = config.data, magnification_of(config)
    phantom = draw_phantom(0, 0, "cyst", 512, 1024)
    image = fit_detail(2 * phantom.image - 1, data.height, data.width, data.fit, times)
    mask = fit_mask(phantom.mask, data.height, data.width, data.fit, times)
    seen = model.examine(torch.from_numpy(image)[None, None], times)
    maps = calibration.anomaly_map(seen, config)
    title = f"a phantom with a cyst  |  method {calibration.method}"
    panels = panels_of(seen, 0, maps[0, 0].cpu().numpy())
    save_result(path, *panels, title, ColourScale(**calibration.scale), mask)


def facts_of(
    folder: Path,
    own: argparse.Namespace,
    model: Normalizer,
    calibration: Calibration,
    config: Config,
    metrics: dict | None,
) -> CardFacts:
    """What the card says."""
    prints = set().union(*(members.prints for members in model.members))
    return CardFacts(
        name=folder.resolve().name,
        licence=own.license,
        method=calibration.method,
        size=(config.data.height, config.data.width),
        fit=config.data.fit,
        radiographs=len(prints) or None,
        normals=len(calibration.scores),
        file_sizes=calibration.file_sizes,
        image_fpr=config.inference.image_fpr,
        threshold=calibration.score_threshold(config.inference.image_fpr),
        identity_error=calibration.identity_error,
        vae_error=calibration.vae_error,
        backbone=calibration.reader is not None and calibration.reader.settings.backbone != "none",
        members=own.members == "True",
        metrics=metrics,
        identity=model.identity,
    )


if __name__ == "__main__":
    run_script(main)
