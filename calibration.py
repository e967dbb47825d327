"""What normals say: how the views of a change become a map, and where thresholds, p-values and colour scales lie.

A normal radiograph also differs from G(x): along tooth edges more than in air. So with method "statistical" each view,
at several blurs, is standardized per pixel by what the validation normals show there, and `fusion.py` makes one map of
all; with method "reader" the reader's logit is. Each validation normal is scored under the statistics of those of other
patients, as a new patient's would be.

calibration = calibrate(model, images, config)          images (N, H, W) of validation normals
calibration.save(folder); Calibration.load(folder, "statistical").to(model.device)

Views are (B, V, H, W), features (B, F, H, W) with F = V times the number of blurs.
"""

import hashlib
import json
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anomaly import blur_share, check_views, image_score, plain_map, stacked_views
from checks import UsageError
from config import Config, rebuild_phase
from corruption import check_fills, corrupt
from files import sha256, unsealed, write_binary, write_sealed_json
from fusion import Fusion, PixelSample, ScoreFusion, left_out_scores
from normalizer import Examined, Normalizer
from progress import bar, warn
from reader import Reader
from scratch import nameless_array
from standardization import NormalViews, PixelStatistics, features
from survey import COLOUR_QUANTILE, contents_of, look_at, magnification_of, maps_beside
from thresholds import threshold_from_normals
from typical import Typical, summary_of

FORMAT = 8  # of METHOD.json; another is made anew
NEEDED = {"plain": 1, "statistical": 2, "reader": 3}  # patients whose validation normals each method needs
FEW_NORMALS = 20  # patients; below, each that is left out moves the statistics of the others


