"""The part "augmentation" of speed.py: images augmented one by one on the host, and as a batch on the device."""

import dataclasses
from itertools import count

from accelerate import Accelerator
from speed_work import IMAGES, images_in_memory
from stopwatch import Work
from torch import Tensor
from torch.utils.data import default_collate

from augmentation import images_of
from config import Config


def augmentations(config: Config, accelerator: Accelerator) -> dict[str, Work]:
    """What one loading process and the device do for a batch of images twice as wide as high.

    The last row is what a batch on the device leaves to the host: images as they are, and random numbers.
    """
    data = dataclasses.replace(config.data, width=2 * config.data.height)
    images, batch = images_in_memory(dataclasses.replace(config, data=data)), config.vae.batch_size
    name = f"{data.height} x {data.width}"

    def work(on_device: bool, applied: bool = True) -> Work:
        dataset, epochs = images.augmented(on_device), count()

        def step() -> dict | Tensor:
            epoch = next(epochs)
            collated = default_collate([dataset[epoch, index % IMAGES] for index in range(batch)])
            return images_of(collated, accelerator.device) if applied else collated

        return Work(step, batch)

    return {
        f"{name}, on the host": work(False),
        f"{name}, as a batch on the device": work(True),
        f"{name}, the host's part of that": work(True, applied=False),
    }
