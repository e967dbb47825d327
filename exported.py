"""Part: a trained normalizer as one folder, and what it says of one file.

    normalizer = Normalizer.load("exported")
    result = normalizer.examine("patient.dcm")      # result.map, .score, .p_value, .flagged, .normal, .x

The folder holds weights and arrays as safetensors and everything else as JSON; nothing is unpickled. contents.json has
the SHA-256 of every file and is written last. Numbers are those of phase 4 with inference.batch_size 1, in the
precision that normals were read in, whatever the machine. Larger batches add up in another order: in float32 they
differ in the last digits, in bf16 by its rounding.

Who trained stays out of the folder unless it is asked for: phase 4 needs the salted hashes to refuse a patient who
trained, but they travel with their salt, so that short patient numbers could be tried one by one, and a fingerprint is
a rough picture of a radiograph. Whoever publishes a folder has more to lose by that than its reader has by a score that
flatters. For use at home, where those who trained do come again, it is asked for.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from calibration import Calibration, shaping
from checks import UsageError
from config import Config, DataConfig, InferenceConfig, LatentConfig, RuntimeConfig, UNetConfig, rebuild_phase
from config_reading import CalibrationConfig, ReaderConfig
from dataset import read_sample
from examination import remarks_on
from files import sha256, unsealed, write_binary, write_sealed_json
from flowdiff_model import FlowDiffUNet
from latent_dataset import LatentStandard
from model import rebuild_vae
from normalizer import Normalizer
from radiographs.geometry import unfit_map
from radiographs.manifest import Record
from radiographs.membership import Membership
from radiographs.reading import ImageReadError, read_header
from reader import BEFORE, Reader
from runtime import plain
from survey import magnification_of

FORMAT = 1  # of the folder; raise it when a reader of the old one would misread the new
NORMALIZER, CONTENTS = "normalizer.json", "contents.json"
VAE, NETWORK, CALIBRATION, READER = (f"{name}.safetensors" for name in ("vae", "network", "calibration", "reader"))
PLACES = ("vae_checkpoint", "flow_checkpoint", "calibration", "output")  # of InferenceConfig: where files lay
DAMAGED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, RuntimeError, OSError)
REMEDY = "copy the folder again, or run python export.py again"


@dataclass(frozen=True)
class Judged:
    """What a normalizer and its normals say of one radiograph."""

    x: np.ndarray  # as the networks saw it, float32 (H, W) in [-1, 1]
    normal: np.ndarray  # G(x), the same shape and range
    map: np.ndarray  # the anomaly map, float32 at the size of the file
    score: float
    p_value: float  # share of normals that score as high
    threshold: float  # of the score: at most inference.image_fpr of validation normals lie above
    flagged: bool  # whether the score lies above the threshold
    coarser: bool  # fewer pixels than any validation normal: threshold and p-value do not hold
    foreign: bool  # unlike all normals, perhaps no panoramic
    known: bool  # looks like one that trained; False where the folder does not say who did


class Judge:
    """Phase 4 for one file at a time."""

    def __init__(self, model: Normalizer, calibration: Calibration, config: Config):
        self.model, self.calibration, self.config = model, calibration, config

    def __call__(self, path: str | Path) -> Judged:
        """ImageReadError if the file is no radiograph; UsageError if it, or its patient, is known to have trained."""
        calibration, config, times = self.calibration, self.config, magnification_of(self.config)
        header = read_header(path)
        if not header.is_image:
            raise ImageReadError(path, "a DICOM object that is no image of a radiograph")
        record = Record(Path(path), None, None, "", None, "", "file")
        sample = read_sample(record, config.data, times, tuple(calibration.file_sizes[1]))
        if self.model.members:
            self._refuse_known(header.patient, sample.digest)
        seen = self.model.examine(torch.from_numpy(sample.image)[None, None], times)
        maps = calibration.anomaly_map(seen, config)
        score = float(calibration.scores_of(seen, maps, config)[0])
        threshold = calibration.score_threshold(config.inference.image_fpr)
        return Judged(
            x=_picture(seen.x),
            normal=_picture(seen.normal),
            map=unfit_map(_picture(maps), sample.original_shape, config.data.fit, times),
            score=score,
            p_value=calibration.p_value(score),
            threshold=threshold,
            flagged=score > threshold,
            foreign=calibration.foreign(seen, config.latent.outlier_std)[0],
            **remarks_on(sample, self.model, calibration, config),
        )

    def _refuse_known(self, patient: str | None, digest: str) -> None:
        allowed = self.config.inference.examine_training_patients
        if not allowed and self.model.knows(patient, digest):
            raise UsageError(
                "this radiograph, or its patient, trained or validated the networks: its score would flatter, so leave "
                "it out, or export with --inference.examine-training-patients True"
            )


def _picture(batch: Tensor) -> np.ndarray:
    return batch[0, 0].cpu().numpy()


# ---------------------------------------------------------------- to a folder


def write_weights(folder: Path, model: Normalizer, calibration: Calibration, config: Config, members: bool) -> None:
    """Everything that `load` reads; `seal` comes after, when the card and the picture lie there too."""
    content, arrays = calibration.parts()
    _write_tensors(folder / VAE, model.vae.state_dict())
    _write_tensors(folder / NETWORK, model.network.state_dict())
    _write_tensors(folder / CALIBRATION, {name: torch.from_numpy(np.array(each)) for name, each in arrays.items()})
    reader = calibration.reader
    if reader is not None:
        learnt = reader.content()
        tensors = {f"weights.{name}": weight for name, weight in learnt["weights"].items()}
        tensors |= {f"tuned.{name}": weight for name, weight in learnt["tuned"].items()}
        for number, part in enumerate(learnt["statistics"]):
            tensors |= {f"statistics.{number}.{name}": value for name, value in part.items()}
        _write_tensors(folder / READER, tensors)
    else:
        (folder / READER).unlink(missing_ok=True)  # of an earlier export
    inference = {name: value for name, value in asdict(config.inference).items() if name not in PLACES}
    whole = {
        "format": FORMAT,
        "identity": model.identity,
        "vae": model.vae.recipe(),
        "latent_channels": model.vae.latent_channels,
        "unet": model.artefact["unet"],
        "latent_standard": {"mean": list(model.standard.mean), "std": list(model.standard.std)},
        "preprocessing": model.artefact["preprocessing"],
        "split": model.artefact["split"],
        "settings": {"inference": inference, "calibration": plain(config.calibration), "reader": plain(config.reader)},
        "outlier_std": config.latent.outlier_std,
        "seed": config.runtime.seed,
        "normals": content,
        "reader": None if reader is None else {name: learnt[name] for name in ("belongs_to", "settings")},
        "members": [each.plain() for each in model.members] if members else [],
    }
    write_sealed_json(folder / NORMALIZER, json.loads(json.dumps(whole)))


def seal(folder: Path, foreign: frozenset[str] = frozenset()) -> None:
    """contents.json: the SHA-256 of every file of the folder but those of these names, which are somebody else's."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in {CONTENTS, *foreign})
    write_sealed_json(folder / CONTENTS, {"format": FORMAT, "sha256": {path.name: sha256(path) for path in files}})


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    whole = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    write_binary(path, lambda file: file.write(safetensors.torch.save(whole, {"format": "pt"})))


