"""What brings the pixel decoder's maps to the transformer decoder's channels."""

from __future__ import annotations

import fvcore.nn.weight_init as weight_init
from detectron2.layers import Conv2d
from torch import nn


def input_projections(in_channels: int, channels: int, levels: int, enforce: bool) -> nn.ModuleList:
    """A 1 x 1 convolution per level; nothing where the channels fit already, unless ``enforce`` wants it."""
    projections = nn.ModuleList()
    for _ in range(levels):
        projection: nn.Module = nn.Identity()  # has no keys in the state dict
        if in_channels != channels or enforce:
            projection = Conv2d(in_channels, channels, kernel_size=1)
            weight_init.c2_xavier_fill(projection)
        projections.append(projection)
    return projections
