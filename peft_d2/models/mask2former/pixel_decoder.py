"""Pixel decoders: an encoder over the backbone's coarse maps, then a pyramid down to the finest.

Mask2Former and Mask DINO encode several maps by deformable attention, MaskFormer and SEEM the coarsest one.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from peft_d2.models.checks import ModelConfigError, expect, expect_heads, expect_norm, expect_numbers, expect_some_of
from peft_d2.models.layers.transformer import (
    MultiScaleDeformableTransformer,
    SinePosition2d,
    TransformerEncoder,
    init_transformer,
)
from peft_d2.models.registration import entry

_GROUPS = 32  # of the norms behind the projections
_DECODER_LEVELS = 3
KEYS = """
MODEL:
  SEM_SEG_HEAD:
    {MASK_DIM: 256, TRANSFORMER_ENC_LAYERS: 0, PIXEL_DECODER_NAME: BasePixelDecoder,
     DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES: [res3, res4, res5], DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS: 4,
     DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS: 8,
     # Hidden channels of the encoder: 1024 in the published models, whatever MASK_FORMER says.
     DIM_FEEDFORWARD: 1024,
     # True computes the encoder's activations again in the backward pass instead of keeping them.
     USE_CHECKPOINT: false,
     # True runs the pixel decoder in the autocast type with SOLVER.AMP; the published models keep it in float32.
     PIXEL_DECODER_AUTOCAST: false}
"""


class Pyramid(nn.Module):
    """Convolutions named ``adapter_<n>`` and ``layer_<n>`` as published; number 1 is the finest level."""

    mask_features: nn.Module

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

    def require_float32(self, or_float64: bool = False) -> None:
        """Refuse weights of another type, as ``model.half()`` leaves them."""
        kind = self.mask_features.weight.dtype
        if kind != torch.float32 and not (or_float64 and kind == torch.float64):
            raise ModelConfigError(
                f"the pixel decoder computes in float32, as published, and its weights are {kind}: keep the "
                "model in float32, model.float(), and run it under torch.autocast"
            )

    def merge(self, number: int, feature: Tensor, coarse: Tensor, mode: str) -> Tensor:
        """The level's map: from the backbone's ``feature`` and the next coarser level's map, resized by ``mode``."""
        side = self.get_submodule(f"adapter_{number}")(feature)
        return self.get_submodule(f"layer_{number}")(side + F.interpolate(coarse, size=side.shape[-2:], mode=mode))


def check_pyramid(head: CfgNode, input_shape: Collection[str]) -> None:
    """Check what all pixel decoders take from ``MODEL.SEM_SEG_HEAD``, for a backbone with these maps."""
    path = "MODEL.SEM_SEG_HEAD"
    expect_some_of(f"{path}.IN_FEATURES", head.IN_FEATURES, input_shape, "the backbone's maps")
    expect_numbers(path, head, CONVS_DIM=1, MASK_DIM=1, TRANSFORMER_ENC_LAYERS=0)
    expect_norm(f"{path}.NORM", head.NORM)