# ---------------------------------------------------------------- from a folder


def load(folder: str | Path, device: torch.device | str = "cpu") -> Normalizer:
    """What `write_weights` and `seal` wrote; UsageError if something is missing, damaged or of another version.

    On a GPU float32 is float32: TF32 is switched off for convolutions of the whole process, as in phase 4.
    """
    folder, device = Path(folder), _usable(device)
    known = read_contents(folder)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    try:
        return _rebuilt(folder, _checked(folder, known), device)
    except (*DAMAGED, safetensors.SafetensorError) as error:  # it was changed and sealed again
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UsageError(f"{folder} is not what python export.py writes ({words}): {REMEDY}") from error


def read_contents(folder: Path) -> dict[str, str]:
    """What contents.json of a folder says, SHA-256 by file name; UsageError if it is missing or damaged."""
    try:
        there = (folder / CONTENTS).is_file()
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be looked into
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"there is no such folder ({reason}): name one that python export.py wrote") from error
    if not there:
        raise UsageError(f"{folder} holds no {CONTENTS}: name a folder that python export.py wrote")
    contents = _json(folder / CONTENTS)
    if contents.get("format") != FORMAT:
        raise UsageError(
            f"{folder} has format {contents.get('format')}, this code reads {FORMAT}: use the matching version"
        )
    if not isinstance(contents.get("sha256"), dict):
        raise UsageError(f"{folder / CONTENTS} is damaged (it names no files): {REMEDY}")
    return contents["sha256"]


