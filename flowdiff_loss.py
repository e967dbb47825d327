"""The three terms of phase 3: noise prediction, velocity, identity. Takes callables, imports no network.

    L = lambda_diff L_diff + lambda_flow L_flow + lambda_id(step) L_id

Terms are returned as they enter the total, under the name of their weight, and unweighted under their own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from config import FlowDiffTrainingConfig
from flowdiff_process import Predict, interpolate, velocity_target


@dataclass(frozen=True)
class GenerativeLoss:
    """`total` is a scalar; `diff` and `flow` (B,) are unweighted, per latent, for the bins of t."""

    total: Tensor
    terms: dict[str, Tensor]
    diff: Tensor
    flow: Tensor


def stratified_times(batch: int, generator: torch.Generator) -> Tensor:
    """Times (B,) in [0, 1), each uniform, spread evenly over the batch: less variance than independent draws (Kingma et al. 2021, app. I.1)."""
    return ((torch.rand(1, generator=generator) + torch.arange(batch) / batch) % 1.0)[
        torch.randperm(batch, generator=generator)
    ]


def generative_loss(
    predict: Predict, z: Tensor, noise: Tensor, t: Tensor, config: FlowDiffTrainingConfig
) -> GenerativeLoss:
    """Both heads' squared errors from one forward pass (Ho et al. 2020, eq. 14; Lipman et al. 2023, eq. 9). z, noise (B, C, h, w), t (B,)."""
    noise_hat, velocity_hat = predict(interpolate(z, noise, t), t)
    diff = (noise_hat - noise).square().flatten(1).mean(1)
    flow = (velocity_hat - velocity_target(z, noise)).square().flatten(1).mean(1)
    weighted = {"lambda_diff": config.lambda_diff * diff.mean(), "lambda_flow": config.lambda_flow * flow.mean()}
    terms = {"diff": diff.mean().detach(), "flow": flow.mean().detach()} | {
        name: term.detach() for name, term in weighted.items()
    }
    return GenerativeLoss(sum(weighted.values()), terms, diff.detach(), flow.detach())


def identity_loss(
    normalize: Callable[[Tensor], Tensor], z: Tensor, decode: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """mean |x - G(x)| on normal latents z (B, C, h, w), on decoded images, or on the latents themselves where `decode` is None."""
    z_normal = normalize(z)
    if decode is None:
        return (z - z_normal).abs().mean()
    with torch.no_grad():
        x = decode(z)
    return (x - decode(z_normal)).abs().mean()


def lambda_identity(step: int, config: FlowDiffTrainingConfig) -> float:
    """The curriculum: 0 up to identity_warmup_start, lambda_id_global from identity_warmup_end on, linear between."""
    if step < config.identity_warmup_start:
        return 0.0
    if step >= config.identity_warmup_end:
        return config.lambda_id_global
    share = (step - config.identity_warmup_start) / (config.identity_warmup_end - config.identity_warmup_start)
    return config.lambda_id_global * share


def loss_by_time(t: Tensor, loss: Tensor, name: str, bins: int = 5) -> dict[str, float]:
    """Mean loss in equal bins of t, named such as flow_t0.2-0.4; bins without a sample are left out."""
    found = {}
    for index in range(bins):
        low, high = index / bins, (index + 1) / bins
        inside = (t >= low) & ((t < high) | (index == bins - 1))
        if inside.any():
            found[f"{name}_t{low:.1f}-{high:.1f}"] = float(loss[inside].mean())
    return found
