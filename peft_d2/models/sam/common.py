"""What Segment Anything's parts share, with the published parameter names."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_d2.models.layers.transformer import FeedForward

MLPBlock = partial(FeedForward, names=("lin1", "lin2"))


class LayerNorm2d(nn.Module):
    """Normalises (N, C, H, W) over C at each pixel, with a gain and an offset per channel."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        normed = F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps)
        return normed.movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def normed_convolutions(in_channels: int, channels: int) -> tuple[nn.Module, ...]:
    """1 x 1 and 3 x 3 convolutions to ``channels``, each normed."""
    return (
        nn.Conv2d(in_channels, channels, kernel_size=1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(channels),
    )