def _usable(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"device {device!r} is unknown: use cpu, or cuda where there is an NVIDIA GPU") from error
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"device {found} is not supported: use cpu, or cuda where there is an NVIDIA GPU")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UsageError(f"device is {found} and torch sees {count} GPUs: check nvidia-smi, or use cpu")
    return found


def _checked(folder: Path, contents: dict[str, str]) -> dict:
    """The content of normalizer.json, once every file that is read has the hash that contents.json says."""
    read = {name for name in contents if name.endswith(".safetensors")}  # a card may be edited where it is published
    for name in sorted(read | {VAE, NETWORK, CALIBRATION, NORMALIZER}):
        if not (folder / name).is_file() or sha256(folder / name) != contents.get(name):
            raise UsageError(f"{folder / name} is missing or damaged: {REMEDY}")
    content = _json(folder / NORMALIZER)
    if content["reader"] and READER not in contents:
        raise UsageError(f"{folder / READER} is missing or damaged: {REMEDY}")
    return content


def _rebuilt(folder: Path, content: dict, device: torch.device) -> Normalizer:
    model = _networks(folder, content, device)
    config = _config(content)
    model.settings, model.seed = config.inference, config.runtime.seed
    reader = _reader(folder, content["reader"], device) if content["reader"] else None
    arrays = {name: value.numpy() for name, value in _tensors(folder / CALIBRATION).items()}
    calibration = Calibration.of_parts(content["normals"], arrays, reader)
    if np.shape(calibration.file_sizes) != (2, 2) or not np.isfinite(np.array(calibration.file_sizes, float)).all():
        raise ValueError("file_sizes are not two pairs of numbers")
    if calibration.belongs_to != shaping(model, config, reader):
        raise UsageError(f"{folder} mixes parts of several normalizers: {REMEDY}")
    model.judge = Judge(model, calibration.to(device), config)
    return model


def _json(path: Path) -> dict:
    try:
        return unsealed(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({error}): {REMEDY}") from error


def _tensors(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


def _networks(folder: Path, content: dict, device: torch.device) -> Normalizer:
    network = FlowDiffUNet(rebuild_phase(UNetConfig, content["unet"]), content["latent_channels"])
    network.load_state_dict(_tensors(folder / NETWORK))
    network.to(device).requires_grad_(False).eval()
    vae = rebuild_vae({"recipe": content["vae"], "weights": _tensors(folder / VAE)}).to(device)
    standard = LatentStandard(*(tuple(content["latent_standard"][name]) for name in ("mean", "std")))
    model = Normalizer(vae, network, standard)
    model.artefact = {name: content[name] for name in ("preprocessing", "split", "unet")}
    model.identity = content["identity"]
    model.members = [Membership.from_plain(stored) for stored in content["members"]]
    return model


def _reader(folder: Path, content: dict, device: torch.device) -> Reader:
    tensors = _tensors(folder / READER)
    named = {
        kind: {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{kind}.")}
        for kind in ("weights", "tuned")
    }
    statistics: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("statistics."):
            _, number, part = name.split(".")
            statistics.setdefault(int(number), {})[part] = value
    ordered = [statistics[number] for number in sorted(statistics)]
    return Reader.rebuild({**content, **named, "statistics": ordered}, device)


def _config(content: dict) -> Config:
    """The numbers that a map and a score follow from; where files lay is not among them."""
    settings = content["settings"] | {"reader": BEFORE | content["settings"]["reader"]}
    parts = {"inference": InferenceConfig, "calibration": CalibrationConfig, "reader": ReaderConfig}
    return Config(
        data=DataConfig(**content["preprocessing"]),
        latent=LatentConfig(outlier_std=content["outlier_std"]),
        unet=rebuild_phase(UNetConfig, content["unet"]),
        runtime=RuntimeConfig(seed=content["seed"]),
        **{name: rebuild_phase(kind, settings[name]) for name, kind in parts.items()},
    )
