"""From attenuation to grey: the scanner's blur, its grain, and the display curve."""

import numpy as np
from scipy.ndimage import gaussian_filter

from phantoms.canvas import Canvas, Scene


def expose(scene: Scene, numbers: dict[str, float], canvas: Canvas) -> np.ndarray:
    """Attenuation (H, W) as the scanner sees it: summed over the layers and blurred."""
    blur = numbers["blur"]
    return gaussian_filter(scene.total, (blur * canvas.height, blur * canvas.width / 2), truncate=3)


def draw_grain(attenuation: np.ndarray, numbers: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    """The attenuation (H, W) with the noise of a slot scanner: grain that neighbouring pixels share, and faint columns.

    The fewer photons pass, the larger the relative error, hence the root of exp(attenuation).
    """
    white = rng.standard_normal(attenuation.shape, dtype=np.float32)
    coarse = rng.standard_normal(attenuation.shape, dtype=np.float32)
    columns = rng.standard_normal((1, attenuation.shape[1]), dtype=np.float32)
    grain = 0.85 * _correlated(white, 0.6) + 0.5 * _correlated(coarse, 1.4) + 0.15 * columns
    strength = numbers["noise"] * np.exp(np.minimum(attenuation, 2) / 2)
    return attenuation + strength * grain


def _correlated(white: np.ndarray, sigma: float) -> np.ndarray:
    """White noise smoothed over `sigma` pixels, at unit spread again."""
    return gaussian_filter(white, sigma, truncate=3) * np.float32(2 * np.sqrt(np.pi) * sigma)


def develop(attenuation: np.ndarray, numbers: dict[str, float]) -> np.ndarray:
    """Display curve from attenuation to grey in [0, 1]: window, gamma, and a shoulder that saturates on metal."""
    window = (attenuation + 0.02 + numbers["exposure"]) * 0.74 * numbers["contrast"]
    grey = np.clip(window, 0, None) ** numbers["gamma"]
    return (grey / (1 + grey**5) ** 0.2).astype(np.float32)
