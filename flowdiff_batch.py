"""One step of phase 3: latents with all their randomness, the same however many processes share it."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from config import Config
from flowdiff_loss import identity_places, stratified_times
from latent_dataset import LatentDataset
from runtime import generator, own_part, step_batches, step_loader
from tiles import cut, fits, places_of, random_corners

RESIDENT = ("cuda",)  # devices whose memory is not the one that files are mapped into


class Batch(NamedTuple):
    """This process's latents of one step with all their randomness, on the device."""

    z: Tensor  # (B, C, h, w)
    noise: Tensor
    t: Tensor  # (B,)
    seen: Tensor  # those of z that the identity loss sees
    walk: Tensor  # the noise of their way out
    seen_weight: float  # so that the mean over all processes is the mean over all that are seen
    places: tuple[Tensor, ...] = ()  # of tiles, where they lie, (B, 2, h, w)
    seen_places: tuple[Tensor, ...] = ()


def draw(z: Tensor, step: int, config: Config, accelerator: Accelerator) -> Batch:
    """Drawn for the batch of all processes together, then parted: how many share it changes nothing."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    random = generator(config.runtime.seed, "flowdiff", step)
    z, places = tiles_of(z, config.unet.tile, random, rank, ranks)
    whole, shape = len(z) * ranks, z.shape[1:]
    noise = own_part(torch.randn(whole, *shape, generator=random), accelerator)
    t = own_part(stratified_times(whole, random), accelerator)
    chosen = identity_places(whole, config.flowdiff.identity_share)
    walks = torch.randn(len(chosen), *shape, generator=random)
    own = [order for order, place in enumerate(chosen) if place // len(z) == rank]
    rows = torch.tensor([chosen[order] % len(z) for order in own], dtype=torch.long).to(z.device, non_blocking=True)
    seen = z.index_select(0, rows)
    parts = (part.to(accelerator.device, non_blocking=True) for part in (z, noise, t, seen, walks[own]))
    where = [part.to(accelerator.device, non_blocking=True) for part in places]
    seen_where = [part.index_select(0, rows.to(part.device)) for part in where]
    weight = len(own) * ranks / len(chosen)
    return Batch(*parts, seen_weight=weight, places=tuple(where), seen_places=tuple(seen_where))


def tiles_of(
    z: Tensor, side: int, random: torch.Generator, rank: int = 0, ranks: int = 1
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A tile of each latent, anywhere in it, and where it lies; the whole and nothing where the whole is one tile.

    z are those of one of so many processes; what is drawn is drawn for all of them.
    """
    size = z.shape[-2:]
    if fits(size, side):
        return z, ()
    own = random_corners(len(z) * ranks, size, side, random)[rank * len(z) : (rank + 1) * len(z)]
    places = places_of(size, z.device, z.dtype).expand(len(z), -1, -1, -1)
    return cut(z, own, side), (cut(places, own, side),)


def latent_batches(
    latents: LatentDataset, steps: tuple[int, int], config: Config, accelerator: Accelerator
) -> Iterable[Tensor]:
    """The latents z (B, C, h, w) of the steps after steps[0] up to steps[1].

    Where all of them fit into flowdiff.device_gb, from the memory of a GPU, or read by a CPU itself: processes for that
    would take more from it than they save. Else data.num_workers processes read ahead.
    """
    few, kind = latents.raw.nbytes <= config.flowdiff.device_gb * 2**30, accelerator.device.type
    if few and kind in RESIDENT:
        return _resident_batches(latents, steps, config, accelerator)
    if few and kind == "cpu":
        config = replace(config, data=replace(config.data, num_workers=0))
    return step_loader(latents, config.flowdiff.batch_size, steps, config, accelerator)


def _resident_batches(
    latents: LatentDataset, steps: tuple[int, int], config: Config, accelerator: Accelerator
) -> Iterator[Tensor]:
    everyone = latents.on(accelerator.device)
    for keys in step_batches(latents, config.flowdiff.batch_size, steps, config, accelerator):
        rows = torch.tensor([row for _, row in keys])
        yield everyone.index_select(0, rows.to(everyone.device, non_blocking=True))
