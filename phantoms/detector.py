"""From attenuation to grey: the scanner's blur, its grain, and the display curve."""

import numpy as np
from scipy.ndimage import gaussian_filter

from phantoms.canvas import Canvas, Scene


def expose(scene: Scene, numbers: dict[str, float], canvas: Canvas) -> np.ndarray:
    """Attenuation (H, W) as the scanner sees it: summed over the layers and blurred."""
    blur = numbers["blur"]
    return gaussian_filter(scene.total, (blur * canvas.height, blur * canvas.width / 2), truncate=3)


def draw_grain(attenuation: np.ndarray, numbers: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    """The attenuation with quantum noise: the fewer photons pass, the larger the relative error."""
    grain = gaussian_filter(rng.standard_normal(attenuation.shape), 0.45).astype(np.float32)
    return attenuation + numbers["noise"] * np.exp(np.minimum(attenuation, 2) / 2) * grain


def develop(attenuation: np.ndarray, numbers: dict[str, float]) -> np.ndarray:
    """Display curve from attenuation to grey in [0, 1]: window, gamma, and a shoulder that saturates on metal."""
    window = (attenuation + 0.02 + numbers["exposure"]) * 0.74 * numbers["contrast"]
    grey = np.clip(window, 0, None) ** numbers["gamma"]
    return (grey / (1 + grey**5) ** 0.2).astype(np.float32)
