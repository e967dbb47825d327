"""A pretrained backbone that learns to see what does not belong: fine-tuned to segment corruptions of normals.

EfficientNet-Lite0 (`backbone.py`) with a feature pyramid (Lin et al. 2017) down to stride 4. What it feels at each
place is one of the features that the reader reads. Its batch normalization keeps the statistics of ImageNet: a batch
holds too few radiographs to have statistics of its own.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from backbone import Backbone

COARSEST = 16  # pixels between the places of the coarsest features
CHANNELS = (16, 24, 40, 112)  # of the backbone at strides 2, 4, 8 and 16


class Segmenter(nn.Module):
    """Images (B, 1, H, W) in [-1, 1] and positions to features (B, width, H / 4, W / 4) and a logit per place."""

    def __init__(self, width: int):
        super().__init__()
        self.backbone = Backbone().requires_grad_(True)
        self.enter = nn.ModuleList([nn.Conv2d(count, width, 1) for count in CHANNELS])
        self.place = nn.Conv2d(2, width, 1)
        self.mix = nn.ModuleList([nn.Sequential(nn.GELU(), _convolution(width)) for _ in CHANNELS[1:]])
        self.body = nn.Sequential(nn.GELU(), _convolution(width), nn.GELU())
        self.verdict = nn.Conv2d(width, 1, 1)
        nn.init.constant_(self.verdict.bias, -3.0)  # few places are foreign

    def train(self, mode: bool = True) -> "Segmenter":
        """As every module, but batch normalization stays as it is."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits (B, 1, H / 4, W / 4); places (B, 2, H / 16, W / 16) are positions in [-1, 1]."""
        finest, *others = [enter(part) for enter, part in zip(self.enter, self.backbone(x), strict=True)]
        hidden = self.place(places)
        for part, mix in zip(reversed(others), reversed(self.mix), strict=True):  # from stride 16 to stride 4
            hidden = part + F.interpolate(hidden, size=part.shape[-2:], mode="bilinear", align_corners=False)
            hidden = hidden + mix(hidden)
        hidden = self.body(hidden + F.adaptive_avg_pool2d(finest, hidden.shape[-2:]))
        return hidden, self.verdict(hidden)


def _convolution(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, padding=1)
