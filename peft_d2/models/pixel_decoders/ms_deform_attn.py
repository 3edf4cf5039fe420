"""The pixel decoder of Mask2Former: a deformable encoder over the coarse maps, then a pyramid down to stride 4."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn

from peft_d2.layers.deformable_encoder import MultiScaleDeformableTransformer

_DECODER_LEVELS = 3  # maps that the transformer decoder attends to


class MSDeformAttnPixelDecoder(nn.Module):
    """Deformable encoder and feature pyramid (Cheng et al., CVPR 2022, section 4.1).

    The pyramid's lateral and output convolutions are named ``adapter_1`` and ``layer_1`` (and so on) as published;
    they have nothing to do with adapters for fine-tuning.

    Args:
        input_shape: the backbone's maps by name.
        encoder_in_features: names of the maps that go through the encoder; the finer ones enter the pyramid.
        conv_dim: channels of the encoder and the pyramid.
        mask_dim: channels of the mask features.
        norm: of the pyramid's convolutions, in Detectron2's spelling.
        n_layers, n_heads, n_points, dim_feedforward, dropout: of the encoder.
        common_stride: stride of the mask features.
        autocast: follow the surrounding autocast; otherwise all runs in float32, as the published models did.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        encoder_in_features: Sequence[str],
        conv_dim: int,
        mask_dim: int,
        norm: str,
        n_layers: int,
        n_heads: int,
        n_points: int,
        dim_feedforward: int,
        dropout: float,
        common_stride: int,
        autocast: bool = False,
    ) -> None:
        super().__init__()
        fine_to_coarse = sorted(input_shape, key=lambda name: input_shape[name].stride)
        self.encoder_features = [name for name in reversed(fine_to_coarse) if name in encoder_in_features]
        self.autocast = autocast
        self.input_proj = nn.ModuleList()
        for name in self.encoder_features:
            projection = nn.Conv2d(input_shape[name].channels, conv_dim, kernel_size=1)
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.get_parameter("bias"))
            self.input_proj.append(nn.Sequential(projection, nn.GroupNorm(32, conv_dim)))
        self.transformer = MultiScaleDeformableTransformer(
            conv_dim, dim_feedforward, n_layers, len(self.encoder_features), n_heads, n_points, dropout
        )
        self.mask_features = Conv2d(conv_dim, mask_dim, kernel_size=1)
        weight_init.c2_xavier_fill(self.mask_features)

        finest = min(input_shape[name].stride for name in self.encoder_features)
        self.pyramid_features = [name for name in fine_to_coarse if common_stride <= input_shape[name].stride < finest]
        for number, name in enumerate(self.pyramid_features, start=1):
            self._add_pyramid_level(number, input_shape[name].channels, conv_dim, norm)

    def _add_pyramid_level(self, number: int, in_channels: int, conv_dim: int, norm: str) -> None:
        bias = norm == ""
        lateral = Conv2d(in_channels, conv_dim, kernel_size=1, bias=bias, norm=get_norm(norm, conv_dim))
        output = Conv2d(
            conv_dim, conv_dim, kernel_size=3, padding=1, bias=bias, norm=get_norm(norm, conv_dim), activation=F.relu
        )
        for name, convolution in ((f"adapter_{number}", lateral), (f"layer_{number}", output)):
            weight_init.c2_xavier_fill(convolution)
            self.add_module(name, convolution)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments from ``MODEL.SEM_SEG_HEAD`` and ``MODEL.MASK_FORMER``."""
        head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        return {
            "input_shape": {name: shape for name, shape in input_shape.items() if name in head.IN_FEATURES},
            "encoder_in_features": head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES,
            "conv_dim": head.CONVS_DIM,
            "mask_dim": head.MASK_DIM,
            "norm": head.NORM,
            "n_layers": head.TRANSFORMER_ENC_LAYERS,
            # The published models take the decoder's number of heads here, not DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS.
            "n_heads": former.NHEADS,
            "n_points": head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS,
            "dim_feedforward": head.DIM_FEEDFORWARD,
            "dropout": former.DROPOUT,
            "common_stride": head.COMMON_STRIDE,
            "autocast": head.PIXEL_DECODER_AUTOCAST,
        }

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Decode.

        Args:
            features: the backbone's maps (N, C_l, H_l, W_l) by name.

        Returns:
            Mask features (N, mask_dim, H, W) at the common stride, the coarsest encoded map, and the three coarsest
            maps (N, conv_dim, H_l, W_l), coarsest first.
        """
        device_type = features[self.encoder_features[0]].device.type
        with nullcontext() if self.autocast else torch.autocast(device_type, enabled=False):
            maps = self.transformer(
                [
                    projection(self._input(features[name]))
                    for name, projection in zip(self.encoder_features, self.input_proj, strict=True)
                ]
            )
            for number in range(len(self.pyramid_features), 0, -1):
                lateral, output = getattr(self, f"adapter_{number}"), getattr(self, f"layer_{number}")
                side = lateral(self._input(features[self.pyramid_features[number - 1]]))
                coarse = F.interpolate(maps[-1], size=side.shape[-2:], mode="bilinear", align_corners=False)
                maps.append(output(side + coarse))
            return self.mask_features(maps[-1]), maps[0], maps[:_DECODER_LEVELS]

    forward = forward_features

    def _input(self, feature: Tensor) -> Tensor:
        return feature if self.autocast else feature.float()
