"""Leaf: how far a latent lies from those of normals: far out lies another kind of image, or a bad file."""

from dataclasses import dataclass

import numpy as np

LEAST = 0.01  # spread of normals that is believed, a share of the channel's own


def summary_of(latents: np.ndarray) -> np.ndarray:
    """Mean and spread of each channel of latents (N, C, h, w): (N, 2C)."""
    return np.concatenate([latents.mean((2, 3)), latents.std((2, 3))], axis=1)


@dataclass(frozen=True)
class Typical:
    """The median of normals and their spread around it, which no few of them can move far, (2C,) each."""

    median: tuple[float, ...]
    spread: tuple[float, ...]

    @classmethod
    def of(cls, summaries: np.ndarray) -> "Typical":
        """From the summaries (N, 2C) of normals."""
        median = np.median(summaries, axis=0)
        deviation = np.median(np.abs(summaries - median), axis=0)
        spread = 1.4826 * deviation  # which estimates a normal's standard deviation
        channels = np.tile(median[len(median) // 2 :], 2)  # the median spread of each channel
        spread = np.maximum(spread, LEAST * channels) + 1e-6
        return cls(tuple(map(float, median)), tuple(map(float, spread)))

    def deviations(self, summaries: np.ndarray) -> np.ndarray:
        """How many robust standard deviations each lies out where it lies out most, (N,)."""
        return (np.abs(summaries - np.array(self.median)) / np.array(self.spread)).max(axis=1)
