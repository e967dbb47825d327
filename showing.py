"""Part: what phase 4 shows of one image of a batch: the six panels of its figure, and the layers of the report."""

import numpy as np
from torch.nn import functional as F

from config import Config
from dataset import Sample
from image_ops import residual_components
from normalizer import Examined
from radiographs.manifest import Record
from reporting.layers import Layers


def title_of(index: int, score: float, p_value: float, threshold: float, record: Record) -> str:
    """The line above a figure."""
    verdict = "flagged" if score > threshold else "not flagged"
    title = f"image {index:03d}  |  score {score:.4f}, threshold {threshold:.4f}, p {p_value:.3f}: {verdict}"
    return f"{title}  |  {record.kind}" if record.kind else title


def panels_of(seen: Examined, position: int, anomaly_map: np.ndarray) -> list[np.ndarray]:
    """What result_XXX.png shows: original, G(x), L1 component, gradient component and the map, all of its size."""
    x, normal, detail = (batch[position : position + 1] for batch in (seen.x, seen.normal, seen.detail))
    l1, gradient, _ = residual_components(x, normal)
    larger = [F.interpolate(panel, size=anomaly_map.shape) for panel in (normal, l1, gradient)]
    return [*(panel[0, 0].cpu().numpy() for panel in (detail, *larger)), anomaly_map]


def layers_of(seen: Examined, position: int, anomaly_map: np.ndarray, sample: Sample, config: Config) -> Layers:
    """What the report shows of one image: squashed ones as wide and as high as their file."""
    shape = sample.original_shape if config.data.fit == "stretch" else (config.data.height, config.data.width)
    original, normal = (images[position, 0].cpu().numpy() for images in (seen.detail, seen.normal))
    return Layers(original, normal, anomaly_map, sample.mask, shape)
