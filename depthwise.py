"""Leaf: depthwise convolutions whose backward pass is quick on a CPU; forward, and on a GPU, they are torch's own.

A step of the tuned backbone is 1.47 times as fast as with torch's CPU kernels for it (`python benchmarks/speed.py
--parts tuning`, `benchmarks/results/speed/tuning-256-cpu-cpu.json`). Here it is what it is by definition: the gradient
of the input is a convolution with the kernel turned round (Dumoulin and Visin 2016), that of the kernel a product of
shifted inputs with what came back.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Depthwise(nn.Module):
    """One filter for each channel of (B, C, H, W), in place of a torch convolution, whose weights it takes."""

    def __init__(self, original: nn.Conv2d, padding: nn.Module):
        super().__init__()
        if original.groups != original.in_channels or original.dilation != (1, 1) or original.padding != (0, 0):
            raise ValueError("this is no depthwise convolution of an image that was padded before")
        self.padding, self.stride = padding, original.stride[0]
        self.weight, self.bias = original.weight, original.bias

    def forward(self, x: Tensor) -> Tensor:
        padded = self.padding(x)
        if x.is_cuda:
            return F.conv2d(padded, self.weight, self.bias, self.stride, groups=len(self.weight))
        return _Depthwise.apply(padded, self.weight, self.bias, self.stride)


class _Depthwise(torch.autograd.Function):
    """Of padded inputs (B, C, H, W) with kernels (C, 1, k, k)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, bias, stride, groups=len(weight))

    @staticmethod
    def backward(ctx, back: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, None]:
        (x, weight), stride, size = ctx.saved_tensors, ctx.stride, ctx.saved_tensors[1].shape[-1]
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _of_input(back, weight.to(back.dtype), stride, x.shape[-2:]).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = _of_kernel(back, x.to(back.dtype), stride, size).to(weight.dtype)
        return of_x, of_weight, back.sum((0, 2, 3), dtype=torch.promote_types(back.dtype, torch.float32)), None


def _of_input(back: Tensor, weight: Tensor, stride: int, size: torch.Size) -> Tensor:
    """Each value that came back, spread over what it was made of."""
    around = weight.shape[-1] - 1
    if stride > 1:
        spread = (stride * (side - 1) + 1 for side in back.shape[-2:])
        apart = back.new_zeros(*back.shape[:2], *spread).contiguous(memory_format=torch.channels_last)
        apart[..., ::stride, ::stride] = back
        back = apart
    below, right = (side - around - got for side, got in zip(size, back.shape[-2:], strict=True))  # never looked at
    padded = F.pad(back, (around, around + right, around, around + below))
    return F.conv2d(padded, weight.flip(2, 3), groups=len(weight))


def _of_kernel(back: Tensor, x: Tensor, stride: int, size: int) -> Tensor:
    """(C, 1, k, k): for each tap, what it saw times what came back."""
    height, width = (stride * (side - 1) + 1 for side in back.shape[-2:])
    exact = torch.promote_types(x.dtype, torch.float32)
    taps = [
        (x[..., row : row + height : stride, column : column + width : stride] * back).sum((0, 2, 3), dtype=exact)
        for row in range(size)
        for column in range(size)
    ]
    return torch.stack(taps, dim=1).reshape(-1, 1, size, size)
