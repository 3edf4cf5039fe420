"""MaskFormer's pixel decoder: a transformer encoder over the coarsest map, then a pyramid down to the finest."""

from __future__ import annotations

from typing import Any

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from torch import Tensor, nn

from peft_d2.models.checks import expect, expect_heads, expect_share
from peft_d2.models.layers.position import SinePosition2d
from peft_d2.models.layers.pyramid import add_lateral, add_output, check_pyramid
from peft_d2.models.layers.transformer import TransformerEncoder, xavier_matrices

_DECODER_LEVELS = 3


class MapTransformer(nn.Module):
    """A transformer encoder over the pixels of one map, with sine positions."""

    def __init__(self, d_model: int, n_heads: int, d_ffn: int, n_layers: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.encoder = TransformerEncoder(n_layers, d_model, n_heads, d_ffn, dropout, pre_norm)
        self.position = SinePosition2d(d_model)
        xavier_matrices(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        position = self.position(x.shape[-2], x.shape[-1], x.device)[:, None]
        encoded = self.encoder(x.flatten(2).permute(2, 0, 1), position)
        return encoded.permute(1, 2, 0).view(x.shape)


class TransformerEncoderPixelDecoder(nn.Module):
    """Encoder and feature pyramid (Cheng et al., MaskFormer, NeurIPS 2021, section 3.2), as SEEM uses them.

    Padding is not masked. Upsampling is to the nearest pixel.

    Args:
        input_shape: the backbone's maps by name; all enter the pyramid.
        conv_dim: channels of the encoder and the pyramid.
        mask_dim: channels of the mask features.
        norm: of the pyramid's convolutions, in Detectron2's spelling.
        n_layers, n_heads, dim_feedforward, dropout, pre_norm: of the encoder.
        use_checkpoint: compute the encoder's activations again in the backward pass instead of keeping them.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        conv_dim: int,
        mask_dim: int,
        norm: str,
        n_layers: int,
        n_heads: int,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = sorted(input_shape, key=lambda name: input_shape[name].stride)
        *finer, coarsest = self.in_features
        for number, name in enumerate(finer, start=1):
            add_lateral(self, number, input_shape[name].channels, conv_dim, norm)
            add_output(self, number, conv_dim, norm)
        self.mask_features = Conv2d(conv_dim, mask_dim, kernel_size=3, padding=1)
        self.input_proj = Conv2d(input_shape[coarsest].channels, conv_dim, kernel_size=1)
        for convolution in (self.mask_features, self.input_proj):
            weight_init.c2_xavier_fill(convolution)
        self.transformer = MapTransformer(conv_dim, n_heads, dim_feedforward, n_layers, dropout, pre_norm)
        self.transformer.encoder.use_checkpoint = use_checkpoint
        add_output(self, len(self.in_features), conv_dim, norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments from ``MODEL.SEM_SEG_HEAD`` and ``MODEL.MASK_FORMER``.

        Raises:
            ModelConfigError: for fewer maps than the transformer decoder takes, and values that are out of range or
                do not go together.
        """
        head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        check_pyramid(head, input_shape)
        names = list(head.IN_FEATURES)
        enough = f"{_DECODER_LEVELS} maps or more, which the transformer decoder takes"
        expect(len(names) >= _DECODER_LEVELS, "MODEL.SEM_SEG_HEAD.IN_FEATURES", names, enough)
        expect(head.CONVS_DIM % 4 == 0, "MODEL.SEM_SEG_HEAD.CONVS_DIM", head.CONVS_DIM, "a multiple of 4")
        expect_heads("MODEL.SEM_SEG_HEAD.CONVS_DIM", head.CONVS_DIM, "MODEL.MASK_FORMER.NHEADS", former.NHEADS)
        expect_share("MODEL.MASK_FORMER", former, "DROPOUT")
        return {
            "input_shape": {name: shape for name, shape in input_shape.items() if name in names},
            "conv_dim": head.CONVS_DIM,
            "mask_dim": head.MASK_DIM,
            "norm": head.NORM,
            "n_layers": head.TRANSFORMER_ENC_LAYERS,
            "n_heads": former.NHEADS,
            "dim_feedforward": former.DIM_FEEDFORWARD,
            "dropout": former.DROPOUT,
            "pre_norm": former.PRE_NORM,
            "use_checkpoint": head.USE_CHECKPOINT,
        }

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Decode.

        Args:
            features: the backbone's maps (N, C_l, H_l, W_l) by name.

        Returns:
            Mask features (N, mask_dim, H, W) at the finest map's stride, the encoder's map, and the three coarsest
            maps (N, conv_dim, H_l, W_l) of the pyramid, coarsest first.
        """
        *finer, coarsest = self.in_features
        encoded = self.transformer(self.input_proj(features[coarsest]))
        maps = [getattr(self, f"layer_{len(self.in_features)}")(encoded)]
        for number in range(len(finer), 0, -1):
            lateral, output = getattr(self, f"adapter_{number}"), getattr(self, f"layer_{number}")
            side = lateral(features[finer[number - 1]])
            maps.append(output(side + F.interpolate(maps[-1], size=side.shape[-2:], mode="nearest")))
        return self.mask_features(maps[-1]), encoded, maps[:_DECODER_LEVELS]

    forward = forward_features
