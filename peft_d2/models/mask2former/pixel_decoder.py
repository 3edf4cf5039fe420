"""The pixel decoders of Mask2Former and Mask DINO: a deformable encoder over maps, then a pyramid down to stride 4."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from torch import Tensor, nn

from peft_d2.models.checks import expect, expect_at_least, expect_heads, expect_share, expect_some_of
from peft_d2.models.layers.deformable_encoder import MultiScaleDeformableTransformer
from peft_d2.models.layers.pyramid import add_lateral, add_output, check_pyramid

_GROUPS = 32  # of the norms behind the projections


class MSDeformAttnPixelDecoder(nn.Module):
    """Deformable encoder and feature pyramid (Cheng et al., CVPR 2022, section 4.1), as Mask2Former configures them.

    Args:
        input_shape: the backbone's maps by name.
        encoder_in_features: names of the maps that go through the encoder; the finer ones enter the pyramid.
        conv_dim: channels of the encoder and the pyramid.
        mask_dim: channels of the mask features.
        norm: of the pyramid's convolutions, in Detectron2's spelling.
        n_layers, n_heads, n_points, dim_feedforward, dropout: of the encoder.
        common_stride: stride of the mask features.
        decoder_levels: maps that the transformer decoder gets.
        extra_levels: maps that the encoder sees besides, made from the coarsest one, each half the size of the last.
        finest_first: order of the encoder's maps and of those that the transformer decoder gets; else coarsest first.
        least_pyramid_levels: maps that enter the pyramid at least, even where the encoder reaches the common stride.
        use_checkpoint: compute the encoder's activations again in the backward pass instead of keeping them.
        autocast: follow the surrounding autocast; otherwise all runs in float32, as the published models did.
    """

    config_node = "MASK_FORMER"  # below MODEL: its NHEADS and DROPOUT are the encoder's, too

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
        decoder_levels: int = 3,
        extra_levels: int = 0,
        finest_first: bool = False,
        least_pyramid_levels: int = 0,
        use_checkpoint: bool = False,
        autocast: bool = False,
    ) -> None:
        super().__init__()
        fine_to_coarse = sorted(input_shape, key=lambda name: input_shape[name].stride)
        encoded = [name for name in fine_to_coarse if name in encoder_in_features]
        self.encoder_features = encoded if finest_first else encoded[::-1]
        self.finest_first = finest_first
        self.decoder_levels = decoder_levels
        self.autocast = autocast
        self.input_proj = nn.ModuleList(
            _projection(input_shape[name].channels, conv_dim) for name in self.encoder_features
        )
        self.coarsest = encoded[-1]
        channels = [input_shape[self.coarsest].channels, *[conv_dim] * extra_levels]
        self.input_proj.extend(_projection(c, conv_dim, halve=True) for c in channels[:extra_levels])
        self.transformer = MultiScaleDeformableTransformer(
            conv_dim, dim_feedforward, n_layers, len(self.input_proj), n_heads, n_points, dropout
        )
        self.transformer.encoder.use_checkpoint = use_checkpoint
        self.mask_features = Conv2d(conv_dim, mask_dim, kernel_size=1)
        weight_init.c2_xavier_fill(self.mask_features)

        finest = input_shape[encoded[0]].stride
        enter = sum(common_stride <= input_shape[name].stride < finest for name in fine_to_coarse)
        self.pyramid_features = fine_to_coarse[: max(enter, least_pyramid_levels)]
        for number, name in enumerate(self.pyramid_features, start=1):
            add_lateral(self, number, input_shape[name].channels, conv_dim, norm)
            add_output(self, number, conv_dim, norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments from ``MODEL.SEM_SEG_HEAD`` and the config node of the decoder that follows.

        Raises:
            ModelConfigError: values that are out of range or do not go together.
        """
        head, node = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL[cls.config_node]
        _check(head, cls.config_node, node, input_shape)
        return {
            "input_shape": {name: shape for name, shape in input_shape.items() if name in head.IN_FEATURES},
            "encoder_in_features": head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES,
            "conv_dim": head.CONVS_DIM,
            "mask_dim": head.MASK_DIM,
            "norm": head.NORM,
            "n_layers": head.TRANSFORMER_ENC_LAYERS,
            # The published models take the decoder's number of heads here, not DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS.
            "n_heads": node.NHEADS,
            "n_points": head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS,
            "dim_feedforward": head.DIM_FEEDFORWARD,
            "dropout": node.DROPOUT,
            "common_stride": head.COMMON_STRIDE,
            "use_checkpoint": head.USE_CHECKPOINT,
            "autocast": head.PIXEL_DECODER_AUTOCAST,
        }

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Decode.

        Args:
            features: the backbone's maps (N, C_l, H_l, W_l) by name.

        Returns:
            Mask features (N, mask_dim, H, W) at the common stride, the first encoded map, and the first
            ``decoder_levels`` maps (N, conv_dim, H_l, W_l), in the encoder's order.
        """
        device_type = features[self.coarsest].device.type
        with nullcontext() if self.autocast else torch.autocast(device_type, enabled=False):
            maps = self.transformer(self._encoder_maps(features), self._code_order())
            finest = maps[0] if self.finest_first else maps[-1]
            for number in range(len(self.pyramid_features), 0, -1):
                lateral, output = getattr(self, f"adapter_{number}"), getattr(self, f"layer_{number}")
                side = lateral(self._input(features[self.pyramid_features[number - 1]]))
                coarse = F.interpolate(finest, size=side.shape[-2:], mode="bilinear", align_corners=False)
                maps.append(output(side + coarse))
                if not self.finest_first:  # otherwise each level adds the encoder's own map, as published
                    finest = maps[-1]
            return self.mask_features(maps[-1]), maps[0], maps[: self.decoder_levels]

    forward = forward_features

    def _encoder_maps(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The encoder's input; extra maps are coarsest first in both orders, as published."""
        count = len(self.encoder_features)
        projections = list(self.input_proj)
        maps = [
            projection(self._input(features[name]))
            for name, projection in zip(self.encoder_features, projections[:count], strict=True)
        ]
        extra: list[Tensor] = []
        source = self._input(features[self.coarsest])
        for projection in projections[count:]:
            source = projection(source)
            extra.insert(0, source)
        return maps + extra if self.finest_first else extra + maps

    def _code_order(self) -> list[int]:
        """As published, position codes of extra maps are finest first, whereas the maps are coarsest first."""
        count, total = len(self.encoder_features), len(self.input_proj)
        encoded, extra = list(range(count)), list(range(total - count))[::-1]
        if self.finest_first:
            return encoded + [count + i for i in extra]
        return extra + [total - count + i for i in encoded]

    def _input(self, feature: Tensor) -> Tensor:
        return feature if self.autocast else feature.float()


