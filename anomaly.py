"""What G changed: the plain formula, named views of the change, and the score of an image.

A view is one function and one name: add the function, list it in VIEWS, and name it in calibration.views of
config_reading.py. Views of an estimate are made once per noise level. All give (B, K, H, W); residuals keep their sign.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from checks import UsageError
from config import CalibrationConfig, InferenceConfig
from image_ops import gaussian_blur, residual_components
from normalizer import Estimate, Examined

View = Callable[[Examined, Estimate, InferenceConfig], Tensor]


def plain_map(x: Tensor, y: Tensor, settings: InferenceConfig) -> Tensor:
    """alpha_l1 |x - y| + beta_grad |grad x - grad y| + gamma_hf |Laplacian x - Laplacian y|, (B, 1, H, W), y = G(x)."""
    l1, gradient, hf = residual_components(x, y)
    return settings.alpha_l1 * l1 + settings.beta_grad * gradient + settings.gamma_hf * hf


def image_score(anomaly_map: Tensor, top_share: float) -> Tensor:
    """Mean of the top_share highest values of each map (B, 1, H, W): (B,).

    A mean over all pixels would drown a lesion, a maximum is noise.
    """
    values = anomaly_map.flatten(1)
    count = max(1, round(top_share * values.shape[1]))
    return values.topk(count, dim=1).values.mean(dim=1)


def blur_share(images: Tensor, share: float) -> Tensor:
    """Gaussian blur (B, C, H, W) whose sigma is a share of the height."""
    return gaussian_blur(images, share * images.shape[-2])


# ---------------------------------------------------------------- views


def vae_residual(seen: Examined) -> Tensor:
    """x - dec(enc(x)): what the autoencoder cannot say, such as metal."""
    return seen.x - seen.reconstruction


def residual(seen: Examined, estimate: Estimate, settings: InferenceConfig) -> Tensor:
    """x - G(x)."""
    return seen.x - estimate.x


def change(seen: Examined, estimate: Estimate, settings: InferenceConfig) -> Tensor:
    """dec(enc(x)) - G(x): without what the autoencoder alone lost."""
    return seen.reconstruction - estimate.x


def formula(seen: Examined, estimate: Estimate, settings: InferenceConfig) -> Tensor:
    """The plain formula between x and G(x)."""
    return plain_map(seen.x, estimate.x, settings)


def formula_of_change(seen: Examined, estimate: Estimate, settings: InferenceConfig) -> Tensor:
    """The plain formula between dec(enc(x)) and G(x)."""
    return plain_map(seen.reconstruction, estimate.x, settings)


def latent_distance(seen: Examined, estimate: Estimate, settings: InferenceConfig) -> Tensor:
    """|z - G(z)|, the mean over the channels: what changed before the decoder can hide it."""
    return enlarge((seen.z - estimate.z).abs().mean(dim=1, keepdim=True), seen.x)


def heads(seen: Examined, estimate: Estimate, settings: InferenceConfig) -> Tensor:
    """How far the two heads disagree, the mean over the channels: neither has learnt what to expect there."""
    return enlarge((estimate.z_diffusion - estimate.z).abs().mean(dim=1, keepdim=True), seen.x)


def latent_change(seen: Examined, estimate: Estimate, settings: InferenceConfig) -> Tensor:
    """z - G(z), channel by channel."""
    return enlarge(seen.z - estimate.z, seen.x)


def enlarge(latent: Tensor, x: Tensor) -> Tensor:
    """A latent quantity at the size of x, bilinear."""
    return F.interpolate(latent, size=x.shape[-2:], mode="bilinear", align_corners=False)


IMAGE_VIEWS = {view.__name__: view for view in (vae_residual,)}  # of the image alone
VIEWS: dict[str, View] = {
    view.__name__: view
    for view in (residual, change, formula, formula_of_change, latent_distance, heads, latent_change)
}


def check_views(names: Sequence[str]) -> None:
    """UsageError for a view that nobody knows."""
    known = [*IMAGE_VIEWS, *VIEWS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"calibration.views: {unknown[0]} is unknown, choose from {', '.join(known)}")


def views_of(seen: Examined, chosen: CalibrationConfig, settings: InferenceConfig) -> dict[str, Tensor]:
    """Every chosen view (B, 1, H, W) under its name and noise level, such as change@0.2 or latent_change.3@0.2."""
    found: dict[str, Tensor] = {}
    for name in chosen.views:
        if name in IMAGE_VIEWS:
            _add_channels(found, name, "", IMAGE_VIEWS[name](seen))
            continue
        for level in chosen.levels:
            _add_channels(found, name, f"@{level:g}", VIEWS[name](seen, seen.estimate(level), settings))
    return found


def _add_channels(found: dict[str, Tensor], name: str, level: str, view: Tensor) -> None:
    for channel, part in enumerate(view.split(1, dim=1)):
        number = f".{channel}" if view.shape[1] > 1 else ""
        found[f"{name}{number}{level}"] = part


def stacked_views(seen: Examined, chosen: CalibrationConfig, settings: InferenceConfig) -> Tensor:
    """The views side by side, (B, V, H, W), in the order of their names."""
    return torch.cat(list(views_of(seen, chosen, settings).values()), dim=1)
