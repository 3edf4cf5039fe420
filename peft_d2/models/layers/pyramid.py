"""The convolutions of a feature pyramid, named ``adapter_<n>`` and ``layer_<n>`` as published.

They have nothing to do with adapters for fine-tuning. Number 1 is the finest level.
"""

from __future__ import annotations

from collections.abc import Collection

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, get_norm
from torch import nn

from peft_d2.models.checks import expect_at_least, expect_norm, expect_some_of


def check_pyramid(head: CfgNode, input_shape: Collection[str]) -> None:
    """Check what all pixel decoders take from ``MODEL.SEM_SEG_HEAD``, for a backbone with these maps.

    Raises:
        ModelConfigError: maps that the backbone does not have, sizes out of range, an unknown norm.
    """
    path = "MODEL.SEM_SEG_HEAD"
    expect_some_of(f"{path}.IN_FEATURES", head.IN_FEATURES, input_shape, "the backbone's maps")
    expect_at_least(path, head, CONVS_DIM=1, MASK_DIM=1, TRANSFORMER_ENC_LAYERS=0)
    expect_norm(f"{path}.NORM", head.NORM)


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
