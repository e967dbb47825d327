"""What the rows of ablation.py share: features, corruptions and a tuned backbone, each made once and kept on disk."""

import json
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from detection import manifest_sha256
from protocol import PIXEL_FPR, Verdicts, read_all, splits_of
from rehearsal import verdicts
from torch import Tensor
from tuning import AS_THEY_ARE, Alone

from anomaly import blur_share, image_score
from calibration import views_of_verdicts
from config import Config
from config_reading import ReaderConfig
from examination import Normals, read_normals
from features import FEATURES, FeatureExtractor
from normalizer import Examined, Normalizer
from progress import bar
from radiographs.geometry import unfit_map
from reader import Reader
from reader_pool import KeptRows, Pool, make_pool
from reader_training import LEARNING, RECIPE, reader_identity
from runtime import training_precision
from thresholds import threshold_from_normals
from tuned_training import fit_tuned

Channel = tuple[str, ...]  # a feature of the reader, which part of it, and at which noise level, such as @0.25


def walk(seen: Examined, settings: ReaderConfig, eye: torch.nn.Module | None) -> list[Tensor]:
    """z, and what the whole walk of G changed of it, as phase 4 walks: of this ablation, no feature of phase 4."""
    return [torch.cat([seen.z, seen.z - seen.model.normal_latent(seen.z)], dim=1)]


FEATURES["walk"] = walk


def channels_of(name: str, maps: list[Tensor], settings: ReaderConfig) -> list[list[Channel]]:
    """A name for each channel of each map of a feature."""
    if name != "latent":
        return [[(name,)] * part.shape[1] for part in maps]
    beyond = len(settings.levels)
    size = (maps[0].shape[1] - beyond) // (1 + beyond)
    channels = [(name, "z")] * size
    for level in settings.levels:
        channels += [(name, "changed", f"@{level:g}")] * size + [(name, "heads", f"@{level:g}")]
    return [channels]


class Ground:
    """Training normals, and features of everybody who is judged: the validation normals, then the labelled test."""

    def __init__(self, model: Normalizer, config: Config):
        self.model, self.folder = model, Path(config.inference.calibration)
        self.extractor = FeatureExtractor(config.reader, model.device)
        self.config = replace(config, reader=self.extractor.settings)  # with the backbone that is there, or none
        self.records = splits_of(config.data)["test"]
        self._tuned: dict[str, np.ndarray] = {}

    def asked(self) -> dict:
        """What makes two rows comparable: radiographs by their manifest, networks, and every setting of the reader."""
        asked = {"manifest_sha256": manifest_sha256(Path(self.config.data.root)), **self.model.identity}
        asked |= {"reader_recipe": RECIPE, "reads_in": self.config.inference.precision}
        return json.loads(json.dumps(asked | {"reader": asdict(self.config.reader)}))

    @cached_property
    def training(self) -> Normals:
        """Who the reader learns from."""
        return read_normals(self.model, self.config, "train")

    @cached_property
    def normals(self) -> Normals:
        """Who says what is usual."""
        return read_normals(self.model, self.config, "val")

    @cached_property
    def channels(self) -> list[list[Channel]]:
        """What each channel of each feature map is, in the order of the extractor."""
        settings, image = self.config.reader, torch.from_numpy(self.training.images[:1]).unsqueeze(1)
        seen = self.model.examine(image, settings.magnification)
        named = [
            channels_of(name, FEATURES[name](seen, settings, self.extractor.eye), settings)
            for name in sorted(settings.features, key=lambda name: name != "encoder")
        ]
        return [channels for maps in named for channels in maps]

    @cached_property
    def features(self) -> list[np.ndarray]:
        """Of everybody, each float16 (N, F, h, w); kept on disk for the next command."""
        everybody, _ = self.everybody
        size, folder = self.config.inference.batch_size, self.folder / "judged"
        shown = {"normals": self.normals.pictures, "manifest_sha256": manifest_sha256(Path(self.config.data.root))}
        identity = self.features_identity(self.config) | shown
        kept = KeptRows(folder, len(everybody), identity)
        with bar(total=kept.count, initial=kept.done, desc="features of those judged", unit="image") as progress:
            for first in range(kept.done, kept.count, size):
                batch = torch.from_numpy(everybody[first : first + size]).unsqueeze(1)
                maps = self.extractor(self.model.examine(batch, self.config.reader.magnification))
                kept.add([part.half().cpu().numpy() for part in maps])
                kept.keep()
                progress.update(len(batch))
        return kept.arrays

    @cached_property
    def everybody(self) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Who is judged (N, k H, k W), as phase 4 reads them, and the shapes of the test's files."""
        times, finest = self.config.reader.magnification, tuple(self.normals.file_sizes[1])
        samples = [one for batch in read_all(self.records, self.config.data, times, finest) for _, one in batch]
        images, shapes = [one.image for one in samples], [one.original_shape for one in samples]
        return np.concatenate([self.normals.images, np.stack(images)]), shapes

    def identity(self, config: Config) -> dict:
        """What shapes anything that is trained here."""
        whole = reader_identity(self.model, config, self.training.pictures)
        precision = training_precision(config.runtime, self.model.device.type == "cpu")
        return whole | {"precision": precision, "read_in": config.inference.precision}

    def features_identity(self, config: Config) -> dict:
        """What shapes a feature."""
        return {name: value for name, value in self.identity(config).items() if name not in LEARNING}

    def pool(self, config: Config) -> Pool:
        """Features of the training normals and of their corrupted copies, for these fills."""
        identity = self.features_identity(config)
        folder = self.folder / f"pool_{name_of(config.reader.fills)}"
        return make_pool(self.model, self.extractor, self.training.images, config, identity, folder)

    def tuned_logits(self, fills: tuple[str, ...]) -> np.ndarray:
        """What the backbone that was tuned with these fills says of everybody, float16 (N, k H, k W)."""
        name = name_of(fills)
        if name not in self._tuned:
            config = replace(self.config, reader=replace(self.config.reader, fills=fills))
            identity = self.identity(config)
            identity = {key: value for key, value in identity.items() if key not in self.model.identity}  # G unseen
            last = self.folder / f"tuned_{name}.pt"
            network = fit_tuned(self.training.images, config, identity, last, self.model.device)
            everybody = self.everybody[0]
            alone = Alone(network, everybody.shape[1:], config.reader.tuned_mirror, self.model.device)
            with self.model.computing():
                found = verdicts(AS_THEY_ARE, alone, everybody, config, "the tuned backbone")
            self._tuned = {name: found[:, 0].numpy()}  # of one set of fills at a time
        return self._tuned[name]