@dataclass(frozen=True)
class Calibration:
    """What the validation normals of one pair of checkpoints say under one set of settings."""

    method: str
    belongs_to: dict  # hashes of the checkpoints, and the settings that shape a map
    scores: np.ndarray  # (N,) image scores of the validation normals, each left out of its own statistics
    pixel_threshold: float  # the share pixel_fpr of the pixels of normals lies above, those that "pad" added left out
    scale: dict[str, float]  # where the colour bars of residual, l1, gradient and anomaly_map end
    identity_error: float  # mean |x - G(x)|
    vae_error: float  # mean |x - dec(enc(x))|
    view_names: tuple[str, ...] = ()
    statistics: PixelStatistics | None = None  # of the features; None for the plain map
    fusion: Fusion | None = None
    reader: Reader | None = None
    score_fusion: ScoreFusion | None = None  # of the reader's map and of those beside it
    beside_statistics: PixelStatistics | None = None  # of the maps that a score hears beside the reader's
    typical: Typical | None = None  # latents of the normals; None where they are too few to say
    file_sizes: list[list[int]] | None = None  # rows and columns of the smallest and of the largest normal's file
    patients: int | None = None  # whose the normals are: so many know nothing of one another; None: one normal each

    def scores_of(self, seen: Examined, maps: Tensor, config: Config) -> np.ndarray:
        """The score (B,) of each image of a batch whose final maps (B, 1, H, W) are these."""
        if self.score_fusion is None:
            scores = image_score(maps, config.inference.top_share).cpu().numpy()
        else:
            beside = self.beside_statistics.standardize(maps_beside(seen, config))
            scores = self.score_fusion.score(readings_of(maps, beside, config))
        if not np.isfinite(scores).all():  # NaN would lie above no threshold and pass for normal
            raise UsageError("a score is not a number: a network has diverged, look at the curves of phases 1 and 3")
        return scores

    def to(self, device: torch.device | str) -> "Calibration":
        """The same where a model computes: nothing of it travels with a batch. The reader lies there already."""
        parts = {name: getattr(self, name) for name in ("statistics", "beside_statistics", "fusion")}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if part is not None})

    @property
    def independent(self) -> int:
        """How many patients the normals are of, which is what the uncertainty of a rate goes by."""
        return self.patients or len(self.scores)

    @property
    def normals_told(self) -> str:
        """How many normals say it, and of how many patients, where these are fewer."""
        images = f"{len(self.scores)} validation normals"
        return images if self.independent == len(self.scores) else f"{images} of {self.independent} patients"

    def score_threshold(self, image_fpr: float) -> float:
        """The score that at most this share of the validation normals exceeds."""
        return threshold_from_normals(self.scores, image_fpr)

    def validation_normals(self) -> dict:
        """What metrics.json says of them: by it export.py knows figures of these very settings and checkpoints."""
        belongs_to = hashlib.sha256(json.dumps(self.belongs_to, sort_keys=True).encode()).hexdigest()
        errors = {"identity_error": self.identity_error, "vae_error": self.vae_error}
        return {"images": len(self.scores), **errors, "belongs_to_sha256": belongs_to}

    def coarser(self, shape: tuple[int, int], config: Config) -> bool:
        """Whether a file of this shape shows less of what the method looks at than any validation normal's.

        One that shows more is looked at no closer than they are (`finest` of radiographs.geometry.fit_detail).
        """
        shown = contents_of([shape], 1, config, magnification_of(config))[0]
        wanted = (each.stop - each.start for each in shown)
        return any(own < min(known, most) for own, known, most in zip(shape, self.file_sizes[0], wanted, strict=True))

    def foreign(self, seen: Examined, limit: float) -> list[bool]:
        """Of each image of a batch, whether its latent lies more than `limit` robust deviations from the normals'."""
        if self.typical is None:
            return [False] * len(seen.x)
        return (self.typical.deviations(summary_of(seen.z.cpu().numpy())) > limit).tolist()

    def p_value(self, score: float) -> float:
        """Share of normals, the examined one counted in, that score as high.

        Uniform on new normals (Vovk 2005, conformal p).
        """
        return float((1 + np.count_nonzero(self.scores >= score)) / (1 + len(self.scores)))

    def anomaly_map(self, seen: Examined, config: Config) -> Tensor:
        """The final map (B, 1, H, W) of a batch."""
        if self.method == "plain":
            raw = plain_map(seen.x, seen.normal, config.inference)
        elif self.method == "reader":
            raw = self.statistics.standardize(self.reader.logits(seen))
        else:
            views = stacked_views(seen, config.calibration, config.inference)
            raw = self.fusion.anomaly_map(self.statistics.standardize(features(views, config.calibration.blurs)))
        return blur_share(raw, config.inference.smooth_share)

    def parts(self) -> tuple[dict, dict[str, np.ndarray]]:
        """All of it but the reader, for `of_parts`: plain values, and arrays by name."""
        arrays = {"scores": self.scores}
        if self.statistics is not None:
            arrays |= {"mean": self.statistics.mean.cpu().numpy(), "std": self.statistics.std.cpu().numpy()}
        if self.beside_statistics is not None:
            arrays |= {"beside_mean": self.beside_statistics.mean.cpu().numpy()}
            arrays |= {"beside_std": self.beside_statistics.std.cpu().numpy()}
        if self.fusion is not None:
            arrays |= {"weights": self.fusion.weights.cpu().numpy(), "bias": np.float64(self.fusion.bias)}
        named = ("method", "belongs_to", "pixel_threshold", "scale", "identity_error", "vae_error")
        content = {name: getattr(self, name) for name in (*named, "file_sizes", "patients")}
        content |= {"view_names": list(self.view_names), "largest": self.fusion.largest if self.fusion else None}
        content["typical"] = asdict(self.typical) if self.typical else None
        content["score_fusion"] = asdict(self.score_fusion) if self.score_fusion else None
        return content, arrays

    def save(self, folder: str | Path) -> None:
        """METHOD.npz with the arrays, then METHOD.json with the rest and the hash of the arrays."""
        content, arrays = self.parts()
        path, description = _paths(folder, self.method)
        description.unlink(missing_ok=True)  # removed first, written last: nobody takes new arrays for the old ones
        write_binary(path, lambda file: np.savez(file, **arrays))
        write_sealed_json(description, {"format": FORMAT, **content, "arrays_sha256": sha256(path)})

    @classmethod
    def load(cls, folder: str | Path, method: str, reader: Reader | None = None) -> "Calibration | None":
        """What `save` wrote, None where there is nothing of this version; UsageError if it is damaged.

        The reader has its own file.
        """
        path, description = _paths(folder, method)
        if not description.is_file():
            return None
        try:
            stored = json.loads(description.read_text(encoding="utf-8"))
            if stored["format"] != FORMAT:
                return None  # of an earlier version: made anew, as if it were not there
            content = unsealed(stored)
            del content["format"]
            whole = content.pop("arrays_sha256") == sha256(path)
            known = cls.of_parts(content, dict(np.load(path, allow_pickle=False)), reader) if whole else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{description} is damaged ({error}): remove {description.name} and {path.name} to make them anew"
            ) from error
        if known is None:
            raise UsageError(f"{path} is not what {description.name} describes: remove both to make them anew")
        return known

    @classmethod
    def of_parts(cls, content: dict, arrays: dict[str, np.ndarray], reader: Reader | None) -> "Calibration":
        """From what `parts` gave; KeyError or TypeError if it is of another version."""
        content = dict(content)
        parts = ("largest", "view_names", "score_fusion", "typical")
        largest, names, scores, typical = (content.pop(name) for name in parts)
        statistics = beside_statistics = fusion = None
        if "mean" in arrays:
            statistics = PixelStatistics(torch.from_numpy(arrays["mean"]), torch.from_numpy(arrays["std"]))
        if "beside_mean" in arrays:
            parts = (torch.from_numpy(arrays[f"beside_{name}"]) for name in ("mean", "std"))
            beside_statistics = PixelStatistics(*parts)
        if names:
            fusion = Fusion(torch.from_numpy(arrays["weights"]), float(arrays["bias"]), largest)
        made = {"view_names": tuple(names), "statistics": statistics, "fusion": fusion, "reader": reader}
        made["score_fusion"] = rebuild_phase(ScoreFusion, scores) if scores else None
        made["beside_statistics"] = beside_statistics
        made["typical"] = rebuild_phase(Typical, typical) if typical else None
        return cls(**content, scores=arrays["scores"], **made)


