"""Differentiable image operators, the same for the VAE loss and for the anomaly map.

Images are (B, C, H, W) in any floating type and on any device; H is the y axis and W the x axis, in pixels. One border
rule holds everywhere: the image goes on with its edge pixel (replicate padding, `mode="nearest"` in SciPy), so a
constant image has no gradient anywhere, the border included. Every operator is linear and acts on each channel alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _pad(x: Tensor, dx: int, dy: int) -> Tensor:
    """Replicate dx pixels on the left and right, dy at the top and bottom."""
    return F.pad(x, (dx, dx, dy, dy), mode="replicate")


def gradient(x: Tensor) -> Tensor:
    """Sobel gradient per pixel: (B, C, H, W) to (B, 2C, H, W), first d/dx of every channel, then d/dy of every channel.

    Divided by 8: an image rising by 1 per pixel has gradient 1 (half of it on the border, where one neighbour repeats).
    """
    padded = _pad(x, 1, 1)
    # Slices instead of a convolution: autocast leaves them in the type of x, and small differences survive.
    difference_x = padded[..., :, 2:] - padded[..., :, :-2]
    difference_y = padded[..., 2:, :] - padded[..., :-2, :]
    dx = difference_x[..., :-2, :] + 2 * difference_x[..., 1:-1, :] + difference_x[..., 2:, :]
    dy = difference_y[..., :, :-2] + 2 * difference_y[..., :, 1:-1] + difference_y[..., :, 2:]
    return torch.cat([dx, dy], dim=1) / 8


def laplacian(x: Tensor) -> Tensor:
    """Sum of the 4 neighbours minus 4 times the pixel, in the same shape: `scipy.ndimage.laplace`, mode "nearest"."""
    padded = _pad(x, 1, 1)
    across = padded[..., 1:-1, 2:] + padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] + padded[..., :-2, 1:-1]
    return across + down - 4 * x


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian of sigma pixels, cut at 4 sigma: `scipy.ndimage.gaussian_filter`, mode "nearest".

    Sigma 0 returns x.
    """
    if sigma < 0:
        raise ValueError(f"the blur needs sigma >= 0 pixels, got {sigma}: use 0 for no blur")
    if math.floor(4 * sigma + 0.5) == 0:
        return x
    with torch.autocast(x.device.type, enabled=False):  # a matrix product would otherwise round to half precision
        return _blur_matrix(x.shape[-2], sigma, x) @ x @ _blur_matrix(x.shape[-1], sigma, x).T


def _blur_matrix(size: int, sigma: float, like: Tensor) -> Tensor:
    """The blur of one line as a matrix (size, size): ten times faster than a convolution per channel."""
    radius = math.floor(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=like.device)
    kernel = torch.softmax(-offsets.to(like.dtype).square() / (2 * sigma**2), dim=0)  # exp(...) divided by its sum
    places = torch.arange(size, device=like.device)[:, None] + offsets
    sources = places.clamp(0, size - 1)  # replicated edge pixels add up
    matrix = torch.zeros(size, size, dtype=like.dtype, device=like.device)
    return matrix.scatter_add(1, sources, kernel.expand_as(sources))


def residual_components(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Residuals per pixel between x and y = G(x), both (B, C, H, W): l1, gradient and hf, each (B, 1, H, W) and >= 0.

        l1 = |x - y|        gradient = |grad x - grad y|        hf = |Laplacian x - Laplacian y|

    Each is a mean over the channels, the gradient's also over its two directions. So the mean over the pixels of a
    component is the L1 distance of what it compares, which is the term of that name in the VAE loss.
    """
    if x.shape != y.shape:
        raise ValueError(
            f"x and G(x) must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}: resize one to the other first"
        )
    residual = x - y  # the operators are linear: one pass over the residual replaces one over each image
    return tuple(part.abs().mean(dim=1, keepdim=True) for part in (residual, gradient(residual), laplacian(residual)))
