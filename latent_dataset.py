""".npy of phase 2 to standardized latents z, with the exact inverse.

Standardized means: mean 0 and standard deviation 1 per channel over the training latents. The two numbers per channel are in
latents.json and from there travel in the phase-3 checkpoint, so that no phase has to guess the scale.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from config import UsageError


@dataclass(frozen=True)
class LatentStandard:
    """Per-channel mean and standard deviation of the raw training latents."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def standardize(self, raw: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) or (C, h, w) to zero mean, unit variance."""
        return (raw - self._column(self.mean, raw)) / self._column(self.std, raw)

    def raw(self, z: Tensor) -> Tensor:
        """The inverse of `standardize`: what the decoder expects."""
        return z * self._column(self.std, z) + self._column(self.mean, z)

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(-1, 1, 1)


def read_latents_json(folder: Path | str) -> dict:
    """What phase 2 said of its latents; UsageError if phase 2 has not finished."""
    path = Path(folder) / "latents.json"
    if not path.is_file():
        raise UsageError(f"{path} is missing: run python extract_latents.py first")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): run python extract_latents.py again") from error


class LatentDataset(Dataset):
    """Standardized latents of one split, read from the memory-mapped file one row at a time; keys are rows or (epoch, row)."""

    def __init__(self, folder: Path | str, split: str):
        path = Path(folder) / f"latents_{split}.npy"
        description = read_latents_json(folder)
        if not path.is_file():
            raise UsageError(f"{path} is missing: run python extract_latents.py first")
        try:
            self.raw = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UsageError(f"{path} is damaged ({error}): run python extract_latents.py again") from error
        expected = (description["rows"][split], *description["shape"])
        if self.raw.shape != expected:
            raise UsageError(
                f"{path} has shape {self.raw.shape}, latents.json says {expected}: run python extract_latents.py again"
            )
        self.standard = LatentStandard(tuple(description["mean"]), tuple(description["std"]))

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, key: int | tuple[int, int]) -> Tensor:
        row = key[1] if isinstance(key, tuple) else key
        return self.standard.standardize(torch.from_numpy(np.array(self.raw[row])))
