"""The convolutions of a feature pyramid, named ``adapter_<n>`` and ``layer_<n>`` as published.

They have nothing to do with adapters for fine-tuning. Number 1 is the finest level.
"""

from __future__ import annotations

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from torch import nn


def add_lateral(module: nn.Module, number: int, in_channels: int, channels: int, norm: str) -> None:
    """Give ``module`` the 1 x 1 convolution ``adapter_<number>`` of a backbone's map."""
    convolution = Conv2d(in_channels, channels, kernel_size=1, bias=norm == "", norm=get_norm(norm, channels))
    _add(module, f"adapter_{number}", convolution)


def add_output(module: nn.Module, number: int, channels: int, norm: str) -> None:
    """Give ``module`` the 3 x 3 convolution ``layer_<number>`` with ReLU, which a level's sum goes through."""
    convolution = Conv2d(
        channels,
        channels,
        kernel_size=3,
        padding=1,
        bias=norm == "",
        norm=get_norm(norm, channels),
        activation=F.relu,
    )
    _add(module, f"layer_{number}", convolution)


def _add(module: nn.Module, name: str, convolution: nn.Module) -> None:
    weight_init.c2_xavier_fill(convolution)
    module.add_module(name, convolution)
