"""The deformable transformer decoder that refines boxes layer by layer.

Sources: Zhu et al., Deformable DETR, ICLR 2021, section 4 and appendix A.4; Liu et al., DAB-DETR, ICLR 2022; Zhang et
al., DINO, ICLR 2023, section 3.5 (boxes look forward twice). Sequences are (N, length, C) throughout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_d2.models.layers.boxes import inverse_sigmoid
from peft_d2.models.layers.deformable_encoder import Levels
from peft_d2.models.layers.ms_deform_attn import MSDeformAttn
from peft_d2.models.layers.position import box_code
from peft_d2.models.layers.transformer import MLP, init_transformer


class DeformableDecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention and a feed-forward network, each with dropout, residual and norm.

    The norms are numbered as published: ``norm2`` follows the self-attention, ``norm1`` the cross-attention.
    """

    def __init__(
        self, d_model: int, d_ffn: int, dropout: float = 0.0, n_levels: int = 4, n_heads: int = 8, n_points: int = 4
    ) -> None:
        super().__init__()
        self.cross_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.dropout2 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.dropout3 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.dropout4 = nn.Dropout(dropout)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, memory: Levels, blocked: Tensor | None = None
    ) -> Tensor:
        """Let the queries see each other, then the maps, each around its box.

        Args:
            x, position: (N, Q, C) queries and what is added to them for attending.
            reference: (N, Q, 4) boxes (centre x, centre y, width, height) in [0, 1].
            memory: what the queries look at.
            blocked: (Q, Q), True where a query must not see another.

        Returns:
            (N, Q, C).
        """
        query = x + position
        attended = self.self_attn(query, query, x, attn_mask=blocked, need_weights=False)[0]
        x = self.norm2(x + self.dropout2(attended))
        references = reference[:, :, None].expand(-1, -1, len(memory.sizes), -1)
        looked = self.cross_attn(x + position, references, memory.values, memory.shapes, memory.starts)
        x = self.norm1(x + self.dropout1(looked))
        hidden = self.linear2(self.dropout3(F.relu(self.linear1(x))))
        return self.norm3(x + self.dropout4(hidden))


class DeformableDecoder(nn.Module):
    """A stack of :class:`DeformableDecoderLayer` that refines its reference boxes.

    Args:
        n_layers, d_model, d_ffn: layers, channels, hidden channels of the feed-forward networks.
        norm: applied to what each layer gives out, not to what it passes on.
        layer_options: further arguments of the layers.

    Before it is called, ``bbox_embed`` has to be set: per layer a module (..., d_model) -> (..., 4), whose output is
    added to the boxes' logits.
    """

    bbox_embed: nn.ModuleList

    def __init__(self, n_layers: int, d_model: int, d_ffn: int, norm: nn.LayerNorm, **layer_options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DeformableDecoderLayer(d_model, d_ffn, **layer_options) for _ in range(n_layers))
        self.norm = norm
        self.ref_point_head = MLP(2 * d_model, d_model, d_model, 2)
        self.coordinate_channels = d_model // 2
        init_transformer(self)

    def forward(
        self, x: Tensor, box_logits: Tensor, memory: Levels, blocked: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Refine the boxes layer by layer, in float32 whatever the autocast type: half precision is too coarse.

        Args:
            x: (N, Q, C) content of the queries.
            box_logits: (N, Q, 4), the sigmoid gives boxes (centre x, centre y, width, height).
            memory, blocked: as in :meth:`DeformableDecoderLayer.forward`.

        Returns:
            Each layer's normalised hidden states (N, Q, C), and the boxes (N, Q, 4) that each layer started from and,
            last, those that the last layer arrived at. A layer starts from a detached copy; what is returned still
            depends on the layer that made it.
        """
        with torch.autocast(x.device.type, enabled=False):
            x, reference = x.float(), box_logits.float().sigmoid()
            hidden, references = [], [reference]
            for layer, box_head in zip(self.layers, self.bbox_embed, strict=True):
                position = self.ref_point_head(box_code(reference, self.coordinate_channels))
                x = layer(x, position, reference, memory, blocked)
                references.append((box_head(x) + inverse_sigmoid(reference)).sigmoid())
                reference = references[-1].detach()
                hidden.append(self.norm(x))
        return hidden, references
