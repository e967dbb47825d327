"""The learned reading of what G changed: how likely a place looks as if it did not belong.

Small networks read features of the image, of the autoencoder and of G (`features.py`), each as it is and as a
deviation from what training normals show at that place. They learn on corrupted normals (`reader_training.py`), as in
DRAEM (Zavrtanik et al. 2021); what they read is a generative normalizer. detail comes from dataset.read_sample, or from
radiographs.geometry.fit_detail.

    reader = Reader.load("outputs/calibration/reader.pt")
    logits = reader.logits(G.examine(detail, reader.settings.magnification))     (B, 1, k H, k W)
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from checks import UsageError
from config import rebuild_phase
from config_reading import ReaderConfig
from features import FeatureExtractor
from files import load_checkpoint, save_checkpoint, weights_sha256
from normalizer import Examined
from standardization import PixelStatistics
from tiles import places_of
from tuned_backbone import TunedBackbone

Crop = tuple[float, float, float]  # top and left as shares of the image, and the share of each side that is kept
WHOLE: Crop = (0.0, 0.0, 1.0)
BEFORE = {"tuned_mirror": False}  # of readers that were saved before there was such a setting


@dataclass(frozen=True)
class FeatureStatistics:
    """Of one feature map over training normals: per channel (1, F, 1, 1), and per place (1, F, h, w)."""

    centre: Tensor
    scale: Tensor
    places: PixelStatistics

    def standardize(self, values: Tensor, largest: float, crops: list[Crop]) -> Tensor:
        """(B, F, h, w) to (B, 2F, h, w): in units of the channel, and of the place.

        crops says where each one lies, or where all of them lie.
        """
        plain = (values - self.centre) / self.scale
        mean = torch.cat([cropped(self.places.mean, crop) for crop in crops])
        std = torch.cat([cropped(self.places.std, crop) for crop in crops])
        return torch.cat([plain.clamp(-largest, largest), ((values - mean) / std).clamp(-largest, largest)], dim=1)

    def to(self, device: torch.device | str) -> "FeatureStatistics":
        """The same on another device."""
        return FeatureStatistics(self.centre.to(device), self.scale.to(device), self.places.to(device))


def mirrored(crop: Crop) -> Crop:
    """The same part of the other side of the jaw."""
    top, left, share = crop
    return (top, 1 - left - share, share)


def cropped(maps: Tensor | np.ndarray, crop: Crop) -> Tensor | np.ndarray:
    """The part of (..., h, w) that a crop keeps, not copied; its borders fall between places."""
    (top, left, share), (height, width) = crop, maps.shape[-2:]
    first, across = round(top * height), round(left * width)
    return maps[..., first : first + round(share * height), across : across + round(share * width)]


class Surroundings(nn.Module):
    """What lies `distance` places away, added to what is known of a place."""

    def __init__(self, width: int, distance: int):
        super().__init__()
        self.look = nn.Conv2d(width, width, 3, padding=distance, dilation=distance)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.look(F.gelu(hidden))


class ReaderNetwork(nn.Module):
    """Feature maps of several resolutions to one logit per place.

    A verdict hears of as many places to every side as the distances sum up to: whether a place belongs is a matter of
    what lies around it.
    With `mirror` it also hears of the same place on the other side, and of the eight around that one in each map, since
    the two sides are alike and align only roughly: what a jaw has on both sides is likely its own.
    Each map is brought to the hidden width where it is coarse and then enlarged, which is the same as the other way
    round, for a fraction of the work.
    """

    def __init__(self, channels: list[int], width: int, distances: tuple[int, ...], dropout: float, mirror: bool):
        super().__init__()
        self.drop = nn.Dropout2d(dropout)
        self.enter = nn.ModuleList([nn.Conv2d(2 * count, width, 1) for count in channels])
        across = channels if mirror else ()
        self.across = nn.ModuleList([nn.Conv2d(2 * count, width, 1, bias=False) for count in across])
        self.place = nn.Conv2d(2, width, 1)
        around = [Surroundings(width, distance) for distance in distances]
        self.body = nn.Sequential(*around, nn.GELU(), nn.Conv2d(width, 1, 1))
        nn.init.constant_(self.body[-1].bias, -3.0)  # few places are foreign

    def forward(self, features: list[Tensor], opposite: list[Tensor], places: Tensor) -> Tensor:
        """Logits (B, 1, h, w) from standardized features, each (B, 2F, ., .), and positions (B, 2, h, w).

        opposite holds the features of the other side, turned round; without `mirror` nobody looks at them.
        """
        size, hidden = places.shape[-2:], self.place(places)
        by_size: dict[torch.Size, Tensor] = {}  # added up before they are enlarged: fewer to enlarge
        heard = [enter(self.drop(part)) for enter, part in zip(self.enter, features, strict=True)]
        if self.across:
            beyond = zip(self.across, opposite, strict=True)
            heard += [nearby(across(self.drop(part))) for across, part in beyond]
        for entered in heard:
            known = by_size.get(entered.shape[-2:])
            by_size[entered.shape[-2:]] = entered if known is None else known + entered
        for entered in by_size.values():
            if entered.shape[-2:] != size:
                entered = F.interpolate(entered, size=size, mode="bilinear", align_corners=False)
            hidden = hidden + entered
        return self.body(hidden)


def nearby(hidden: Tensor) -> Tensor:
    """The mean of each place and its eight neighbours."""
    return F.avg_pool2d(hidden, 3, stride=1, padding=1, count_include_pad=False)


class ReaderEnsemble(nn.ModuleList):
    """Networks that began elsewhere and saw other crops, and what they say on average (Lakshminarayanan et al. 2017).

    Where each one errs is its own; what they agree on is in the picture.
    """

    @classmethod
    def untrained(cls, channels: list[int], settings: ReaderConfig) -> "ReaderEnsemble":
        """For feature maps of these channels; the weights of all members follow from torch's seed."""
        shape = channels, settings.width, settings.distances, settings.dropout, settings.mirror
        members = cls(ReaderNetwork(*shape) for _ in range(settings.members))
        return members.to(memory_format=torch.channels_last)  # which CPUs convolve fastest

    def forward(self, features: list[Tensor], opposite: list[Tensor], places: Tensor) -> Tensor:
        """The mean of the members' logits, (B, 1, h, w)."""
        return torch.stack([member(features, opposite, places) for member in self]).mean(0)


