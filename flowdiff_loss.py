"""The three terms of phase 3: noise prediction, velocity, identity. Takes callables, imports no network.

    L = lambda_diff L_diff + lambda_flow L_flow + lambda_id(step) L_id

A term is logged unweighted as loss_NAME and as it enters the total as weighted_NAME.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from config import FlowDiffTrainingConfig
from flowdiff_process import Predict, interpolate, velocity_target


@dataclass(frozen=True)
class GenerativeLoss:
    """`total` to minimize; `terms` to log: loss_diff and loss_flow, and both weighted."""

    total: Tensor
    terms: dict[str, Tensor]
    diff: Tensor  # (B,), unweighted, per latent, for the bins of t
    flow: Tensor


def stratified_times(batch: int, generator: torch.Generator) -> Tensor:
    """Times (B,) in [0, 1), each uniform, spread evenly over the batch.

    Less variance than independent draws (Kingma et al. 2021, app. I.1).
    """
    times = (torch.rand(1, generator=generator) + torch.arange(batch) / batch) % 1.0
    return times[torch.randperm(batch, generator=generator)]


def generative_loss(
    predict: Predict, z: Tensor, noise: Tensor, t: Tensor, config: FlowDiffTrainingConfig
) -> GenerativeLoss:
    """Both heads' squared errors from one forward pass (Ho et al. 2020, eq. 14; Lipman et al. 2023, eq. 9).

    z and noise are (B, C, h, w), t is (B,).
    """
    noise_hat, velocity_hat = predict(interpolate(z, noise, t), t)
    diff = (noise_hat - noise).square().flatten(1).mean(1)
    flow = (velocity_hat - velocity_target(z, noise)).square().flatten(1).mean(1)
    unweighted = {"loss_diff": diff.mean(), "loss_flow": flow.mean()}
    weighted = {
        "weighted_diff": config.lambda_diff * unweighted["loss_diff"],
        "weighted_flow": config.lambda_flow * unweighted["loss_flow"],
    }
    terms = {name: term.detach() for name, term in (unweighted | weighted).items()}
    return GenerativeLoss(sum(weighted.values()), terms, diff.detach(), flow.detach())


def identity_places(batch: int, share: float) -> list[int]:
    """Which latents of a whole batch the identity loss sees: that share of them, at least one, spread evenly."""
    count = max(1, round(share * batch))
    return [place * batch // count for place in range(count)]


def identity_loss(
    normalize: Callable[[Tensor], Tensor], z: Tensor, decode: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """mean |x - G(x)| on normal latents z (B, C, h, w): on decoded images, or on latents where `decode` is None."""
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


def loss_by_time(t: Tensor, loss: Tensor, name: str, bins: int = 5) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum and number of losses (B,) in equal bins of t (B,), named such as loss_flow_t0.2-0.4; all on the device."""
    place = (t * bins).long().clamp(max=bins - 1)
    sums = torch.zeros(bins, device=t.device, dtype=loss.dtype).index_add_(0, place, loss)
    counts = torch.zeros(bins, device=t.device).index_add_(0, place, torch.ones_like(t))
    names = [f"{name}_t{index / bins:.1f}-{(index + 1) / bins:.1f}" for index in range(bins)]
    return dict(zip(names, zip(sums, counts, strict=True), strict=True))
