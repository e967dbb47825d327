"""Part: what phase 4 shows of one image of a batch: the six panels of its figure, and the layers of the report."""

from pathlib import Path

import numpy as np
from torch.nn import functional as F

from config import Config
from dataset import Sample
from image_ops import residual_components
from normalizer import Examined
from radiographs.manifest import Record
from reporting.figures import ColourScale, save_result
from reporting.layers import Layers


def title_of(index: int, score: float, p_value: float, threshold: float, record: Record) -> str:
    """The line above a figure."""
    verdict = "flagged" if score > threshold else "not flagged"
    title = f"image {index:03d}  |  score {score:.4f}, threshold {threshold:.4f}, p {p_value:.3f}: {verdict}"
    return f"{title}  |  {record.kind}" if record.kind else title


def draw(
    path: Path,
    seen: Examined,
    position: int,
    anomaly_map: np.ndarray,
    title: str,
    scale: ColourScale,
    mask: np.ndarray | None,
) -> None:
    """result_XXX.png: six panels, the score in the title, the outline where there is a mask."""
    x, normal, detail = (batch[position : position + 1] for batch in (seen.x, seen.normal, seen.detail))
    l1, gradient, _ = residual_components(x, normal)
    larger = [F.interpolate(panel, size=anomaly_map.shape) for panel in (normal, l1, gradient)]
    panels = (panel[0, 0].cpu().numpy() for panel in (detail, *larger))
    save_result(path, *panels, anomaly_map, title, scale, mask)


def layers_of(seen: Examined, position: int, anomaly_map: np.ndarray, sample: Sample, config: Config) -> Layers:
    """What the report shows of one image: squashed ones as wide and as high as their file."""
    shape = sample.original_shape if config.data.fit == "stretch" else (config.data.height, config.data.width)
    original, normal = (images[position, 0].cpu().numpy() for images in (seen.detail, seen.normal))
    return Layers(original, normal, anomaly_map, sample.mask, shape)
