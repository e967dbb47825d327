""".npy of phase 2 to standardized latents z, with the exact inverse.

Standardized means: mean 0 and standard deviation 1 per channel over the training latents. The two numbers per channel
are in latents.json and from there travel in the phase-3 checkpoint, so that no phase has to guess the scale.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from checks import UsageError
from files import sha256, unsealed

FORMAT = 3  # of latents.json
KEYS = ("vae_sha256", "sha256", "shape", "rows", "mean", "std", "preprocessing", "split", "members")


@dataclass(frozen=True)
class LatentStandard:
    """Per-channel mean and standard deviation of the raw training latents."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def standardize(self, raw: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) or (C, h, w) to zero mean, unit variance."""
        return (raw - _column(self.mean, raw.dtype, raw.device)) / _column(self.std, raw.dtype, raw.device)

    def raw(self, z: Tensor) -> Tensor:
        """The inverse of `standardize`: what the decoder expects."""
        return z * _column(self.std, z.dtype, z.device) + _column(self.mean, z.dtype, z.device)


@lru_cache
def _column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers per channel as (C, 1, 1), brought to the device once: bringing them stops it."""
    return torch.tensor(values, dtype=dtype, device=device).reshape(-1, 1, 1)


def read_latents_json(folder: Path | str) -> dict:
    """What phase 2 said of its latents; UsageError if phase 2 has not finished."""
    path = Path(folder) / "latents.json"
    if not path.is_file():
        raise UsageError(f"{path} is missing: run python extract_latents.py first")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        found = description.get("format") if isinstance(description, dict) else None
        if found == FORMAT:
            description = unsealed(description)
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): run python extract_latents.py again") from error
    if found != FORMAT:
        raise UsageError(f"{path} has format {found}, this code reads {FORMAT}: run python extract_latents.py again")
    missing = [name for name in KEYS if name not in description]
    if missing:
        raise UsageError(f"{path} lacks {', '.join(missing)}: run python extract_latents.py again")
    return description


class LatentDataset(Dataset):
    """Standardized latents of one split, read from the mapped file a row at a time; keys are rows or (epoch, row).

    UsageError if the file is not, to the last bit, the one that latents.json describes.
    """

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
        shape = getattr(self.raw, "shape", "of an archive")
        if shape != expected:
            raise UsageError(
                f"{path} has shape {shape}, latents.json says {expected}: run python extract_latents.py again"
            )
        self.sha256 = sha256(path)
        if self.sha256 != description["sha256"][split]:
            raise UsageError(f"{path} is not the file latents.json describes: run python extract_latents.py again")
        self.standard = LatentStandard(tuple(description["mean"]), tuple(description["std"]))

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, key: int | tuple[int, int]) -> Tensor:
        row = key[1] if isinstance(key, tuple) else key
        return self.standard.standardize(torch.from_numpy(np.array(self.raw[row])))

    def on(self, device: torch.device, rows_at_once: int = 1024) -> Tensor:
        """All of them, standardized, (N, C, h, w), on a device; of the host's memory a part at a time is used."""
        everyone = torch.empty(self.raw.shape, dtype=torch.float32, device=device)
        for first in range(0, len(self), rows_at_once):
            part = torch.from_numpy(np.array(self.raw[first : first + rows_at_once])).to(device)
            everyone[first : first + rows_at_once] = self.standard.standardize(part)
        return everyone
