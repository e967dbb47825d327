"""Part: an image moved, exposed anew and made noisy: on the host, or a whole batch of them on its device.

The numbers of an image follow from a NumPy generator alone and are drawn on the host, in one order, wherever they are
applied. There albumentations moves (cv2); a batch is moved by `images_of` and `masks_of`, as tensors:

dataset.augmented(on_device(config, device))        its items bring their numbers, if that is True
x = images_of(batch, device)                        and here they are applied

Where a pixel comes from is known in float64. `images_of` reads between pixels in float32: at 256 x 512 it is at most
2e-4 off exact arithmetic in white noise, 3e-5 in a phantom, 1e-5 in a smooth image, in units of [-1, 1], and so far off
the host, too. OpenCV 4 on the host reads at the nearest 1/32 of a pixel: 0.06, 0.01 and 0.003 off.
"""

import os
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional as F

from config import WHEREABOUTS, DataConfig
from runtime import plain, without

AUGMENTING = ("cuda",)  # devices that augment where data.augment_on is auto; a CPU is quicker by albumentations
Grey = TypeVar("Grey", np.ndarray, Tensor)


class Draws(NamedTuple):
    """The random numbers of one image."""

    motion: int  # seed of flip, rotation, shift and zoom
    exposure: tuple[float, float, float]  # gain, offset, exponent
    noise: np.ndarray  # (H, W), float32, what is added at last


class Numbers(NamedTuple):
    """The same as tensors, of an image or, with one more axis in front, of a batch; all float32."""

    source: Tensor  # (2, 3): where a pixel comes from, in the coordinates of grid_sample
    exposure: Tensor  # (3,): gain, offset, exponent
    noise: Tensor  # (1, H, W)


