"""What the rows of ablation.py share: features, corruptions and a tuned backbone, each made once and kept on disk."""

import json
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from protocol import PIXEL_FPR, Verdicts, splits_of
from torch import Tensor

from anomaly import blur_share, image_score
from checks import UsageError
from config import Config
from config_reading import ReaderConfig
from dataset import read_batches
from examination import Normals, read_normals
from features import FEATURES, FeatureExtractor
from files import sha256
from normalizer import Examined, Normalizer
from progress import bar
from radiographs.geometry import unfit_map
from reader import WHOLE, Reader, positions
from reader_training import LEARNING, RECIPE, Pool, make_pool, reader_identity
from scratch import array_at
from standardization import NormalViews
from thresholds import threshold_from_normals
from tuned_training import fit_tuned

Channel = tuple[str, str]  # a feature of the reader, and which part of it


def channels_of(name: str, maps: list[Tensor], settings: ReaderConfig) -> list[list[Channel]]:
    """A name for each channel of each map of a feature."""
    if name != "latent":
        return [[(name, "")] * part.shape[1] for part in maps]
    beyond = len(settings.levels)
    size = (maps[0].shape[1] - beyond) // (1 + beyond)
    changed = [(name, "changed")] * size + [(name, "heads")]
    return [[(name, "z")] * size + changed * beyond]


class Ground:
    """Training normals, and features of everybody who is judged: the validation normals, then the labelled test."""

    def __init__(self, model: Normalizer, config: Config):
        self.model, self.config = model, config
        self.folder = Path(config.inference.calibration)
        self.extractor = FeatureExtractor(config.reader, model.device)
        self.records = splits_of(config.data)["test"]
        self._tuned: dict[str, np.ndarray] = {}

    def asked(self) -> dict:
        """What makes two rows comparable: radiographs by their manifest, networks, and every setting of the reader."""
        manifest, settings = Path(self.config.data.root), asdict(self.extractor.settings)
        manifest = manifest if manifest.is_file() else manifest / "manifest.csv"
        asked = {"manifest_sha256": sha256(manifest), **self.model.identity, "reader_recipe": RECIPE}
        asked |= {"reads_in": self.config.inference.precision, "reader": settings}
        return json.loads(json.dumps(asked))

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
        settings, image = self.extractor.settings, torch.from_numpy(self.training.images[:1]).unsqueeze(1)
        seen = self.model.examine(image, settings.magnification)
        named = [
            channels_of(name, FEATURES[name](seen, settings, self.extractor.eye), settings)
            for name in sorted(settings.features, key=lambda name: name != "encoder")
        ]
        return [channels for maps in named for channels in maps]

    @cached_property
    def features(self) -> list[np.ndarray]:
        """Of everybody, each float16 (N, F, h, w)."""
        everybody, _ = self.everybody
        size, arrays = self.config.inference.batch_size, []
        scratch = self.folder / "looks"
        scratch.mkdir(parents=True, exist_ok=True)
        for first in bar(range(0, len(everybody), size), desc="features of those judged", unit="batch"):
            batch = torch.from_numpy(everybody[first : first + size]).unsqueeze(1)
            maps = self.extractor(self.model.examine(batch, self.config.reader.magnification))
            parts = [part.half().cpu().numpy() for part in maps]
            if not arrays:
                arrays = [
                    array_at(scratch / f"{number:02d}.npy", part.dtype, (len(everybody), *part.shape[1:]))
                    for number, part in enumerate(parts)
                ]
            for array, part in zip(arrays, parts, strict=True):
                array[first : first + len(part)] = part
        return arrays

    @cached_property
    def everybody(self) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Who is judged (N, k H, k W), as phase 4 reads them, and the shapes of the test's files."""
        config, errors, images, shapes = self.config, [], [], []
        finest, size = tuple(self.normals.file_sizes[1]), config.inference.batch_size
        for batch in read_batches(self.records, config.data, size, errors, config.reader.magnification, finest):
            images += [sample.image for _, sample in batch]
            shapes += [sample.original_shape for _, sample in batch]
        if errors:
            raise UsageError(f"{len(errors)} of {len(self.records)} radiographs of the test split cannot be read")
        return np.concatenate([self.normals.images, np.stack(images)]), shapes

    def pool(self, config: Config) -> Pool:
        """Features of the training normals and of their corrupted copies, for these fills."""
        whole = reader_identity(self.model, config, self.training.pictures)
        identity = {name: value for name, value in whole.items() if name not in LEARNING}
        identity |= {"read_in": config.inference.precision}
        folder = self.folder / f"pool_{name_of(config.reader.fills)}"
        return make_pool(self.model, self.extractor, self.training.images, config, identity, folder)

    def tuned_logits(self, fills: tuple[str, ...]) -> np.ndarray:
        """What the backbone that was tuned with these fills says of everybody, float16 (N, k H, k W)."""
        name = name_of(fills)
        if name not in self._tuned:
            config = replace(self.config, reader=replace(self.config.reader, fills=fills))
            identity = reader_identity(self.model, config, self.training.pictures)
            identity = {key: value for key, value in identity.items() if key not in self.model.identity}  # G unseen
            last = self.folder / f"tuned_{name}.pt"
            network = fit_tuned(self.training.images, config, identity, last, self.model.device)
            everybody, size, found = self.everybody[0], config.inference.batch_size, []
            places = positions(everybody.shape[1:], [WHOLE], self.model.device)
            for first in bar(range(0, len(everybody), size), desc="the tuned backbone", unit="batch"):
                batch = torch.from_numpy(everybody[first : first + size]).unsqueeze(1).to(self.model.device)
                with torch.no_grad(), self.model.computing():
                    logits = network.look(batch, places.expand(len(batch), -1, -1, -1), config.reader.tuned_mirror)
                found.append(logits[:, 0].half().cpu().numpy())
            self._tuned = {name: np.concatenate(found)}  # of one set of fills at a time
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
    views = NormalViews(
        torch.from_numpy(logits[:normals, None]),
        replace(config.reader, smallest_spread=config.reader.smallest_verdict_spread),
    )
    usual = [blur_share(views.left_out(number), config.inference.smooth_share) for number in range(normals)]
    verdicts = Verdicts(pixel_threshold=threshold_from_normals(torch.cat(usual).numpy().ravel(), PIXEL_FPR))
    known, shapes = views.statistics(), ground.everybody[1]
    for record, shape, one in zip(ground.records, shapes, logits[normals:], strict=True):
        final = blur_share(known.standardize(torch.from_numpy(one[None, None]).float()), config.inference.smooth_share)
        score = float(image_score(final, config.reader.top_share))
        verdicts.add(record, score, unfit_map(final[0, 0].numpy(), shape, config.data.fit))
    return verdicts