def name_of(fills: tuple[str, ...]) -> str:
    """A set of fills as part of a path: how many, and those that the default has and these have not."""
    missing = sorted(set(ReaderConfig().fills) - set(fills))
    return "_".join([str(len(fills)), *(f"no_{name}" for name in missing)])


# ---------------------------------------------------------------- what networks say of it


class Kept:
    """Stands where a reader's extractor would: the features are there already."""

    def __init__(self, settings: ReaderConfig):
        self.settings = settings

    def __call__(self, seen: SimpleNamespace) -> list[Tensor]:
        return seen.maps

    def grid(self, seen: Examined | SimpleNamespace) -> tuple[int, int]:
        return FeatureExtractor.grid(self, seen)


def logits_of(
    reader: Reader, model: Normalizer, images: np.ndarray, features: list[np.ndarray], config: Config
) -> np.ndarray:
    """What a reader's networks say of images (N, k H, k W) with these features, float16 of the same shape."""
    size, found = config.inference.batch_size, []
    for first in bar(range(0, len(images), size), desc="reading", unit="batch"):
        rows = slice(first, first + size)
        maps = [torch.from_numpy(np.array(part[rows])).float().to(model.device) for part in features]
        detail = torch.from_numpy(images[rows]).unsqueeze(1).to(model.device)
        found.append(reader.logits(SimpleNamespace(detail=detail, maps=maps, model=model))[:, 0].half().cpu().numpy())
    return np.concatenate(found)


def verdicts_of(logits: np.ndarray, ground: Ground, config: Config) -> Verdicts:
    """Maps and scores of the test split from logits of everybody, standardized by those of the validation normals."""
    normals = len(ground.normals.images)
    views = views_of_verdicts(torch.from_numpy(logits[:normals, None]), config)
    usual = [blur_share(views.left_out(number), config.inference.smooth_share) for number in range(normals)]
    verdicts = Verdicts(pixel_threshold=threshold_from_normals(torch.cat(usual).numpy().ravel(), PIXEL_FPR))
    known, shapes = views.statistics(), ground.everybody[1]
    for record, shape, one in zip(ground.records, shapes, logits[normals:], strict=True):
        final = blur_share(known.standardize(torch.from_numpy(one[None, None]).float()), config.inference.smooth_share)
        score = float(image_score(final, config.reader.top_share))
        verdicts.add(record, score, unfit_map(final[0, 0].numpy(), shape, config.data.fit))
    return verdicts
