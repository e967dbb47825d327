"""What the rows of ablation.py share: features, corruptions and a tuned backbone, each made once and kept on disk.

A ground is what readers are judged on: the labelled test split, or a rehearsal, which needs no label.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from detection import manifest_sha256
from protocol import PIXEL_FPR, Verdicts, judge, read_all, splits_of
from rehearsal import Rehearsal, final_map, left_out_maps, rehearsals
from torch import Tensor
from tuning import Alone

from anomaly import image_score
from calibration import refuse_too_few, views_of_verdicts
from config import Config
from config_reading import ReaderConfig, told_of
from examination import Normals, read_normals
from features import FEATURES, FeatureExtractor
from metrics import summarize
from normalizer import Examined, Normalizer
from progress import bar
from radiographs.geometry import unfit_map
from reader import Reader
from reader_pool import KeptRows, Pool, make_pool
from reader_training import LEARNING, RECIPE, reader_identity, seen_by_tuned
from runtime import training_precision
from survey import contents_of
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
    """Training normals, and features of everybody who is judged; what they are judged on is said by those below.

    Those below have `name`, of a folder; `everybody`, images (N, k H, k W) as phase 4 reads them, validation normals
    first; `judged`, what is found in logits of everybody.
    """

    name: str
    everybody: np.ndarray

    def __init__(self, model: Normalizer, config: Config):
        self.model, self.folder = model, Path(config.inference.calibration)
        self.extractor = FeatureExtractor(config.reader, model.device)
        self.config = replace(config, reader=self.extractor.settings)  # with the backbone that is there, or none

    def judged(self, logits: np.ndarray, config: Config) -> dict:
        """What `metrics.summarize` says of logits, float16 (N, k H, k W)."""
        raise NotImplementedError

    def asked(self) -> dict:
        """What makes two rows comparable: radiographs by their manifest, networks, seed and settings."""
        inference, data = self.config.inference, self.config.data
        asked = {"manifest_sha256": manifest_sha256(Path(data.root)), **self.model.identity}
        asked |= {"seed": self.config.runtime.seed, "reader_recipe": RECIPE, **self.precisions()}
        walk = ("noise_level", "draws", "solver", "steps", "smooth_share")
        asked |= {name: getattr(inference, name) for name in walk}
        asked |= {name: getattr(data, name) for name in ("brightness", "contrast", "gamma")}
        return json.loads(json.dumps(asked | {"reader": told_of(self.config.reader)}))

    def precisions(self) -> dict[str, str]:
        """In which networks learn, and in which features are read."""
        on_cpu = self.model.device.type == "cpu"
        return {
            "precision": training_precision(self.config.runtime, on_cpu),
            "read_in": self.config.inference.precision,
        }

    @cached_property
    def training(self) -> Normals:
        """Who the reader learns from."""
        return read_normals(self.model, self.config, "train")

    @cached_property
    def normals(self) -> Normals:
        """Who says what is usual; UsageError if they are too few."""
        normals = read_normals(self.model, self.config, "val")
        refuse_too_few(len(set(normals.patients)), "reader")
        return normals

    def shown(self, images: list[np.ndarray], config: Config) -> list[np.ndarray]:
        """Of images (k H, k W) of the normals, once or again and again, what shows them, and not what "pad" added."""
        shapes = self.normals.shapes
        contents = contents_of(shapes, len(shapes), config, config.reader.magnification)
        return [one[contents[row % len(contents)]] for row, one in enumerate(images)]

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

        def look(images: Tensor) -> list[Tensor]:
            return self.extractor(self.model.examine(images, self.config.reader.magnification))

        return self.kept(look, self.name, self.features_identity(self.config))

    def kept(self, look: Callable[[Tensor], list[Tensor]], name: str, identity: dict) -> list[np.ndarray]:
        """What `look` says of everybody, batch by batch in half precision, kept in a folder of this name."""
        size = self.config.inference.batch_size
        kept = KeptRows(self.folder / name, len(self.everybody), identity | {"everybody": self.fingerprint})
        with bar(total=kept.count, initial=kept.done, desc=f"{name}: those judged", unit="image") as progress:
            for first in range(kept.done, kept.count, size):
                batch = torch.from_numpy(self.everybody[first : first + size]).unsqueeze(1)
                kept.add([part.half().cpu().numpy() for part in look(batch)])
                kept.keep()
                progress.update(len(batch))
        return kept.arrays

    @cached_property
    def fingerprint(self) -> str:
        """Of everybody, by content."""
        return hashlib.sha256(np.ascontiguousarray(self.everybody)).hexdigest()

    def identity(self, config: Config) -> dict:
        """What shapes anything that is trained here."""
        whole = reader_identity(self.model, config, self.training.pictures) | self.precisions()
        walks = "walk" in config.reader.features
        return whole | {"walk": [config.inference.solver, config.inference.steps]} if walks else whole

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
        config = replace(self.config, reader=replace(self.config.reader, fills=fills))
        identity = seen_by_tuned(self.identity(config))
        last = self.folder / f"tuned_{name}.pt"
        network = fit_tuned(self.training.images, config, identity, last, self.model.device)
        alone = Alone(network, self.everybody.shape[1:], config.reader.tuned_mirror, self.model.device)

        def look(images: Tensor) -> list[Tensor]:
            with self.model.computing():
                return [alone.logits(images)]

        said = {**identity, "tuned_mirror": config.reader.tuned_mirror}
        return self.kept(look, f"{self.name}_by_tuned_{name}", said)[0][:, 0]


class OnTest(Ground):
    """The labelled test split, judged at the size of its files."""

    name = "judged"

    def __init__(self, model: Normalizer, config: Config):
        super().__init__(model, config)
        self.records = splits_of(config.data)["test"]

    @cached_property
    def test(self) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Its images (N, k H, k W), as phase 4 reads them, and the shapes of their files."""
        times, finest = self.config.reader.magnification, tuple(self.normals.file_sizes[1])
        samples = [one for batch in read_all(self.records, self.config.data, times, finest) for _, one in batch]
        return np.stack([one.image for one in samples]), [one.original_shape for one in samples]

    @cached_property
    def everybody(self) -> np.ndarray:
        return np.concatenate([self.normals.images, self.test[0]])

    def judged(self, logits: np.ndarray, config: Config) -> dict:
        """Standardized by what is said of the validation normals."""
        normals, said = len(self.normals.images), torch.from_numpy(logits[:, None])
        usual = left_out_maps(said[:normals], self.normals.patients, config)
        usual = self.shown([one[0, 0].numpy() for one in usual], config)
        verdicts = Verdicts(pixel_threshold=threshold_of(usual))
        known = views_of_verdicts(said[:normals], config).statistics()
        for record, shape, one in zip(self.records, self.test[1], said[normals:], strict=True):
            final = final_map(known, one, config)
            score = float(image_score(final, config.reader.top_share))
            verdicts.add(
                record, score, unfit_map(final[0, 0].numpy(), shape, config.data.fit, config.reader.magnification)
            )
        return judge(verdicts)


