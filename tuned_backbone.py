"""Part: an ImageNet backbone that learnt on, on corrupted normals, how a foreign place looks; the reader's finest eye.

Frozen features say what a place looks like; tuned ones look for what does not belong, and see small things. It reads
the image alone: what it says is averaged with what the reader's networks say of G (`reader.py`). The maps of its
strides are added from coarse to fine, as in a feature pyramid (Lin et al. 2017).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbone import Backbone
from depthwise import Depthwise

LAST_BLOCKS = (0, 2, 4, 10, 14)  # of the backbone's 16, at strides 2, 4, 8, 16 and 32
CHANNELS = (16, 24, 40, 112, 192)  # of these
COARSEST = 32  # pixels of the image per place of the coarsest map
WIDTH = 64  # features of the pyramid
FINE = 32  # and of its finest level


class TunedBackbone(nn.Module):
    """Images (B, 1, H, W) in [-1, 1] and positions (B, 2, H, W) to logits (B, 1, H, W)."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone(LAST_BLOCKS).requires_grad_(True)
        for block in self.backbone.blocks:
            block._depthwise_conv = Depthwise(block._depthwise_conv, block._depthwise_conv.static_padding)
        self.enter = nn.ModuleList([nn.Conv2d(count, WIDTH, 1) for count in CHANNELS[1:]])
        self.mix = nn.ModuleList([nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in CHANNELS[1:]])
        self.place = nn.Conv2d(2, WIDTH, 1)
        self.enter_fine, self.narrow = nn.Conv2d(CHANNELS[0], FINE, 1), nn.Conv2d(WIDTH, FINE, 1)
        self.mix_fine = nn.Conv2d(FINE, FINE, 3, padding=1)
        self.verdict = nn.Conv2d(FINE, 1, 1)
        nn.init.constant_(self.verdict.bias, -3.0)  # few places are foreign
        self.to(memory_format=torch.channels_last)

    def new_parameters(self) -> list[nn.Parameter]:
        """Those that ImageNet has not taught."""
        return [weight for name, weight in self.named_parameters() if not name.startswith("backbone.")]

    def at_stride_two(self, x: Tensor, places: Tensor) -> Tensor:
        """Logits (B, 1, H / 2, W / 2): what it is trained on."""
        finest, *maps = self.backbone(x)
        known = self.place(F.adaptive_avg_pool2d(places, maps[-1].shape[-2:]))
        for part, enter, mix in reversed(list(zip(maps, self.enter, self.mix, strict=True))):
            hidden = enter(part) + enlarged(known, part)
            known = hidden + mix(F.gelu(hidden))
        hidden = self.enter_fine(finest) + enlarged(self.narrow(known), finest)
        return self.verdict(F.gelu(hidden + self.mix_fine(F.gelu(hidden))))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return enlarged(self.at_stride_two(x, places), x)

    def look(self, x: Tensor, places: Tensor, mirror: bool) -> Tensor:
        """Logits of whole images; with `mirror` the mean of what it says of each and of its mirror image.

        Both are at the same places, as a jaw has two sides: it learnt on either.
        """
        said = self(x, places)
        return (said + self(x.flip(-1), places).flip(-1)) / 2 if mirror else said


def enlarged(maps: Tensor, like: Tensor) -> Tensor:
    """Brought to the height and width of another."""
    return F.interpolate(maps, size=like.shape[-2:], mode="bilinear", align_corners=False)