def positions(size: tuple[int, int], crops: list[Crop], device: torch.device | str) -> Tensor:
    """Where each place lies, row and column in [-1, 1]: (B, 2, h, w) for crops of a grid of this size."""
    whole = places_of(size, device)[None]
    return torch.cat([cropped(whole, crop) for crop in crops])


@dataclass(frozen=True)
class Reader:
    """The trained networks with everything they need."""

    network: ReaderEnsemble
    statistics: list[FeatureStatistics]
    extractor: FeatureExtractor
    belongs_to: dict  # hashes of both checkpoints, and what the reader was trained with
    tuned: TunedBackbone | None = None  # where reader.tuned_steps asks for it and a backbone is installed

    @property
    def settings(self) -> ReaderConfig:
        """What it was trained with."""
        return self.extractor.settings

    @torch.no_grad()
    def logits(self, seen: Examined) -> Tensor:
        """How foreign each pixel of the magnified image looks, log-odds, (B, 1, k H, k W)."""
        maps, largest = self.extractor(seen), self.settings.largest_deviation
        inputs = [known.standardize(part, largest, [WHOLE]) for known, part in zip(self.statistics, maps, strict=True)]
        opposite = [part.flip(-1) for part in inputs] if self.settings.mirror else []
        size, device = tuple(seen.detail.shape[-2:]), seen.detail.device
        with seen.model.computing():
            logits = self.network(inputs, opposite, positions(self.extractor.grid(seen), [WHOLE], device)).float()
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        share = self.settings.tuned_share
        if self.tuned is None or share == 0:
            return logits
        places = positions(size, [WHOLE], device).expand(len(seen.detail), -1, -1, -1)
        with seen.model.computing():
            tuned = self.tuned.look(seen.detail, places, self.settings.tuned_mirror).float()
        return (1 - share) * logits + share * tuned

    @property
    def sha256(self) -> str:
        """Of everything that was learnt."""
        named = {
            f"{number}.{name}": part for number, parts in enumerate(self._arrays()) for name, part in parts.items()
        }
        tuned = {f"tuned.{name}": weight for name, weight in self._tuned_weights().items()}
        return weights_sha256({**self.network.state_dict(), **named, **tuned})

    def _tuned_weights(self) -> dict[str, Tensor]:
        """On the CPU; none where there is no tuned backbone."""
        return {name: weight.cpu() for name, weight in self.tuned.state_dict().items()} if self.tuned else {}

    def _arrays(self) -> list[dict[str, Tensor]]:
        """The statistics of each feature map, by name, on the CPU."""
        named = [
            {"centre": part.centre, "scale": part.scale, "mean": part.places.mean, "std": part.places.std}
            for part in self.statistics
        ]
        return [{name: value.cpu() for name, value in parts.items()} for parts in named]

    def content(self) -> dict:
        """All of it as plain values and tensors on the CPU, for `rebuild`."""
        weights = {name: weight.cpu() for name, weight in self.network.state_dict().items()}
        learnt = {"statistics": self._arrays(), "weights": weights, "tuned": self._tuned_weights()}
        return {"belongs_to": self.belongs_to, "settings": asdict(self.settings), **learnt}

    def save(self, path: Path) -> None:
        """One file, which `load` reads without unpickling anything."""
        save_checkpoint(path, "reader", self.content())

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Reader":
        """From a file; UsageError if it is missing, damaged, or needs a backbone that is not installed."""
        return cls.rebuild(stored_reader(Path(path)), device)

    @classmethod
    def rebuild(cls, content: dict, device: torch.device | str = "cpu") -> "Reader":
        """From what `stored_reader` read; UsageError if another version wrote it."""
        try:
            settings = rebuild_phase(ReaderConfig, BEFORE | content["settings"])
            statistics = [
                FeatureStatistics(part["centre"], part["scale"], PixelStatistics(part["mean"], part["std"]))
                for part in content["statistics"]
            ]
            network = ReaderEnsemble.untrained([part.centre.shape[1] for part in statistics], settings)
            network.load_state_dict(content["weights"])
            tuned = TunedBackbone() if content["tuned"] else None
            if tuned is not None:
                tuned.load_state_dict(content["tuned"])
        except (KeyError, TypeError, RuntimeError) as error:  # the right kind of file, and another version's
            raise UsageError("the reader is of another version or damaged: remove it, it is trained anew") from error
        for learnt in (network, tuned) if tuned else (network,):
            learnt.to(device).requires_grad_(False).eval()
        statistics = [part.to(device) for part in statistics]
        return cls(network, statistics, FeatureExtractor(settings, device), content["belongs_to"], tuned)


def stored_reader(path: Path) -> dict:
    """What a reader's file holds, so that one can ask whose it is before building it; UsageError if it is damaged."""
    content = load_checkpoint(path, "reader", f"python inference.py after removing {path.name}")
    if not isinstance(content.get("belongs_to"), dict):
        raise UsageError(f"{path} is damaged: run python inference.py after removing {path.name}")
    return content