class OnRehearsal(Ground):
    """Validation normals, and the same with one thing in each that does not belong (rehearsal.py): no label is seen."""

    name = "rehearsed"

    def asked(self) -> dict:
        return super().asked() | {"judged_on": "rehearsal"}

    @cached_property
    def cases(self) -> list[Rehearsal]:
        """What is shown, a kind of thing each."""
        return rehearsals(self.normals.images, self.config.runtime.seed)

    @cached_property
    def everybody(self) -> np.ndarray:
        return np.concatenate([self.normals.images, *(case.images for case in self.cases)])

    def judged(self, logits: np.ndarray, config: Config) -> dict:
        """Each standardized by what is said of the other validation patients, its own left out."""
        count = len(self.normals.images)
        maps = left_out_maps(torch.from_numpy(logits[:, None]), self.normals.patients, config)
        shown = self.shown([one[0, 0].numpy() for one in maps], config)
        masks = self.shown([mask for case in self.cases for mask in case.masks], config)
        return summarize(
            [float(image_score(one, config.reader.top_share)) for one in maps],
            np.repeat([0, 1], [count, len(maps) - count]),
            np.repeat(["normal", *(f"{case.family} {case.what}" for case in self.cases)], count),
            shown,
            [*[None] * count, *masks],
            threshold_of(shown[:count]),
            [self.normals.patients[row % count] for row in range(len(maps))],
        )


def threshold_of(maps: list[np.ndarray]) -> float:
    """What so few pixels of the normals' maps exceed."""
    return threshold_from_normals(np.concatenate([one.ravel() for one in maps]), PIXEL_FPR)


GROUNDS = {"test": OnTest, "rehearsal": OnRehearsal}


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
