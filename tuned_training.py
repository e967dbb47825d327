"""Part: how the tuned backbone learns: on crops of training normals that are corrupted anew for every step.

Each normal is moved a little before, and no corruption comes twice, so that millions of weights do not learn a few
hundred radiographs by heart. What a step sees follows from its number alone: a training that was killed goes on as if
it had not been.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from augmentation import exposed_anew, retaken
from config import Config
from corruption import corrupt
from interruption import Steps, remember
from last_step import LastStep
from progress import bar
from reader import WHOLE, Crop, cropped, positions
from runtime import EMA, autocast, learning_rate, made_ahead, stream_seed
from tuned_backbone import COARSEST, TunedBackbone

CROPS = 2  # of each corrupted image: to corrupt it takes longer than to cut it


class Lessons(Dataset):
    """What each step learns from: crops, their positions, and where they were changed."""

    def __init__(self, images: Sequence[np.ndarray], config: Config):
        self.images, self.config = images, config
        self.places = positions(images[0].shape, [WHOLE], "cpu")[0]

    def __len__(self) -> int:
        return self.config.reader.tuned_steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Crops (B, 1, H, W), positions (B, 2, H, W), changed (B, 1, H, W) in [0, 1]."""
        random = np.random.default_rng(stream_seed(self.config.runtime.seed, "tuned backbone", step))
        crops = []
        while len(crops) < self.config.reader.crops:
            image, changed = self._lesson(random)
            whole = torch.cat([torch.from_numpy(np.stack([image, changed.astype(np.float32)])), self.places])
            crops += [turned(cropped(whole, _half(image.shape, random)), random) for _ in range(CROPS)]
        batch = torch.stack(crops[: self.config.reader.crops])
        return batch[:, :1], batch[:, 2:], batch[:, 1:2]

    def _lesson(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        image, donor = (self.images[random.integers(len(self.images))] for _ in range(2))
        settings = self.config.reader
        image = moved(np.asarray(image), settings.tuned_turn, settings.tuned_stretch, random)
        if random.random() < 0.5:
            image = exposed_anew(image, self.config.data, random).astype(np.float32)
        changed = np.zeros(image.shape, bool)
        if random.random() >= settings.tuned_unchanged:
            image, changed = corrupt(image, donor, random, settings)
        return retaken(image, settings.machine_blur, settings.machine_noise, random), changed


def moved(image: np.ndarray, turn: float, stretch: float, random: np.random.Generator) -> np.ndarray:
    """Turned by up to `turn` degrees, and each axis stretched or squeezed by up to a share, about the middle."""
    height, width = image.shape
    angle = np.deg2rad(random.uniform(-turn, turn))
    across, down = 1 + random.uniform(-stretch, stretch, 2)
    linear = np.array([[across * np.cos(angle), -down * np.sin(angle)], [across * np.sin(angle), down * np.cos(angle)]])
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    matrix = np.column_stack([linear, middle - linear @ middle])
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def _half(size: tuple[int, int], random: np.random.Generator) -> Crop:
    """Half the height and half the width of an image, where both halves hold whole places of the coarsest map."""
    if size[0] % (2 * COARSEST) or size[1] % (2 * COARSEST):
        return WHOLE
    top, left = (random.integers(side // COARSEST // 2 + 1) * COARSEST / side for side in size)
    return (float(top), float(left), 0.5)


def turned(crop: Tensor, random: np.random.Generator) -> Tensor:
    """Every second (4, H, W) as in a mirror: a jaw has two sides. The last channel is the position across."""
    if random.random() < 0.5:
        return crop
    flipped = crop.flip(-1)
    return torch.cat([flipped[:3], -flipped[3:]])


def fit_tuned(
    images: Sequence[np.ndarray], config: Config, identity: dict, last: Path, device: torch.device
) -> TunedBackbone:
    """The backbone after reader.tuned_steps steps of binary cross-entropy on normals, each float32 (k H, k W).

    Its weights are a moving average of those of the steps. UsageError if it diverged.
    """
    settings, total = config.reader, config.reader.tuned_steps
    torch.manual_seed(stream_seed(config.runtime.seed, "tuned backbone", "weights"))
    network = TunedBackbone().to(device).train()
    groups = [
        {"params": network.new_parameters(), "highest": settings.lr},
        {"params": network.backbone.parameters(), "highest": settings.tuned_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)
    average = EMA(network, settings.ema_decay)
    parts = {"weights": network, "average": average, "optimizer": optimizer}
    kept = LastStep(last, "tuned backbone", identity, parts)
    begun = kept.take_up(config.runtime.resume)
    weight, running = torch.tensor(settings.positive_weight, device=device), None
    loader = made_ahead(Lessons(images, config), range(begun, total), config)
    with bar(total=total, initial=begun, desc="reader: tuning the backbone", unit="step") as progress:
        steps = Steps()
        for step, (crops, places, changed) in enumerate(steps.of(loader), begun):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, group["highest"], settings.lr_warmup_steps, total)
            optimizer.zero_grad()
            with autocast(config.runtime, device):
                logits = network.at_stride_two(crops.to(device), places.to(device)).float()
            target = F.avg_pool2d(changed.to(device), 2)
            loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            average.update(network)
            if step % 50 == 0:
                now = float(loss.detach())
                running = now if running is None else 0.8 * running + 0.2 * now
                progress.set_postfix(loss=f"{running:.4f}", refresh=False)
            progress.update()
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == total or steps.asked:
                kept.write(step + 1)
                remember(f"the same command goes on with the tuned backbone, step {step + 1} of {total}")
    kept.refuse_diverged(f"the tuned backbone diverged: lower reader.tuned_lr, which is {settings.tuned_lr:g}")
    return average.module