def _check(head: CfgNode, node_name: str, node: CfgNode, input_shape: Collection[str]) -> None:
    path, encoded = "MODEL.SEM_SEG_HEAD", "DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
    check_pyramid(head, input_shape)
    expect_some_of(f"{path}.{encoded}", head[encoded], head.IN_FEATURES, "which IN_FEATURES names")
    expect_at_least(path, head, DIM_FEEDFORWARD=1, DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS=1, COMMON_STRIDE=1)
    groups = head.CONVS_DIM % _GROUPS == 0
    expect(groups, f"{path}.CONVS_DIM", head.CONVS_DIM, f"a multiple of {_GROUPS}, the groups of its norms")
    expect_heads(f"{path}.CONVS_DIM", head.CONVS_DIM, f"MODEL.{node_name}.NHEADS", node.NHEADS)
    expect_share(f"MODEL.{node_name}", node, "DROPOUT")


def _projection(in_channels: int, channels: int, halve: bool = False) -> nn.Sequential:
    """Convolution and group norm: 1 x 1, or to half the size."""
    convolution = (
        nn.Conv2d(in_channels, channels, kernel_size=3, stride=2, padding=1)
        if halve
        else nn.Conv2d(in_channels, channels, kernel_size=1)
    )
    nn.init.xavier_uniform_(convolution.weight)
    nn.init.zeros_(convolution.get_parameter("bias"))
    return nn.Sequential(convolution, nn.GroupNorm(_GROUPS, channels))
