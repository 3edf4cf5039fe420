"""A pixel decoder's feature pyramid, down to the finest map."""

from __future__ import annotations

from collections.abc import Collection

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, get_norm
from torch import Tensor, nn

from peft_d2.models.checks import expect_at_least, expect_norm, expect_some_of


class Pyramid(nn.Module):
    """Convolutions named ``adapter_<n>`` and ``layer_<n>`` as published; number 1 is the finest level.

    They have nothing to do with adapters for fine-tuning.
    """

    def add_level(self, number: int, channels: int, norm: str, in_channels: int = 0) -> None:
        """Add ``layer_<n>`` (3 x 3, norm, ReLU) and, where a map of ``in_channels`` enters, ``adapter_<n>`` (1 x 1)."""
        if in_channels:
            lateral = Conv2d(in_channels, channels, kernel_size=1, bias=norm == "", norm=get_norm(norm, channels))
            weight_init.c2_xavier_fill(lateral)
            self.add_module(f"adapter_{number}", lateral)
        output = Conv2d(
            channels, channels, 3, padding=1, bias=norm == "", norm=get_norm(norm, channels), activation=F.relu
        )
        weight_init.c2_xavier_fill(output)
        self.add_module(f"layer_{number}", output)

    def merge(self, number: int, feature: Tensor, coarse: Tensor, mode: str) -> Tensor:
        """The level's map: from the backbone's ``feature`` and the next coarser level's map, resized by ``mode``."""
        side = self.get_submodule(f"adapter_{number}")(feature)
        return self.get_submodule(f"layer_{number}")(side + F.interpolate(coarse, size=side.shape[-2:], mode=mode))


def check_pyramid(head: CfgNode, input_shape: Collection[str]) -> None:
    """Check what all pixel decoders take from ``MODEL.SEM_SEG_HEAD``, for a backbone with these maps.

    Raises:
        ModelConfigError: maps that the backbone does not have, sizes out of range, an unknown norm.
    """
    path = "MODEL.SEM_SEG_HEAD"
    expect_some_of(f"{path}.IN_FEATURES", head.IN_FEATURES, input_shape, "the backbone's maps")
    expect_at_least(path, head, CONVS_DIM=1, MASK_DIM=1, TRANSFORMER_ENC_LAYERS=0)
    expect_norm(f"{path}.NORM", head.NORM)
