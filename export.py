"""A trained normalizer as one folder, which can be passed on or uploaded to a model hub as it is.

Reads   the checkpoints of phases 1 and 3 and what phase 4 left in outputs/calibration/; metrics.json of phase 4 where
        it belongs to them

Writes  --out DIR: vae, network, calibration and reader as .safetensors, normalizer.json, README.md (a model card),
        example.png (a phantom), contents.json with the hash of every file

Beside the flags of config.py, which are phase 4's:

--out DIR           the folder; one that holds something else is left alone
--members True      also who trained, as salted hashes, so that they are refused as in phase 4; for use at home
--license NAME      the hub's name of the licence that the card shall say (other)

Look for: example.png, and what README.md says of data and limits: it is yours to complete.
"""

if __name__ == "__main__":
    import interruption

    interruption.begin()  # first: a signal may come during the imports below, too


import argparse
import json
import re
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from calibration import Calibration, shaping
from checks import UsageError
from command_line import parse_command
from config import Config
from examination import kept_reader, open_normalizer
from exported import CONTENTS, load, seal, write_weights
from files import write_atomically
from image_ops import residual_components
from normalizer import Normalizer
from phantoms.phantom import draw_phantom
from radiographs.geometry import fit_detail, fit_mask
from reporting.card import CardFacts, model_card
from reporting.figures import ColourScale, save_result
from runtime import run_script
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

    (folder / CONTENTS).unlink(missing_ok=True)  # removed first, written last: a folder without it is not whole
    write_weights(folder, model, calibration, config, own.members == "True")
    draw_example(folder / PICTURE, model, calibration, config)
    card = model_card(facts_of(folder, own, model, calibration, config, metrics))
    write_atomically(folder / CARD, lambda beside: beside.write_text(card, encoding="utf-8"))
    seal(folder)

    load(folder)  # what cannot be read back is told here and not where it was sent
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
    """A new folder, an empty one, or one of an earlier export; UsageError for any other."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose another --out")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONTENTS).is_file():
        raise UsageError(f"{folder} holds something else: choose another --out, or empty it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kept_calibration(model: Normalizer, config: Config) -> Calibration:
    """What phase 4 left for these checkpoints and settings; UsageError if there is none."""
    method, folder = config.inference.method, config.inference.calibration
    missing = UsageError(
        f"{folder} has no calibration of method {method} for these checkpoints and settings: run python inference.py "
        "with the same flags first"
    )
    reader = kept_reader(model, config) if method == "reader" else None
    if method == "reader" and reader is None:
        raise missing
    known = Calibration.load(folder, method, reader)
    if known is None or known.belongs_to != shaping(model, config, reader):
        raise missing
    return known


def metrics_of(calibration: Calibration, config: Config) -> dict | None:
    """What phase 4 measured, if it did so with this calibration."""
    path = Path(config.inference.output) / "metrics.json"
    if not path.is_file():
        return None
    metrics = json.loads(path.read_text(encoding="utf-8"))
    errors = {"identity_error": calibration.identity_error, "vae_error": calibration.vae_error}
    if metrics.get("validation_normals") != {"images": len(calibration.scores), **errors}:
        print(f"{path} is of other checkpoints or settings: the card goes without figures")
        return None
    written = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))["inference"]["method"]
    return metrics if written == calibration.method else None


def draw_example(path: Path, model: Normalizer, calibration: Calibration, config: Config) -> None:
    """A phantom with a cyst, as phase 4 draws it: a picture that shows nobody."""
    data, times = config.data, magnification_of(config)
    phantom = draw_phantom(0, 0, "cyst", 512, 1024)
    image = fit_detail(2 * phantom.image - 1, data.height, data.width, data.fit, times)
    mask = fit_mask(phantom.mask, data.height, data.width, data.fit, times)
    seen = model.examine(torch.from_numpy(image)[None, None], times)
    maps = calibration.anomaly_map(seen, config)
    l1, gradient, _ = residual_components(seen.x, seen.normal)
    larger = [F.interpolate(panel, size=maps.shape[-2:]) for panel in (seen.normal, l1, gradient)]
    panels = (panel[0, 0].cpu().numpy() for panel in (seen.detail, *larger, maps))
    title = f"a phantom with a cyst  |  method {calibration.method}"
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