@entry(SEM_SEG_HEADS_REGISTRY, "PD2MSDeformAttnPixelDecoder", upstream="MSDeformAttnPixelDecoder", keys=KEYS)
class MSDeformAttnPixelDecoder(Pyramid):
    """Deformable encoder and feature pyramid (Cheng et al., CVPR 2022, section 4.1), as Mask2Former configures them.

    Args:
        cfg: ``MODEL.SEM_SEG_HEAD``; NHEADS and DROPOUT are those of the decoder that follows, in ``config_node``.
        decoder_levels: maps that the transformer decoder gets.
        extra_levels: maps that the encoder sees besides, made from the coarsest one, each half the size of the last.
        finest_first: order of the encoder's maps and of those that the transformer decoder gets; else coarsest first.
        least_pyramid_levels: maps that enter the pyramid at least, even where the encoder reaches the common stride.
    """

    config_node = "MASK_FORMER"

    def __init__(
        self,
        cfg: CfgNode,
        input_shape: dict[str, ShapeSpec],
        decoder_levels: int = _DECODER_LEVELS,
        extra_levels: int = 0,
        finest_first: bool = False,
        least_pyramid_levels: int = 0,
    ) -> None:
        super().__init__()
        head, node = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL[self.config_node]
        self._check(head, node, input_shape)
        channels = head.CONVS_DIM
        names = sorted((name for name in input_shape if name in head.IN_FEATURES), key=lambda n: input_shape[n].stride)
        encoded = [name for name in names if name in head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES]
        self.encoder_features = encoded if finest_first else encoded[::-1]
        self.finest_first = finest_first
        self.decoder_levels = decoder_levels
        self.autocast = head.PIXEL_DECODER_AUTOCAST
        self.coarsest = encoded[-1]
        self.input_proj = nn.ModuleList(_projection(input_shape[n].channels, channels) for n in self.encoder_features)
        sources = [input_shape[self.coarsest].channels, *[channels] * extra_levels]
        self.input_proj.extend(_projection(source, channels, halve=True) for source in sources[:extra_levels])
        self.transformer = MultiScaleDeformableTransformer(
            channels,
            head.DIM_FEEDFORWARD,
            head.TRANSFORMER_ENC_LAYERS,
            len(self.input_proj),
            node.NHEADS,  # as published, not DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS
            head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS,
            node.DROPOUT,
        )
        self.transformer.encoder.use_checkpoint = head.USE_CHECKPOINT
        self.mask_features = Conv2d(channels, head.MASK_DIM, kernel_size=1)
        weight_init.c2_xavier_fill(self.mask_features)
        finest = input_shape[encoded[0]].stride
        enter = sum(head.COMMON_STRIDE <= input_shape[name].stride < finest for name in names)
        self.pyramid_features = names[: max(enter, least_pyramid_levels)]
        for number, name in enumerate(self.pyramid_features, start=1):
            self.add_level(number, channels, head.NORM, input_shape[name].channels)

    def _check(self, head: CfgNode, node: CfgNode, input_shape: dict[str, ShapeSpec]) -> None:
        path, encoded = "MODEL.SEM_SEG_HEAD", "DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
        check_pyramid(head, input_shape)
        expect_some_of(f"{path}.{encoded}", head[encoded], head.IN_FEATURES, "which IN_FEATURES names")
        expect_numbers(path, head, DIM_FEEDFORWARD=1, DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS=1, COMMON_STRIDE=1)
        groups = head.CONVS_DIM % _GROUPS == 0
        expect(groups, f"{path}.CONVS_DIM", head.CONVS_DIM, f"a multiple of {_GROUPS}, the groups of its norms")
        expect_heads(f"{path}.CONVS_DIM", head.CONVS_DIM, f"MODEL.{self.config_node}.NHEADS", node.NHEADS)
        expect_numbers(f"MODEL.{self.config_node}", node, DROPOUT=(0, 1))

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Encode the backbone's maps (N, C_l, H_l, W_l), and add finer ones to the finest of them.

        Mask features (N, mask_dim, H, W) come at the common stride, then the first encoded map, and the first
        ``decoder_levels`` maps (N, conv_dim, H_l, W_l), in the encoder's order.
        """
        self.require_float32(or_float64=self.autocast)
        device_type = features[self.coarsest].device.type
        with nullcontext() if self.autocast else torch.autocast(device_type, enabled=False):
            if not self.autocast:
                features = {name: feature.float() for name, feature in features.items()}
            maps = self.transformer(self._encoder_maps(features), self._code_order())
            finest = maps[0] if self.finest_first else maps[-1]
            for number in range(len(self.pyramid_features), 0, -1):
                maps.append(self.merge(number, features[self.pyramid_features[number - 1]], finest, "bilinear"))
                if not self.finest_first:  # otherwise each level adds the encoder's own map, as published
                    finest = maps[-1]
            return self.mask_features(maps[-1]), maps[0], maps[: self.decoder_levels]

    forward = forward_features

    def _encoder_maps(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The encoder's input; extra maps are coarsest first in both orders, as published."""
        count = len(self.encoder_features)
        projections = list(self.input_proj)
        maps = [project(features[n]) for n, project in zip(self.encoder_features, projections[:count], strict=True)]
        extra: list[Tensor] = []
        source = features[self.coarsest]
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