def _paths(folder: str | Path, method: str) -> tuple[Path, Path]:
    return Path(folder) / f"{method}.npz", Path(folder) / f"{method}.json"


def shaping(model: Normalizer, config: Config, reader: Reader | None = None) -> dict:
    """Everything that a map depends on beside the image: a calibration made under anything else does not fit."""
    walk = ("method", "noise_level", "solver", "steps", "draws", "alpha_l1", "beta_grad", "gamma_hf", "smooth_share")
    settings = {name: getattr(config.inference, name) for name in (*walk, "top_share", "pixel_fpr")}
    if config.inference.precision != "float32":  # without a word: as calibrations of float32 were always called
        settings["precision"] = config.inference.precision
    if config.inference.method == "statistical":
        settings |= asdict(config.calibration)
    if reader is not None:
        shares = ("top_share", "plain_weight", "residual_weight", *(("tuned_share",) if reader.tuned else ()))
        settings |= {f"reader_{name}": getattr(config.reader, name) for name in shares}
        if reader.tuned and config.reader.tuned_mirror:  # else without a word, as ever
            settings["reader_tuned_mirror"] = True
        settings |= {"reader_sha256": reader.sha256, "smallest_verdict_spread": config.reader.smallest_verdict_spread}
    return json.loads(json.dumps({**model.identity, "seed": config.runtime.seed, **settings}))


def readings_of(maps: Tensor, beside: Tensor, config: Config) -> np.ndarray:
    """What the reader's maps and those beside them say of each image, (B, 3): the means of their highest values."""
    everyone = (maps, beside[:, :1], beside[:, 1:])
    return np.stack([image_score(each, config.reader.top_share).cpu().numpy() for each in everyone], axis=1)


