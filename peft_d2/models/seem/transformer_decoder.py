"""SEEM's transformer decoder for segmentation by class names (Zou et al., NeurIPS 2023, section 3).

Mask2Former's but for its classes: each query's vector is compared with the classes' text vectors. The branches for
prompts (points, strokes, phrases) change nothing of that and are not computed; their tensors are kept for others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from peft_d2.models.layers.transformer import MLP
from peft_d2.models.mask2former.transformer_decoder import MaskedTransformerDecoder
from peft_d2.models.seem.text_encoder import TextEncoder
from peft_d2.models.seem.vocabulary import Vocabulary, vocabularies

_EPS = 1e-7


class LogitScale(nn.Module):
    """Stands for the text encoder where class vectors come from a file: what classes are scored with besides."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones(()))


class Parked(nn.Module):
    """Tensors that nothing here computes with or trains: a published checkpoint is loaded and written whole."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))


class SEEMDecoder(MaskedTransformerDecoder):
    """Class logits are exp(logit_scale) times the cosine of a query's vector with the classes' vectors.

    Args:
        hidden_dim: channels of the queries.
        mask_dim: channels of the mask features.
        vector_dim: channels of the class vectors.
        lang_encoder: has ``logit_scale``; a text encoder computes class vectors besides, and starts frozen.
        vocabularies: the classes in training and in inference.
        spatial_memories: rows of the parked embeddings of spatial prompts; 0 parks none of that branch's tensors.
        layers: further arguments, see :class:`MaskedTransformerDecoder`.
    """

    @configurable
    def __init__(
        self,
        in_channels: int,
        mask_classification: bool = True,
        *,
        hidden_dim: int,
        mask_dim: int,
        vector_dim: int,
        lang_encoder: TextEncoder | LogitScale,
        vocabularies: tuple[Vocabulary, Vocabulary],
        spatial_memories: int,
        **layers: Any,
    ) -> None:
        super().__init__(in_channels, mask_classification, hidden_dim=hidden_dim, **layers)
        self.training_vocabulary, self.vocabulary = vocabularies
        self.lang_encoder = lang_encoder
        for name, parameter in lang_encoder.named_parameters():
            parameter.requires_grad_(name == "logit_scale")
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim, 3)
        self.class_embed = nn.Parameter(torch.empty(hidden_dim, vector_dim))
        nn.init.trunc_normal_(self.class_embed, std=0.02)
        if spatial_memories:
            matrix, memory = (hidden_dim, hidden_dim), (spatial_memories, hidden_dim)
            self.mask_sptial_embed = Parked(**{str(level): matrix for level in range(3)})  # spelled as published
            self.spatial_embed = Parked(weight=memory)
            self.spatial_featured = Parked(weight=memory)
            self.pn_indicator = Parked(weight=(2, hidden_dim))

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int, mask_classification: bool = True) -> dict[str, Any]:
        """Arguments from ``MODEL.SEEM``, ``MODEL.TEXT``, ``MODEL.MASK_FORMER`` and ``MODEL.SEM_SEG_HEAD``.

        Raises:
            ClassVectorsError: see :func:`peft_d2.models.seem.vocabulary.vocabularies`.
        """
        node = cfg.MODEL.SEEM
        return {
            **super().from_config(cfg, in_channels, mask_classification),
            "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
            "vector_dim": cfg.MODEL.DIM_PROJ,
            "lang_encoder": TextEncoder(cfg) if node.TEXT_ENCODER else LogitScale(),
            "vocabularies": vocabularies(cfg),
            "spatial_memories": node.SPATIAL_MEMORIES,
        }

    def classifier(self) -> Callable[[Tensor], Tensor]:
        """Compare with the classes' vectors: in training those of a random template each, anew for each pass."""
        if self.training:
            rows = self.training_vocabulary.training_rows(self.lang_encoder)
        else:
            rows = self.vocabulary.rows(self.lang_encoder)
        return partial(self.class_logits, rows=rows.to(self.class_embed))

    def class_logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Normalised hidden states (N, Q, C) and class vectors (K + 1, D) -> (N, Q, K + 1), in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            query = hidden.float() @ self.class_embed
            query = query / (query.norm(dim=-1, keepdim=True) + _EPS)
            return self.lang_encoder.logit_scale.exp() * query @ rows.T
