"""PatchCore (Roth, Pemula, Zepeda, Schoelkopf, Brox, Gehler 2022): distance to a coreset of normal patches.

On EfficientNet-Lite0, strides 8 and 16; a greedy coreset of 1 % under a random projection to 128 dimensions; image
score weighted by nine neighbours (eq. 7), as published.
"""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import Config
from peers.frozen import PatchFeatures, finished_map, in_batches

SHARE = 0.01
PROJECTED = 128
NEIGHBOURS = 9


class Patchcore:
    """A memory of normal patches, whatever their place."""

    def __init__(self, seed: int, config: Config):
        self.features = PatchFeatures((8, 16), pooled=True)
        self.random = torch.Generator().manual_seed(seed)

    def fit(self, normals: np.ndarray) -> None:
        """Fill the memory."""
        patches = in_batches(lambda batch: self.features(batch).half(), normals).permute(0, 2, 3, 1).flatten(0, 2)
        self.memory = patches[self._coreset(patches)].float()

    def score(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps of the distance to the nearest patch, and the weighted distance of the farthest one."""
        values = self.features(images)
        grid = values.shape[2:]
        distances, scores = [], []
        for patches in values.permute(0, 2, 3, 1).flatten(1, 2):
            nearest, which = torch.cdist(patches, self.memory).min(dim=1)
            distances.append(nearest)
            scores.append(self._weighted(patches[nearest.argmax()], float(nearest.max()), which[nearest.argmax()]))
        return finished_map(torch.stack(distances).reshape(-1, *grid), images.shape[1:]), np.array(scores)

    def _weighted(self, patch: Tensor, distance: float, nearest: Tensor) -> float:
        """Less where the nearest patch of the memory is itself far from the others (eq. 7)."""
        to_memory = torch.cdist(self.memory[nearest][None], self.memory)[0]
        around = to_memory.topk(min(NEIGHBOURS, len(self.memory)), largest=False).indices
        apart = torch.cdist(patch[None], self.memory[around])[0]
        return (1 - float(torch.softmax(apart, dim=0)[0])) * distance

    def _coreset(self, patches: Tensor) -> list[int]:
        """Greedy k-centre: each new patch is the one farthest from all chosen (Sener and Savarese 2018)."""
        mapping = torch.randn(patches.shape[1], PROJECTED, generator=self.random) / PROJECTED**0.5
        small = torch.cat([part.float() @ mapping for part in patches.split(2**16)])
        squares, chosen = small.square().sum(1), [int(torch.randint(len(small), (1,), generator=self.random))]
        farthest = torch.full((len(small),), torch.inf)
        for _ in tqdm(range(max(1, round(SHARE * len(small)) - 1)), desc="coreset"):
            last = small[chosen[-1]]
            farthest = torch.minimum(farthest, squares - 2 * small @ last + last.square().sum())
            chosen.append(int(farthest.argmax()))
        return chosen