def calibrate(
    model: Normalizer,
    images: np.ndarray,
    config: Config,
    reader: Reader | None = None,
    patients: Sequence[Hashable] | None = None,
    shapes: list[tuple[int, int]] | None = None,
) -> Calibration:
    """Examine the validation normals (N, k H, k W): how views become a map, thresholds, colour scales.

    Whose they are, each somebody else's if nobody says; and the shapes of their files, by which what "pad" added is
    left out. UsageError if there are too few of them, or a view in calibration.views is unknown.
    """
    method, patients = config.inference.method, list(range(len(images)) if patients is None else patients)
    independent = len(set(patients))
    if method == "statistical":
        check_views(config.calibration.views)
        check_fills(config.calibration.fills, "calibration.fills")
    refuse_too_few(independent, method)
    if independent < FEW_NORMALS:
        warn(f"{independent} validation patients only: thresholds and p-values are rough below {FEW_NORMALS}")
    survey = look_at(model, images, config, reader, shapes)
    statistics = beside_statistics = fusion = score_fusion = None
    if method == "statistical":
        normals = NormalViews(survey.shown, config.calibration, config.calibration.blurs, patients)
        fusion, statistics = _fuse(normals, model, images, config), normals.statistics()
    if method == "reader":
        normals = views_of_verdicts(survey.shown, config, patients)
        others = NormalViews(survey.beside, config.reader, patients=patients)
        statistics = normals.statistics()
        beside_statistics = others.statistics()
    contents = contents_of(shapes, len(images), config, magnification_of(config))
    sizes = [survey.shown[0, 0][where].numel() for where in contents]
    ends = np.cumsum(sizes)
    pixels = nameless_array(config.inference.calibration, np.float32, (int(ends[-1]),))
    readings = []
    for index in bar(range(len(images)), desc="maps of normals", unit="image"):
        known = survey.shown[index : index + 1] if method == "plain" else normals.left_out(index)
        known = fusion.anomaly_map(known) if method == "statistical" else known
        final = blur_share(known, config.inference.smooth_share)
        pixels[ends[index] - sizes[index] : ends[index]] = final[0, 0][contents[index]].numpy().ravel()
        if method == "reader":
            readings.append(readings_of(final, others.left_out(index), config))
        else:
            readings.append(image_score(final, config.inference.top_share).numpy())
    scores = np.concatenate(readings)
    if method == "reader":
        weights = (1.0, config.reader.plain_weight, config.reader.residual_weight)
        score_fusion, scores = ScoreFusion.of(scores, weights), left_out_scores(scores, weights, patients)
    colour = threshold_from_normals(pixels, 1 - COLOUR_QUANTILE)
    scale = {"residual": survey.l1, "l1": survey.l1, "gradient": survey.gradient, "anomaly_map": colour}
    known = Calibration(
        method=method,
        belongs_to=shaping(model, config, reader),
        scores=scores,
        pixel_threshold=threshold_from_normals(pixels, config.inference.pixel_fpr),
        scale={name: max(1e-6, 2 * value) for name, value in scale.items()},
        identity_error=survey.identity_error,
        vae_error=survey.vae_error,
        view_names=survey.names,
        statistics=statistics,
        fusion=fusion,
        reader=reader,
        score_fusion=score_fusion,
        beside_statistics=beside_statistics,
        typical=Typical.of(survey.latents) if independent >= FEW_NORMALS else None,
        patients=independent,
    )
    return known.to(model.device)


def views_of_verdicts(logits: Tensor, config: Config, patients: Sequence[Hashable] | None = None) -> NormalViews:
    """What a reader says of validation normals (N, 1, k H, k W), with the floor of the spread that verdicts have."""
    settings = replace(config.reader, smallest_spread=config.reader.smallest_verdict_spread)
    return NormalViews(logits, settings, patients=patients)


def refuse_too_few(patients: int, method: str) -> None:
    """UsageError for validation normals of fewer patients than a method needs."""
    needed = NEEDED[method]
    if patients < needed:
        raise UsageError(
            f"too few validation normals: inference.method {method} needs those of {needed} patients and there "
            f"are {patients}; add some to the split val, or use --inference.method plain, which needs one"
        )


def _fuse(normals: NormalViews, model: Normalizer, images: np.ndarray, config: Config) -> Fusion:
    """The fusion; each image is standardized without the normal it is or was made of."""
    sample = PixelSample(config.calibration, config.runtime.seed, len(images))
    for origin, views, changed in _corrupted(model, images, config):
        deviations = normals.statistics_without(origin).standardize(features(views, config.calibration.blurs))
        sample.add_corrupted(deviations, changed)
    for index in bar(range(len(images)), desc="pixels of normals", unit="image"):
        sample.add_normal(normals.left_out(index))
    return sample.fit()


def _corrupted(model: Normalizer, images: np.ndarray, config: Config) -> Iterator[tuple[int, Tensor, np.ndarray]]:
    """Corrupted copies of the normals: index of the normal, views (1, V, H, W), changed pixels, bool (H, W)."""
    settings = config.calibration
    with bar(total=settings.corrupted, desc="corrupted normals", unit="image") as progress:
        for first in range(0, settings.corrupted, config.inference.batch_size):
            numbers = range(first, min(first + config.inference.batch_size, settings.corrupted))
            made = [_corrupt_one(images, number, config) for number in numbers]
            batch = torch.from_numpy(np.stack([image for image, _ in made])).unsqueeze(1)
            views = stacked_views(model.examine(batch), settings, config.inference).cpu()
            for position, number in enumerate(numbers):
                yield number % len(images), views[position : position + 1], made[position][1]
            progress.update(len(numbers))


def _corrupt_one(images: np.ndarray, number: int, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """The copy of that number and what changed in it; a normal drawn at random lends what is pasted."""
    random = np.random.default_rng((config.runtime.seed, number))
    donor = images[random.integers(len(images))]
    return corrupt(images[number % len(images)], donor, random, config.calibration)
