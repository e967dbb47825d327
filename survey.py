"""One look at all validation normals: what the calibration is made of, and it lies on disk, however many they are."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anomaly import blur_share, plain_map, views_of
from checks import UsageError
from config import Config
from image_ops import residual_components
from normalizer import Examined, Normalizer
from progress import bar
from radiographs.geometry import content
from reader import Reader
from scratch import nameless_array
from typical import summary_of

CALM = 0.016  # blur of a map beside the reader's, a share of the height: about as wide as metal, chosen with its weight
Content = tuple[slice, slice]  # the rows and columns that show a radiograph, and not what "pad" added
COLOUR_QUANTILE = 0.999  # of normal pixels; a colour bar ends at twice that: normals stay dark, a lesion has room above


@dataclass(frozen=True)
class Survey:
    """What one look at all validation normals gives."""

    shown: Tensor  # plain maps or logits (N, 1, H, W), or views (N, V, H, W) in half precision
    names: tuple[str, ...]  # of the views
    beside: Tensor | None  # the maps that a score hears beside the reader's (N, 2, H, W)
    l1: float  # what all but a thousandth of the pixels of a normal stay below, the mean over normals
    gradient: float
    identity_error: float  # mean |x - G(x)|
    vae_error: float  # mean |x - dec(enc(x))|
    latents: np.ndarray  # their summaries (N, 2C)


def contents_of(shapes: list[tuple[int, int]] | None, count: int, config: Config, times: int = 1) -> list[Content]:
    """Of files of these shapes what is theirs in an image, `times` enlarged; all of it where nobody knows the files."""
    if shapes is None:
        return [(slice(None), slice(None))] * count
    data = config.data
    return [content(shape, data.height, data.width, data.fit, times) for shape in shapes]


def look_at(
    model: Normalizer,
    images: np.ndarray,
    config: Config,
    reader: Reader | None,
    shapes: list[tuple[int, int]] | None = None,
) -> Survey:
    """Examine all normals (N, k H, k W) of files of these shapes once; UsageError where a map is not a number."""
    method, size = config.inference.method, config.inference.batch_size
    magnification = magnification_of(config)
    shown, beside = _Rows(len(images), config), _Rows(len(images), config)
    names, numbers, latents, contents = (), [], [], contents_of(shapes, len(images), config)
    with bar(total=len(images), desc="validation normals", unit="image") as progress:
        for first in range(0, len(images), size):
            batch = torch.from_numpy(np.asarray(images[first : first + size])).unsqueeze(1)
            seen = model.examine(batch, magnification)
            if method == "plain":
                shown.add(plain_map(seen.x, seen.normal, config.inference))
            elif method == "reader":
                shown.add(reader.logits(seen).half())
                beside.add(maps_beside(seen, config).half())
            else:
                views = views_of(seen, config.calibration, config.inference)
                names = tuple(views)
                shown.add(torch.cat(list(views.values()), dim=1).half())
            numbers.append(_numbers(seen, contents[first : first + size]))
            latents.append(summary_of(seen.z.cpu().numpy()))
            progress.update(len(batch))
    means = torch.cat(numbers).mean(0).tolist()
    return Survey(shown.tensor(), names, beside.tensor(), *means, np.concatenate(latents))


class _Rows:
    """Batches (B, V, H, W) on their way to one tensor (N, V, H, W) that lies on disk."""

    def __init__(self, count: int, config: Config):
        self.count, self.folder = count, config.inference.calibration
        self.array, self.filled = None, 0

    def add(self, batch: Tensor) -> None:
        if not torch.isfinite(batch).all():
            raise UsageError("maps of normals are not numbers: a network has diverged, look at the curves of its phase")
        rows = batch.cpu().numpy()
        if self.array is None:
            self.array = nameless_array(self.folder, rows.dtype, (self.count, *rows.shape[1:]))
        self.array[self.filled : self.filled + len(rows)] = rows
        self.filled += len(rows)

    def tensor(self) -> Tensor | None:
        return None if self.array is None else torch.from_numpy(self.array)


def maps_beside(seen: Examined, config: Config) -> Tensor:
    """The plain formula and what the autoencoder lost, without their speckle, (B, 2, H, W) at the model's size."""
    lost = (seen.x - seen.reconstruction).abs()
    return blur_share(torch.cat([plain_map(seen.x, seen.normal, config.inference), lost], dim=1), CALM)


def magnification_of(config: Config) -> int:
    """How many times the model's size the images are that the method looks at."""
    return config.reader.magnification if config.inference.method == "reader" else 1


def _numbers(seen: Examined, contents: list[Content]) -> Tensor:
    """Of each image (B, 4): the ends of l1 and of gradient, the identity error, the error of the autoencoder alone."""
    l1, gradient, _ = residual_components(seen.x, seen.normal)
    parts = [part.cpu().numpy() for part in (l1, gradient, (seen.x - seen.reconstruction).abs())]
    rows = []
    for index, (down, across) in enumerate(contents):
        l1, gradient, alone = (part[index, 0, down, across] for part in parts)
        ends = [np.quantile(part, COLOUR_QUANTILE) for part in (l1, gradient)]
        rows.append([*ends, l1.mean(), alone.mean()])
    return torch.tensor(np.array(rows), dtype=torch.float32)
