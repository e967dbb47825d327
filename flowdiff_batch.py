"""One step of phase 3: latents with all their randomness, the same however many processes share it."""

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from config import Config
from flowdiff_loss import identity_places, stratified_times
from runtime import generator, own_part


class Batch(NamedTuple):
    """This process's latents of one step with all their randomness, on the device."""

    z: Tensor  # (B, C, h, w)
    noise: Tensor
    t: Tensor  # (B,)
    seen: Tensor  # those of z that the identity loss sees
    walk: Tensor  # the noise of their way out
    seen_weight: float  # so that the mean over all processes is the mean over all that are seen


def draw(z: Tensor, step: int, config: Config, accelerator: Accelerator) -> Batch:
    """Drawn for the batch of all processes together, then parted: how many share it changes nothing."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    whole, shape = len(z) * ranks, z.shape[1:]
    random = generator(config.runtime.seed, "flowdiff", step)
    noise = own_part(torch.randn(whole, *shape, generator=random), accelerator)
    t = own_part(stratified_times(whole, random), accelerator)
    places = identity_places(whole, config.flowdiff.identity_share)
    walks = torch.randn(len(places), *shape, generator=random)
    own = [order for order, place in enumerate(places) if place // len(z) == rank]
    seen = z[[places[order] % len(z) for order in own]]
    parts = (part.to(accelerator.device, non_blocking=True) for part in (z, noise, t, seen, walks[own]))
    return Batch(*parts, seen_weight=len(own) * ranks / len(places))