class Augmentation:
    """What a config does to images."""

    def __init__(self, config: DataConfig):
        self.config = config
        self._motion = None

    def draw(self, shape: tuple[int, int], random: np.random.Generator) -> Draws:
        """The numbers of an image (H, W)."""
        config = self.config
        motion, numbers = int(random.integers(2**31)), exposure(config, random)
        noise = random.uniform(0, config.noise_std) * random.standard_normal(shape, np.float32)
        return Draws(motion, numbers, noise)

    def on_host(self, image: np.ndarray, mask: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Move image and mask (H, W) together, then change the grey levels of the image."""
        moved = self._seeded(draws)(image=image[..., None], mask=mask)
        x = exposed(moved["image"][..., 0], *draws.exposure) + draws.noise
        return np.clip(x, -1, 1).astype(np.float32), moved["mask"]

    def numbers(self, draws: Draws) -> Numbers:
        """What `images_of` and `masks_of` need to do the same."""
        shape = draws.noise.shape
        flip, move = self._seeded(draws).transforms
        flips = flip.should_apply()
        matrix = move.get_params_dependent_on_data({"shape": shape}, {})["matrix"]  # of pixels (x, y), 3 x 3, as in cv2
        source = normalized(np.linalg.inv(matrix), shape)
        if flips:
            source[0] *= -1  # the image was mirrored before it moved
        source = torch.tensor(source[:2], dtype=torch.float32)
        return Numbers(source, torch.tensor(draws.exposure), torch.from_numpy(draws.noise[None]))

    def _seeded(self, draws: Draws):
        if self._motion is None:
            self._motion = _motion(self.config)
        self._motion.set_random_seed(draws.motion)
        return self._motion


def _motion(config: DataConfig):
    """Flip, rotation, shift and zoom; the uncovered border repeats the edge, since black would draw one of its own."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks the network for its newest version at import
    import albumentations
    import cv2

    shift, scale, rotate = config.shift_share, config.scale_share, config.rotate_degrees
    move = albumentations.Affine(
        scale=(1 - scale, 1 + scale),
        translate_percent=(-shift, shift),
        rotate=(-rotate, rotate),
        keep_ratio=True,
        border_mode=cv2.BORDER_REPLICATE,
        p=1,
    )
    return albumentations.Compose([albumentations.HorizontalFlip(p=0.5 if config.flip else 0), move])


# ---------------------------------------------------------------- grey levels


def exposure(config: DataConfig, random: np.random.Generator) -> tuple[float, float, float]:
    """Gain, offset and exponent of an image."""
    gain = random.uniform(1 - config.contrast, 1 + config.contrast)
    offset = random.uniform(-config.brightness, config.brightness)
    return gain, offset, random.uniform(1 - config.gamma, 1 + config.gamma)


def exposed(x: Grey, gain: float | Tensor, offset: float | Tensor, exponent: float | Tensor) -> Grey:
    """x in [-1, 1] at another contrast, brightness and gamma."""
    return 2 * ((gain * x + offset + 1) / 2).clip(0, 1) ** exponent - 1


def exposed_anew(x: np.ndarray, config: DataConfig, random: np.random.Generator) -> np.ndarray:
    """The radiograph x (H, W) in [-1, 1] at a contrast, brightness and gamma that are drawn."""
    return exposed(x, *exposure(config, random))


def retaken(x: np.ndarray, blur: float, noise: float, random: np.random.Generator) -> np.ndarray:
    """The radiograph x (H, W) in [-1, 1] as a machine that is less sharp and noisier takes it; half of them as it is.

    Up to `blur` (sigma, a share of the height) and `noise` (standard deviation); where both are 0 nothing is drawn.
    """
    if not (blur or noise) or random.random() < 0.5:
        return x
    sigma, spread = x.shape[0] * random.uniform(0, blur), random.uniform(0, noise)
    return degraded(x, sigma, spread * random.standard_normal(x.shape, np.float32))


def degraded(x: np.ndarray, sigma: float, grain: np.ndarray) -> np.ndarray:
    """The radiograph x (H, W) in [-1, 1] blurred by sigma pixels, with `grain` (H, W) added."""
    return np.clip(gaussian_filter(x, sigma) + grain, -1, 1).astype(np.float32)


# ---------------------------------------------------------------- batches


def on_device(config: DataConfig, device: torch.device) -> bool:
    """Whether images are augmented on the device, by data.augment_on."""
    return config.augment_on == "device" or (config.augment_on == "auto" and device.type in AUGMENTING)


def shaping(config: DataConfig, device: torch.device) -> dict:
    """What of the settings shapes the images of a training, as the identity of a run has it.

    Images augmented on the host are what they were when there was no choice, and so is what is said of them.
    """
    settings = without(plain(config), *WHEREABOUTS, "augment_on")
    return {**settings, "augment_on": "device"} if on_device(config, device) else settings


def images_of(batch: dict, device: torch.device) -> Tensor:
    """The images (B, 1, H, W) of a batch on the device, augmented there if they bring their numbers."""
    x = batch["image"].to(device, non_blocking=True)
    if "numbers" not in batch:
        return x
    source, exposure, noise = (each.to(device, non_blocking=True) for each in batch["numbers"])
    gain, offset, exponent = exposure.reshape(-1, 3, 1, 1, 1).unbind(1)
    return (exposed(moved(x, source, "bilinear"), gain, offset, exponent) + noise).clip(-1, 1)


def masks_of(batch: dict, device: torch.device) -> Tensor:
    """The masks (B, 1, H, W), uint8, likewise: every pixel that of the nearest."""
    masks = batch["mask"].to(device, non_blocking=True)
    if "numbers" not in batch:
        return masks
    source = batch["numbers"].source.to(device, non_blocking=True)
    return moved(masks.float(), source, "nearest").to(torch.uint8)


def moved(x: Tensor, source: Tensor, mode: str) -> Tensor:
    """Images (B, 1, H, W) whose pixels come from `source` (B, 2, 3), the edge repeated beyond the border.

    The grid is a sum of products and not affine_grid's product of matrices, which TF32 would round to half a pixel.
    """
    height, width = x.shape[2:]
    across, down = _centres(width, x.device), _centres(height, x.device)[:, None]
    x_of, y_of = source[:, :, None, None].unbind(1)  # (B, 1, 1, 3)
    grid = torch.stack(
        [of[..., 0] * across + of[..., 1] * down + of[..., 2] for of in (x_of, y_of)], -1
    )  # (B, H, W, 2)
    return F.grid_sample(x, grid, mode, padding_mode="border", align_corners=False)


def normalized(matrix: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A map of pixels (x, y), 3 x 3, in the coordinates of grid_sample: -1 and 1 are the outer edges of the image."""
    height, width = shape
    to_unit = np.array([[2 / width, 0, 1 / width - 1], [0, 2 / height, 1 / height - 1], [0, 0, 1]])
    return to_unit @ matrix @ np.linalg.inv(to_unit)


def _centres(size: int, device: torch.device) -> Tensor:
    return (2 * torch.arange(size, dtype=torch.float32, device=device) + 1) / size - 1
