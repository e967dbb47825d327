"""One step of phase 3: latents with all their randomness, the same however many processes share it."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from config import Config
from flowdiff_loss import identity_places, stratified_times
from latent_dataset import LatentDataset
from runtime import generator, own_part, step_batches, step_loader

RESIDENT = ("cuda",)  # devices whose memory is not the one that files are mapped into


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
    rows = torch.tensor([places[order] % len(z) for order in own], dtype=torch.long)
    seen = z.index_select(0, rows.to(z.device, non_blocking=True))
    parts = (part.to(accelerator.device, non_blocking=True) for part in (z, noise, t, seen, walks[own]))
    return Batch(*parts, seen_weight=len(own) * ranks / len(places))


def latent_batches(
    latents: LatentDataset, steps: tuple[int, int], config: Config, accelerator: Accelerator
) -> Iterable[Tensor]:
    """The latents z (B, C, h, w) of the steps after steps[0] up to steps[1].

    From the memory of a GPU where all of them fit into flowdiff.device_gb, else read from the disk.
    """
    settings, device = config.flowdiff, accelerator.device
    if device.type not in RESIDENT or latents.raw.nbytes > settings.device_gb * 2**30:
        return step_loader(latents, settings.batch_size, steps, config, accelerator)
    return _resident_batches(latents, steps, config, accelerator)


def _resident_batches(
    latents: LatentDataset, steps: tuple[int, int], config: Config, accelerator: Accelerator
) -> Iterator[Tensor]:
    everyone = latents.on(accelerator.device)
    for keys in step_batches(latents, config.flowdiff.batch_size, steps, config, accelerator):
        rows = torch.tensor([row for _, row in keys])
        yield everyone.index_select(0, rows.to(everyone.device, non_blocking=True))
