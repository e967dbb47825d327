"""The learned reading of what G changed: how likely a place looks as if it did not belong.

A network sees the radiograph, through a backbone with ImageNet weights, and feature maps of G (`features.py`), each as
it is and as a deviation from what training normals show at that place. It learns on corrupted normals
(`reader_training.py`), as in DRAEM (Zavrtanik et al. 2021); what it reads is a generative normalizer.

    reader = Reader.load("outputs/calibration/reader.pt")
    logits = reader.logits(G.examine(detail, reader.settings.magnification))     (B, 1, k H, k W)
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone import CHANNELS, STRIDES, Backbone
from config import rebuild_phase
from config_reading import ReaderConfig
from features import FeatureExtractor
from files import load_checkpoint, save_checkpoint, weights_sha256
from normalizer import Examined
from standardization import PixelStatistics, pixel_statistics


@dataclass(frozen=True)
class FeatureStatistics:
    """Of one feature map over training normals: per channel (1, F, 1, 1), and per place (1, F, h, w)."""

    centre: Tensor
    scale: Tensor
    places: PixelStatistics

    @classmethod
    def of(cls, total: Tensor, squares: Tensor, count: int, settings: ReaderConfig) -> "FeatureStatistics":
        """From the sums over `count` normals of the map and of its square, both float64 (1, F, h, w)."""
        centre = (total / count).mean(dim=(2, 3), keepdim=True)
        spread = (squares / count).mean(dim=(2, 3), keepdim=True) - centre.square()
        least = 2**-8 * centre.abs() + 1e-6  # what half precision cannot tell apart is no spread
        scale = spread.clamp_min(0).sqrt().clamp_min(least)
        places = pixel_statistics(total, squares, count, settings)
        places = PixelStatistics(places.mean.float(), places.std.clamp_min(least).float())
        return cls(centre.float(), scale.float(), places)

    def standardize(self, values: Tensor, largest: float) -> Tensor:
        """(B, F, h, w) to (B, 2F, h, w): in units of the channel, and of the place."""
        plain = (values - self.centre) / self.scale
        return torch.cat([plain, self.places.standardize(values)], dim=1).clamp(-largest, largest)

    def to(self, device: torch.device | str) -> "FeatureStatistics":
        """The same on another device."""
        places = PixelStatistics(self.places.mean.to(device), self.places.std.to(device))
        return FeatureStatistics(self.centre.to(device), self.scale.to(device), places)


class ReaderNetwork(nn.Module):
    """A backbone's view of the radiograph and maps of G to one logit per place: a feature pyramid (Lin et al. 2017).

    Every map enters at its own resolution, and what is known there is handed down to the next finer one. The batch
    normalization of the backbone keeps the statistics of ImageNet: a batch holds too few radiographs for its own.
    """

    def __init__(self, maps: list[tuple[int, int]], settings: ReaderConfig):
        """maps: of each map of G its channels, and how many places of the grid one of its own spans to each side."""
        super().__init__()
        width, self.stride = settings.width, settings.stride
        self.spans = [span for _, span in maps]
        self.backbone = Backbone().requires_grad_(True) if settings.backbone != "none" else None
        felt = CHANNELS if self.backbone is not None else ()
        self.felt_spans = [max(1, stride // self.stride) for stride in STRIDES[: len(felt)]]
        self.drop = nn.Dropout2d(settings.dropout)
        self.enter = nn.ModuleList([nn.Conv2d(2 * count, width, 1) for count, _ in maps])
        self.enter_felt = nn.ModuleList([nn.Conv2d(count, width, 1) for count in felt])
        self.place = nn.Conv2d(2, width, 1)
        self.levels = sorted({1, *self.spans, *self.felt_spans}, reverse=True)
        self.mix = nn.ModuleList([nn.Sequential(nn.GELU(), _convolution(width)) for _ in self.levels])
        self.body = nn.Sequential(nn.GELU(), _convolution(width), nn.GELU(), nn.Conv2d(width, 1, 1))
        nn.init.constant_(self.body[-1].bias, -3.0)  # few places are foreign

    def train(self, mode: bool = True) -> "ReaderNetwork":
        """As every module, but batch normalization stays as it is."""
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()
        return self

    def forward(self, detail: Tensor, features: list[Tensor]) -> Tensor:
        """Logits (B, 1, h, w) from radiographs (B, 1, k H, k W) and standardized maps of G, each (B, 2F, ., .)."""
        rows, columns = (size // self.stride for size in detail.shape[-2:])
        entered = {level: [] for level in self.levels}
        for enter, part, span in zip(self.enter, features, self.spans, strict=True):
            entered[span].append(enter(self.drop(part)))
        felt = self.backbone(detail) if self.backbone is not None else []
        for enter, part, span in zip(self.enter_felt, felt, self.felt_spans, strict=True):
            entered[span].append(enter(F.adaptive_avg_pool2d(part, (rows // span, columns // span))))
        coarsest = rows // self.levels[0], columns // self.levels[0]
        hidden = self.place(positions(coarsest, detail.device)).expand(len(detail), -1, -1, -1)
        for level, mix in zip(self.levels, self.mix, strict=True):
            size = rows // level, columns // level
            hidden = F.interpolate(hidden, size=size, mode="bilinear", align_corners=False)
            for part in entered[level]:
                hidden = hidden + part
            hidden = hidden + mix(hidden)
        return self.body(hidden)


def _convolution(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, padding=1)


def positions(size: tuple[int, int], device: torch.device | str) -> Tensor:
    """Where each place of a grid of this size lies, row and column in [-1, 1]: (1, 2, h, w)."""
    rows = torch.linspace(-1, 1, size[0], device=device).reshape(1, 1, -1, 1).expand(1, 1, *size)
    columns = torch.linspace(-1, 1, size[1], device=device).reshape(1, 1, 1, -1).expand(1, 1, *size)
    return torch.cat([rows, columns], dim=1)


@dataclass(frozen=True)
class Reader:
    """The trained network with everything it needs."""

    network: ReaderNetwork
    statistics: list[FeatureStatistics]
    extractor: FeatureExtractor
    belongs_to: dict  # hashes of both checkpoints, and what the reader was trained with

    @classmethod
    def untrained(
        cls, statistics: list[FeatureStatistics], rows: int, settings: ReaderConfig, belongs_to: dict
    ) -> "Reader":
        """For maps with these statistics, on a grid of so many rows of verdicts."""
        maps = [(part.centre.shape[1], rows // part.places.mean.shape[2]) for part in statistics]
        extractor = FeatureExtractor(settings)
        return cls(ReaderNetwork(maps, extractor.settings), statistics, extractor, belongs_to)

    @property
    def settings(self) -> ReaderConfig:
        """What it was trained with."""
        return self.extractor.settings

    def verdict(self, seen: Examined) -> Tensor:
        """How foreign each place looks, log-odds, (B, 1, h, w); gradients reach the network and nothing before it."""
        maps, largest = self.extractor(seen), self.settings.largest_deviation
        inputs = [known.standardize(part, largest) for known, part in zip(self.statistics, maps, strict=True)]
        return self.network(seen.detail, inputs)

    @torch.no_grad()
    def logits(self, seen: Examined) -> Tensor:
        """The same for each pixel of the magnified image, (B, 1, k H, k W)."""
        return F.interpolate(self.verdict(seen), size=seen.detail.shape[-2:], mode="bilinear", align_corners=False)

    @property
    def sha256(self) -> str:
        """Of everything that was learnt."""
        named = {f"{number}.{name}": part for number, parts in enumerate(self.arrays()) for name, part in parts.items()}
        return weights_sha256({**self.network.state_dict(), **named})

    def arrays(self) -> list[dict[str, Tensor]]:
        """The statistics of each feature map, by name, on the CPU."""
        named = [
            {"centre": part.centre, "scale": part.scale, "mean": part.places.mean, "std": part.places.std}
            for part in self.statistics
        ]
        return [{name: value.cpu() for name, value in parts.items()} for parts in named]

    def save(self, path: Path) -> None:
        """One file, which `load` reads without unpickling anything."""
        weights = {name: weight.cpu() for name, weight in self.network.state_dict().items()}
        learnt = {"statistics": self.arrays(), "spans": self.network.spans, "weights": weights}
        save_checkpoint(path, "reader", {"belongs_to": self.belongs_to, "settings": asdict(self.settings), **learnt})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Reader":
        """From a file; UsageError if it is missing, damaged, or needs a backbone that is not installed."""
        return cls.rebuild(stored_reader(Path(path)), device)

    @classmethod
    def rebuild(cls, content: dict, device: torch.device | str = "cpu") -> "Reader":
        """From what `stored_reader` read."""
        extractor = FeatureExtractor(rebuild_phase(ReaderConfig, content["settings"]))
        statistics = [part.to(device) for part in statistics_of(content["statistics"])]
        counts = (part.centre.shape[1] for part in statistics)
        network = ReaderNetwork(list(zip(counts, content["spans"], strict=True)), extractor.settings)
        network.load_state_dict(content["weights"])
        network.to(device).requires_grad_(False).eval()
        return cls(network, statistics, extractor, content["belongs_to"])


def statistics_of(arrays: list[dict[str, Tensor]]) -> list[FeatureStatistics]:
    """What `Reader.arrays` gave."""
    return [
        FeatureStatistics(part["centre"], part["scale"], PixelStatistics(part["mean"], part["std"])) for part in arrays
    ]


def stored_reader(path: Path) -> dict:
    """What a reader's file holds, so that one can ask whose it is before building it; UsageError if it is damaged."""
    return load_checkpoint(path, "reader", f"python inference.py after removing {path.name}")
