"""The multi-scale masked transformer decoder (Cheng et al., Mask2Former, CVPR 2022, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from peft_d2.models.checks import expect_at_least, expect_width
from peft_d2.models.layers.position import SinePosition2d
from peft_d2.models.layers.projection import input_projections
from peft_d2.models.layers.transformer import MLP, CrossAttentionLayer, FFNLayer, SelfAttentionLayer

_LEVELS = 3


class MaskedTransformerDecoder(nn.Module):
    """Queries attend to one scale after the other, each only where it predicts its mask to be.

    A decoder derives from it: it adds ``mask_embed`` and what its :meth:`classifier` needs.

    Args:
        in_channels: of the multi-scale features.
        hidden_dim, n_heads, dim_feedforward: of the layers.
        num_queries: Q.
        n_layers: layers; the predictions are one more, as the first is made from the queries themselves.
        pre_norm: see :class:`peft_d2.models.layers.transformer.SelfAttentionLayer`.
        enforce_input_projection: project the features even where their channels fit.
    """

    mask_embed: nn.Module

    def __init__(
        self,
        in_channels: int,
        mask_classification: bool = True,
        *,
        hidden_dim: int,
        num_queries: int,
        n_heads: int,
        dim_feedforward: int,
        n_layers: int,
        pre_norm: bool,
        enforce_input_projection: bool,
    ) -> None:
        super().__init__()
        if not mask_classification:
            raise ValueError(f"{type(self).__name__}: mask_classification is False; only True is supported")
        self.num_heads = n_heads
        self.position = SinePosition2d(hidden_dim)
        layers = range(n_layers)
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(hidden_dim, n_heads, pre_norm=pre_norm) for _ in layers
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(hidden_dim, n_heads, pre_norm=pre_norm) for _ in layers
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FFNLayer(hidden_dim, dim_feedforward, pre_norm=pre_norm) for _ in layers
        )
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(_LEVELS, hidden_dim)
        self.input_proj = input_projections(in_channels, hidden_dim, _LEVELS, enforce_input_projection)

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int, mask_classification: bool = True) -> dict[str, Any]:
        """Arguments from ``MODEL.MASK_FORMER``.

        Raises:
            ModelConfigError: values that are out of range or do not go together.
        """
        former, path = cfg.MODEL.MASK_FORMER, "MODEL.MASK_FORMER"
        expect_at_least(path, former, DEC_LAYERS=1, NUM_OBJECT_QUERIES=1, DIM_FEEDFORWARD=1)
        expect_width(path, former)
        return {
            "in_channels": in_channels,
            "mask_classification": mask_classification,
            "hidden_dim": former.HIDDEN_DIM,
            "num_queries": former.NUM_OBJECT_QUERIES,
            "n_heads": former.NHEADS,
            "dim_feedforward": former.DIM_FEEDFORWARD,
            # DEC_LAYERS counts the prediction made from the queries themselves, before any layer.
            "n_layers": former.DEC_LAYERS - 1,
            "pre_norm": former.PRE_NORM,
            "enforce_input_projection": former.ENFORCE_INPUT_PROJ,
        }

    def forward(self, features: Sequence[Tensor], mask_features: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """Predict classes and masks.

        Args:
            features: three maps (N, C, H_l, W_l), coarsest first.
            mask_features: (N, mask_dim, H, W).
            mask: ignored: padding is attended to.

        Returns:
            ``pred_logits`` (N, Q, K + 1) and ``pred_masks`` (N, Q, H, W) of the last layer, and ``aux_outputs``, the
            same of the raw queries and of every layer but the last.
        """
        if len(features) != _LEVELS:
            raise ValueError(f"the transformer decoder got {len(features)} feature maps; it needs {_LEVELS}")
        sizes = [(f.shape[-2], f.shape[-1]) for f in features]
        values = [self._flatten(level, feature) for level, feature in enumerate(features)]
        keys = [value + self.position(*size, value.device)[:, None] for value, size in zip(values, sizes, strict=True)]
        batch = mask_features.shape[0]
        place = self.query_embed.weight[:, None].expand(-1, batch, -1)
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
            x = cross_attention(x, keys[level], values[level], place, blocked)
            x = ffn(self_attention(x, place))
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
        """(N * heads, Q, h * w), True where a query must not attend: outside of its predicted mask (section 3.2.1).

        A query whose mask is empty attends everywhere.
        """
        resized = F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
        blocked = resized.sigmoid().flatten(2) < 0.5
        blocked &= ~blocked.all(-1, keepdim=True)
        return blocked.repeat_interleave(self.num_heads, dim=0)

    def _flatten(self, level: int, feature: Tensor) -> Tensor:
        x = self.input_proj[level](feature).flatten(2) + self.level_embed.weight[level][:, None]
        return x.permute(2, 0, 1)


class MultiScaleMaskedTransformerDecoder(MaskedTransformerDecoder):
    """Mask2Former's: one linear layer scores the classes.

    Args:
        num_classes: K; the classifier has one more output, no-object.
        mask_dim: channels of the mask features.
        layers: further arguments, see :class:`MaskedTransformerDecoder`.
    """

    # The published code tells old keys from new ones by this number in a state dict's metadata.
    _version = 2

    @configurable
    def __init__(
        self,
        in_channels: int,
        mask_classification: bool = True,
        *,
        num_classes: int,
        hidden_dim: int,
        mask_dim: int,
        **layers: Any,
    ) -> None:
        super().__init__(in_channels, mask_classification, hidden_dim=hidden_dim, **layers)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim, 3)

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int, mask_classification: bool = True) -> dict[str, Any]:
        """Arguments from ``MODEL.MASK_FORMER`` and ``MODEL.SEM_SEG_HEAD``."""
        head = cfg.MODEL.SEM_SEG_HEAD
        layers = super().from_config(cfg, in_channels, mask_classification)
        return {**layers, "num_classes": head.NUM_CLASSES, "mask_dim": head.MASK_DIM}

    def classifier(self) -> Callable[[Tensor], Tensor]:
        """``class_embed``."""
        return self.class_embed
