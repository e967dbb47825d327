"""How the segmenter learns: to mark what changed in crops of corrupted normals, each drawn when its turn comes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import Config
from corrupted_normals import CorruptedCrops
from files import load_checkpoint, save_checkpoint
from runtime import learning_rate, stream_seed, training_precision
from segmenter import Segmenter


def train_segmenter(
    images: Sequence[np.ndarray], config: Config, identity: dict, last: Path, device: torch.device
) -> Segmenter:
    """The segmenter after reader.segmenter_steps steps of binary cross-entropy; `last` is what a killed one left."""
    settings = config.reader
    torch.manual_seed(stream_seed(config.runtime.seed, "segmenter", "weights"))
    network = Segmenter(settings.width).to(device).train()
    old = list(network.backbone.parameters())
    known = {id(parameter) for parameter in old}
    new = [parameter for parameter in network.parameters() if id(parameter) not in known]
    rates = (settings.backbone_lr, settings.lr)
    groups = [{"params": part, "lr": rate} for part, rate in zip((old, new), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    begun, steps = 0, settings.segmenter_steps
    if config.runtime.resume and last.is_file():
        stored = load_checkpoint(last, "segmenter training", "python inference.py --runtime.resume False")
        if stored["identity"] == identity:
            network.load_state_dict(stored["weights"])
            optimizer.load_state_dict(stored["optimizer"])
            begun = stored["step"]
    crops = DataLoader(
        CorruptedCrops(images, config),
        batch_size=settings.crops,
        sampler=range(begun * settings.crops, steps * settings.crops),
        num_workers=config.data.num_workers if begun < steps else 0,
    )
    weight = torch.tensor(settings.positive_weight, device=device)
    running = None
    progress = tqdm(crops, desc="reader: segmenter", initial=begun, total=steps, unit="step")
    for step, (image, changed, places) in enumerate(progress, begun):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = learning_rate(step, rate, settings.lr_warmup_steps, steps)
        with autocast(config, device):
            _, logits = network(image.to(device), places.to(device))
        share = F.adaptive_avg_pool2d(changed.to(device), logits.shape[-2:])
        loss = F.binary_cross_entropy_with_logits(logits.float(), share, pos_weight=weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            now = float(loss.detach())
            running = now if running is None else 0.9 * running + 0.1 * now
            progress.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == steps:
            state = {"weights": network.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(last, "segmenter training", {"identity": identity, "step": step + 1, **state})
    return network.requires_grad_(False).eval()


def precision_of_training(config: Config, device: torch.device) -> str:
    """What networks are computed in while they learn: bf16 or no; they are read in float32."""
    return training_precision(config.runtime, device.type == "cpu")


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The same as a context."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision_of_training(config, device) == "bf16")
