"""The multi-scale masked transformer decoder (Cheng et al., Mask2Former, CVPR 2022, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn

from peft_d2.models.checks import expect_numbers, expect_width
from peft_d2.models.layers.geometry import SinePosition2d
from peft_d2.models.layers.transformer import MLP, AttentionLayer, FFNLayer, input_projections
from peft_d2.models.registration import TRANSFORMER_DECODER_REGISTRY, entry

_LEVELS = 3


class MaskedTransformerDecoder(nn.Module):
    """Queries attend to one scale after the other, each only where it predicts its mask to be.

    ``MODEL.MASK_FORMER`` describes it: DEC_LAYERS counts the prediction made from the queries themselves, before any
    layer. A decoder derives from it: it adds what its :meth:`classifier` needs. ``in_channels`` are of the features.
    """

    mask_embed: nn.Module

    def __init__(self, cfg: CfgNode, in_channels: int, mask_classification: bool = True) -> None:
        super().__init__()
        former, path = cfg.MODEL.MASK_FORMER, "MODEL.MASK_FORMER"
        expect_numbers(path, former, DEC_LAYERS=1, NUM_OBJECT_QUERIES=1, DIM_FEEDFORWARD=1)
        expect_width(path, former)
        channels, layers = former.HIDDEN_DIM, range(former.DEC_LAYERS - 1)
        attention = {"d_model": channels, "n_heads": former.NHEADS, "pre_norm": former.PRE_NORM}
        self.num_heads = former.NHEADS
        self.position = SinePosition2d(channels)
        self.transformer_self_attention_layers = nn.ModuleList(AttentionLayer(**attention) for _ in layers)
        self.transformer_cross_attention_layers = nn.ModuleList(
            AttentionLayer(**attention, name="multihead_attn") for _ in layers
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FFNLayer(channels, former.DIM_FEEDFORWARD, pre_norm=former.PRE_NORM) for _ in layers
        )
        self.decoder_norm = nn.LayerNorm(channels)
        self.query_feat = nn.Embedding(former.NUM_OBJECT_QUERIES, channels)
        self.query_embed = nn.Embedding(former.NUM_OBJECT_QUERIES, channels)
        self.level_embed = nn.Embedding(_LEVELS, channels)
        self.input_proj = input_projections(in_channels, channels, _LEVELS, former.ENFORCE_INPUT_PROJ)

    def forward(self, features: Sequence[Tensor], mask_features: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """``pred_logits`` (N, Q, K + 1) and ``pred_masks`` (N, Q, H, W) of the last layer, and of all before it.

        The latter, ``aux_outputs``, begin with the raw queries'. ``features`` are three maps (N, C, H_l, W_l), coarsest
        first; ``mask_features`` (N, mask_dim, H, W). ``mask`` is ignored: padding is attended to.
        """
        if len(features) != _LEVELS:
            raise ValueError(f"the transformer decoder got {len(features)} feature maps; it needs {_LEVELS}")
        sizes = [(f.shape[-2], f.shape[-1]) for f in features]
        values = [self._flatten(level, feature) for level, feature in enumerate(features)]
        keys = [value + self.position(*size, value.device)[:, None] for value, size in zip(values, sizes, strict=True)]
        batch = mask_features.shape[0]
        position = self.query_embed.weight[:, None].expand(-1, batch, -1)
        x = self.query_feat.weight[:, None].expand(-1, batch, -1)
        classify = self.classifier()
        predictions = [self.predict(x, mask_features, classify)]
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for number, (cross_attention, self_attention, ffn) in enumerate(layers):
            level = number % _LEVELS
            blocked = self.attention_mask(predictions[-1]["pred_masks"], sizes[level])
            x = cross_attention(x, position, (keys[level], values[level]), blocked)
            x = ffn(self_attention(x, position))
            predictions.append(self.predict(x, mask_features, classify))
        return {**predictions[-1], "aux_outputs": predictions[:-1]}

    def classifier(self) -> Callable[[Tensor], Tensor]:
        """What scores the normalised hidden states (N, Q, C) in one pass: a function to logits (N, Q, K + 1)."""
        raise NotImplementedError

    def predict(self, x: Tensor, mask_features: Tensor, classify: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Class and mask logits of hidden states (Q, N, C)."""
        hidden = self.decoder_norm(x).transpose(0, 1)
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embed(hidden), mask_features)
        return {"pred_logits": classify(hidden), "pred_masks": masks}

    @torch.no_grad()
    def attention_mask(self, masks: Tensor, size: tuple[int, int]) -> Tensor:
        """(N * heads, Q, h * w), True where a query must not attend: outside of its mask, unless that is empty."""
        resized = F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
        blocked = resized.sigmoid().flatten(2) < 0.5
        blocked &= ~blocked.all(-1, keepdim=True)
        return blocked.repeat_interleave(self.num_heads, dim=0)

    def _flatten(self, level: int, feature: Tensor) -> Tensor:
        x = self.input_proj[level](feature).flatten(2) + self.level_embed.weight[level][:, None]
        return x.permute(2, 0, 1)


@entry(
    TRANSFORMER_DECODER_REGISTRY, "PD2MultiScaleMaskedTransformerDecoder", upstream="MultiScaleMaskedTransformerDecoder"
)
class MultiScaleMaskedTransformerDecoder(MaskedTransformerDecoder):
    """Mask2Former's: one linear layer scores the classes, of which the last is no-object."""

    # The published code tells old keys from new ones by this number in a state dict's metadata.
    _version = 2

    def __init__(self, cfg: CfgNode, in_channels: int, mask_classification: bool = True) -> None:
        super().__init__(cfg, in_channels, mask_classification)
        channels, head = cfg.MODEL.MASK_FORMER.HIDDEN_DIM, cfg.MODEL.SEM_SEG_HEAD
        self.class_embed = nn.Linear(channels, head.NUM_CLASSES + 1)
        self.mask_embed = MLP(channels, channels, head.MASK_DIM, 3)

    def classifier(self) -> Callable[[Tensor], Tensor]:
        return self.class_embed
