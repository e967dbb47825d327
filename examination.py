"""Whom phase 4 examines, and the normals it compares them with: refused, read, or learnt from once and kept."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from backbone import REMEDY
from calibration import Calibration, calibrate, refuse_too_few, shaping
from checks import UsageError
from command_line import CommandLine
from config import Config
from dataset import Sample, read_batches, refuse_too_many_bad, report_skipped
from decoded import reading_told
from features import with_backbone
from holding import hold
from normalizer import Normalizer
from radiographs.manifest import Record, describe_patients, list_records, split_records
from reader import Reader, stored_reader
from reader_training import READER, RECIPE, reader_identity, train_reader
from runtime import reading_precision, start, without
from scratch import nameless_array
from survey import magnification_of


def open_normalizer(command: CommandLine, several: bool = False) -> tuple[Normalizer, Config]:
    """G as the command line names it, and the config with what its checkpoints say.

    UsageError under torchrun, unless the script is one for `several` processes.
    """
    settings, runtime = command.config.inference, command.config.runtime
    accelerator = start(runtime)
    if accelerator.num_processes > 1 and not several:
        raise UsageError("this script runs in one process: start it with python, not torchrun")
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, on a GPU too
    checkpoints = settings.vae_checkpoint, settings.flow_checkpoint
    settings = replace(settings, precision=reading_precision(settings, accelerator.device))
    model = Normalizer.load(*checkpoints, settings, runtime.seed, accelerator.device)
    config = command.adopt(model.artefact, settings.flow_checkpoint)
    return model, replace(config, inference=settings)  # auto is resolved: what is made says in what it was made


def records_to_examine(model: Normalizer, config: Config) -> list[Record]:
    """The files of data.test, or the test split of data.root.

    UsageError if there are none, or if patients trained or validated the networks.
    """
    if config.data.test:
        records = list_records(config.data.test, config.data.patient_from, "data.test")
    else:
        everyone = list_records(config.data.root, config.data.patient_from)
        records = split_records(everyone, config.data, trains=False)["test"]
    if not records:
        raise UsageError(
            f"{config.data.root} has no test split: name the radiographs to examine with --data.test, a folder or a "
            "manifest.csv"
        )
    print(f"to examine: {len(records)} radiographs of {describe_patients(records)}")
    known = [record for record in records if model.knows(patient_of(record, config), "")]
    if known and not config.inference.examine_training_patients:
        raise UsageError(
            f"{len(known)} of {len(records)} radiographs are of patients who trained or validated the networks: their "
            "scores would flatter, so leave them out, or say --inference.examine-training-patients True"
        )
    return records


def patient_of(record: Record, config: Config) -> str | None:
    """The patient, where a name means the same as in training: 001.png of another folder is somebody else."""
    named = record.patient_rule in ("header", "manifest")
    return record.patient if named or not config.data.test else None


def refuse_known_content(model: Normalizer, sample: Sample, index: int, config: Config) -> None:
    """UsageError if this very picture trained or validated the networks, whatever its name."""
    if not config.inference.examine_training_patients and model.knows(None, sample.digest):
        raise UsageError(
            f"radiograph {index:03d} of those to examine (counted from 0) trained or validated the networks, perhaps "
            "under another name: leave it out, or say --inference.examine-training-patients True"
        )


def remarks_on(sample: Sample, model: Normalizer, calibration: Calibration, config: Config) -> dict[str, bool]:
    """What a reader of a score must know of the file: too coarse for the calibration, or alike one that trained."""
    coarser = calibration.coarser(sample.original_shape, config)
    return {"coarser": coarser, "known": model.looks_known(sample.fingerprint)}


def calibration_of(model: Normalizer, config: Config) -> Calibration:
    """What normals say: read where it was made for these checkpoints and settings, made and saved otherwise."""
    folder, method, normals = Path(config.inference.calibration), config.inference.method, None
    reader = kept_reader(model, config) if method == "reader" else None
    if method == "reader" and reader is None:
        normals = read_normals(model, config, "val")  # to hear after the training that they are too few would be late
        refuse_too_few(len(set(normals.patients)), method)
        reader = new_reader(model, config)
    known = Calibration.load(folder, method, reader)
    if known is not None and known.belongs_to == shaping(model, config, reader):
        print(
            f"calibration read from {folder}: {known.normals_told}, whatever data.root holds now "
            "(remove the folder to renew it)"
        )
        return known.to(model.device)
    if known is not None:
        print(f"the calibration in {folder} belongs to other checkpoints or settings: made anew")
    with hold(folder, "calibration"):
        normals = normals or read_normals(model, config, "val")
        made = calibrate(model, normals.images, config, reader, normals.patients, normals.shapes)
        made = replace(made, file_sizes=normals.file_sizes)
        made.save(folder)
    return made


def ready_calibration(model: Normalizer, config: Config) -> Calibration:
    """What normals say, made for these checkpoints and settings before; UsageError, with the command, if it was not."""
    folder, method = Path(config.inference.calibration), config.inference.method
    reader, path = None, folder / READER
    if method == "reader" and path.is_file():
        stored = stored_reader(path)
        reader = rebuilt(stored, model, config) if is_reader_of(stored, model, config) else None
    return fitting_calibration(
        model,
        config,
        reader,
        f"{folder} has no calibration of these checkpoints and settings, and all shards share one: run python "
        "inference.py with the same flags and --inference.shard calibrate first",
    )


def fitting_calibration(model: Normalizer, config: Config, reader: Reader | None, missing: str) -> Calibration:
    """What phase 4 left that fits these checkpoints and settings, on the model's device.

    UsageError with the words of `missing` if there is none, and with others if nothing but inference.precision differs,
    which auto leaves to each machine.
    """
    method, folder = config.inference.method, Path(config.inference.calibration)
    known = Calibration.load(folder, method, reader) if method != "reader" or reader else None
    if known is None:
        raise UsageError(missing)
    found, wanted = known.belongs_to, shaping(model, config, reader)
    if found == wanted:
        return known.to(model.device)
    if without(found, "precision") == without(wanted, "precision"):
        made, now = (each.get("precision", "float32") for each in (found, wanted))
        raise UsageError(
            f"{folder} was made in {made}, and here phase 4 reads in {now}: add --inference.precision {made} to the "
            "flags, which is then the same on all machines"
        )
    raise UsageError(missing)


def refuse_to_lose_the_backbone(stored: dict, config: Config, folder: Path) -> None:
    """UsageError if a reader made with a backbone would give way to one without, because none is installed here."""
    had, have = stored["belongs_to"].get("backbone", "none"), with_backbone(config.reader).backbone
    wanted = "backbone" in config.reader.features or config.reader.tuned_steps > 0
    if wanted and config.reader.backbone == "auto" and have == "none" and had != "none":
        raise UsageError(
            f"the reader in {folder} was made with {had}, which is not installed here: {REMEDY} and another "
            "--inference.calibration"
        )


def reader_of(model: Normalizer, config: Config) -> Reader:
    """The reader: read where it was trained for these checkpoints and settings, trained and saved otherwise."""
    return kept_reader(model, config) or new_reader(model, config)


def kept_reader(model: Normalizer, config: Config) -> Reader | None:
    """The reader that was trained for these checkpoints and settings; None where there is none."""
    folder = Path(config.inference.calibration)
    path = folder / READER
    if not path.is_file():
        return None
    stored = stored_reader(path)
    if is_reader_of(stored, model, config):
        print(f"reader read from {path}")
        return rebuilt(stored, model, config)
    refuse_to_lose_the_backbone(stored, config, folder)
    earlier = stored["belongs_to"].get("recipe") != RECIPE
    why = "was made by another version of this code" if earlier else "belongs to other checkpoints or settings"
    print(f"the reader in {folder} {why}: trained anew")
    return None


def rebuilt(stored: dict, model: Normalizer, config: Config) -> Reader:
    """A stored reader, that hears its tuned backbone as config says: that shapes no weight."""
    stored["settings"] |= {name: getattr(config.reader, name) for name in ("tuned_share", "tuned_mirror")}
    return Reader.rebuild(stored, model.device)


def is_reader_of(stored: dict, model: Normalizer, config: Config) -> bool:
    """Whether a stored reader was trained for these checkpoints and settings."""
    known = stored["belongs_to"]
    return known == reader_identity(model, config, known.get("pictures", ""))


def new_reader(model: Normalizer, config: Config) -> Reader:
    """A reader, trained and saved."""
    folder = Path(config.inference.calibration)
    normals = read_normals(model, config, "train")
    with hold(folder, "reader"):
        return train_reader(model, normals.images, normals.pictures, config, folder)


class Normals(NamedTuple):
    """The normals of a split."""

    images: np.ndarray  # float32 (N, k H, k W), as the method looks at them; they lie on disk
    pictures: str  # a hash of what they show: of the files, and of how they are prepared
    patients: list[str]  # whose each is
    shapes: list[tuple[int, int]]  # rows and columns of each one's file

    @property
    def file_sizes(self) -> list[list[int]]:
        """Rows and columns of the smallest and of the largest file, each on its own."""
        return [np.min(self.shapes, axis=0).tolist(), np.max(self.shapes, axis=0).tolist()]


def read_normals(model: Normalizer, config: Config, split: str) -> Normals:
    """The normals of a split.

    Of split train those that trained the networks, of split val those that did not: a file that came later may be
    anybody's. UsageError if none is left or too many are unreadable.
    """
    training = split == "train"
    everyone = list_records(config.data.root, config.data.patient_from)
    records = split_records(everyone, config.data, trains=False)[split]
    if training and len(records) > config.reader.normals:
        chosen = np.linspace(0, len(records) - 1, config.reader.normals).round().astype(int)
        records = [records[index] for index in chosen]
    digests, patients, shapes, errors, left_out = [], [], [], [], 0
    times = magnification_of(config)
    size = (times * config.data.height, times * config.data.width)
    images = nameless_array(config.inference.calibration, np.float32, (len(records), *size)) if records else []
    with reading_told(len(records), config.data):
        for batch in read_batches(records, config.data, config.inference.batch_size, errors, times):
            for index, sample in batch:
                patient = None if training else records[index].patient
                if model.trained_on(patient, sample.digest) != training:
                    left_out += 1
                else:
                    images[len(digests)] = sample.image
                    patients.append(records[index].patient)
                    shapes.append(sample.original_shape)
                    digests.append(sample.digest)
    name = "skipped_training_local_only.csv" if training else "skipped_local_only.csv"
    report = Path(config.inference.calibration) / name
    report_skipped(errors, len(records), report)
    refuse_too_many_bad(len(errors), len(records), config.data, report)
    if left_out and training:
        print(f"{left_out} of {len(records)} training normals did not train the networks and are left out")
    elif left_out:
        print(f"{left_out} of {len(records)} validation normals trained the networks and are left out")
    if not digests and not training:
        raise UsageError(
            f"no validation normal of {config.data.root} is left: thresholds need radiographs that trained neither "
            "network; point data.root at the normals of phase 1, and call patients of elsewhere by names of their own"
        )
    if not digests:
        raise UsageError(
            f"{config.data.root} has no radiograph that trained the networks, and the reader learns on them: point "
            "data.root at the normals of phase 1, or use --inference.method plain; to judge by normals of elsewhere, "
            f"copy {READER}, made where the networks were trained, into {config.inference.calibration}"
        )
    shown = [json.dumps(config.data.preprocessing), *digests]  # digests are of the files
    pictures = hashlib.sha256("".join(shown).encode()).hexdigest()
    return Normals(images[: len(digests)], pictures, patients, shapes)