def _projection(in_channels: int, channels: int, halve: bool = False) -> nn.Sequential:
    """Convolution and group norm: 1 x 1, or to half the size."""
    kernel, stride, padding = (3, 2, 1) if halve else (1, 1, 0)
    convolution = nn.Conv2d(in_channels, channels, kernel, stride, padding)
    nn.init.xavier_uniform_(convolution.weight)
    nn.init.zeros_(convolution.get_parameter("bias"))
    return nn.Sequential(convolution, nn.GroupNorm(_GROUPS, channels))


class MapTransformer(nn.Module):
    """A transformer encoder over the pixels of one map (N, C, H, W), with sine positions."""

    def __init__(self, d_model: int, n_heads: int, d_ffn: int, n_layers: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.encoder = TransformerEncoder(n_layers, d_model, n_heads, d_ffn, dropout, pre_norm)
        self.position = SinePosition2d(d_model)
        init_transformer(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        position = self.position(x.shape[-2], x.shape[-1], x.device)[:, None]
        encoded = self.encoder(x.flatten(2).permute(2, 0, 1).contiguous(), position)
        return encoded.permute(1, 2, 0).view(x.shape)


@entry(SEM_SEG_HEADS_REGISTRY, "PD2TransformerEncoderPixelDecoder", upstream="TransformerEncoderPixelDecoder")
class TransformerEncoderPixelDecoder(Pyramid):
    """Encoder and feature pyramid (Cheng et al., MaskFormer, NeurIPS 2021, section 3.2), as SEEM uses them.

    Padding is not masked. Upsampling is to the nearest pixel. All maps that ``MODEL.SEM_SEG_HEAD`` names enter the
    pyramid; the encoder has the heads, dropout and hidden channels of ``MODEL.MASK_FORMER``.
    """

    def __init__(self, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> None:
        super().__init__()
        head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        check_pyramid(head, input_shape)
        names, channels = list(head.IN_FEATURES), head.CONVS_DIM
        enough = f"{_DECODER_LEVELS} maps or more, which the transformer decoder takes"
        expect(len(names) >= _DECODER_LEVELS, "MODEL.SEM_SEG_HEAD.IN_FEATURES", names, enough)
        expect(channels % 4 == 0, "MODEL.SEM_SEG_HEAD.CONVS_DIM", channels, "a multiple of 4")
        expect_heads("MODEL.SEM_SEG_HEAD.CONVS_DIM", channels, "MODEL.MASK_FORMER.NHEADS", former.NHEADS)
        expect_numbers("MODEL.MASK_FORMER", former, DROPOUT=(0, 1))
        self.in_features = sorted(names, key=lambda name: input_shape[name].stride)
        *finer, coarsest = self.in_features
        for number, name in enumerate(finer, start=1):
            self.add_level(number, channels, head.NORM, input_shape[name].channels)
        self.mask_features = Conv2d(channels, head.MASK_DIM, kernel_size=3, padding=1)
        self.input_proj = Conv2d(input_shape[coarsest].channels, channels, kernel_size=1)
        for convolution in (self.mask_features, self.input_proj):
            weight_init.c2_xavier_fill(convolution)
        layers = head.TRANSFORMER_ENC_LAYERS
        self.transformer = MapTransformer(
            channels, former.NHEADS, former.DIM_FEEDFORWARD, layers, former.DROPOUT, former.PRE_NORM
        )
        self.transformer.encoder.use_checkpoint = head.USE_CHECKPOINT
        self.add_level(len(self.in_features), channels, head.NORM)

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Encode the coarsest of the backbone's maps (N, C_l, H_l, W_l), and add the finer ones to it one by one.

        Mask features are at the finest map's stride; of the pyramid, the three coarsest maps come out, coarsest first.
        """
        self.require_float32()
        *finer, coarsest = self.in_features
        encoded = self.transformer(self.input_proj(features[coarsest]))
        maps = [self.get_submodule(f"layer_{len(self.in_features)}")(encoded)]
        for number in range(len(finer), 0, -1):
            maps.append(self.merge(number, features[finer[number - 1]], maps[-1], "nearest"))
        return self.mask_features(maps[-1]), encoded, maps[:_DECODER_LEVELS]

    forward = forward_features
