"""The deformable transformer encoder that pixel decoders share (Zhu et al., Deformable DETR, ICLR 2021, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_d2.models.layers.levels import Levels
from peft_d2.models.layers.ms_deform_attn import MSDeformAttn
from peft_d2.models.layers.position import SinePosition2d
from peft_d2.models.layers.recompute import run_block
from peft_d2.models.layers.transformer import xavier_matrices


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each with dropout, residual and norm after it."""

    def __init__(
        self, d_model: int, d_ffn: int, dropout: float = 0.0, n_levels: int = 3, n_heads: int = 8, n_points: int = 4
    ) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.dropout2 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.dropout3 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference_points: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """x (N, S, C), position broadcastable to it; the other arguments as :class:`MSDeformAttn` takes them."""
        attended = self.self_attn(x + position, reference_points, x, spatial_shapes, level_start_index, padding_mask)
        x = self.norm1(x + self.dropout1(attended))
        hidden = self.linear2(self.dropout2(F.relu(self.linear1(x))))
        return self.norm2(x + self.dropout3(hidden))


class DeformableEncoder(nn.Module):
    """A stack of :class:`DeformableEncoderLayer`.

    ``use_checkpoint`` set to True: each layer's activations are computed again in the backward pass instead of kept.
    """

    def __init__(self, n_layers: int, d_model: int, d_ffn: int, **layer_options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DeformableEncoderLayer(d_model, d_ffn, **layer_options) for _ in range(n_layers))
        self.use_checkpoint = False

    def forward(
        self, x: Tensor, position: Tensor, reference_points: Tensor, spatial_shapes: Tensor, level_start_index: Tensor
    ) -> Tensor:
        """(N, S, C) -> (N, S, C); arguments as in :meth:`DeformableEncoderLayer.forward`."""
        for layer in self.layers:
            inputs = (x, position, reference_points, spatial_shapes, level_start_index)
            x = run_block(layer, *inputs, use_checkpoint=self.use_checkpoint)
        return x


class MultiScaleDeformableTransformer(nn.Module):
    """The encoder over several feature maps, with level embeddings and sine positions.

    Padding is not masked: the maps count as valid throughout, as the published models were trained.

    Args:
        d_model: channels of the maps.
        d_ffn: hidden channels of the feed-forward networks.
        n_layers, n_levels, n_heads, n_points: layers, maps, attention heads, points per head and map.
        dropout: probability in every layer.
    """

    def __init__(
        self,
        d_model: int,
        d_ffn: int,
        n_layers: int,
        n_levels: int,
        n_heads: int = 8,
        n_points: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(n_levels, d_model))
        self.encoder = DeformableEncoder(
            n_layers, d_model, d_ffn, dropout=dropout, n_levels=n_levels, n_heads=n_heads, n_points=n_points
        )
        self.position = SinePosition2d(d_model)
        xavier_matrices(self)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)

    def forward(self, maps: Sequence[Tensor], code_order: Sequence[int] | None = None) -> list[Tensor]:
        """Maps (N, C, H_l, W_l) by level, in any order of sizes -> the same shapes.

        ``code_order``: the maps in whose order position codes and level embeddings are laid along the sequence; None
        is the maps' own.
        """
        device = maps[0].device
        levels = Levels(maps)
        order = range(len(maps)) if code_order is None else code_order
        codes = [
            self.position(*levels.sizes[i], device) + embed for i, embed in zip(order, self.level_embed, strict=True)
        ]
        points = torch.cat([pixel_centres(*size, device) for size in levels.sizes])
        x = self.encoder(
            levels.values,
            torch.cat(codes),
            points[None, :, None].expand(len(levels.values), -1, len(maps), -1),
            levels.shapes,
            levels.starts,
        )
        return levels.maps_of(x)


def pixel_centres(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 2) centres as (x, y) in [0, 1], row by row, float32."""
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
    grid = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid[1], grid[0]], dim=-1).flatten(0, 1)
