"""The deformable transformer encoder that pixel decoders share (Zhu et al., Deformable DETR, ICLR 2021, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_d2.models.layers.geometry import SinePosition2d, pixel_centres
from peft_d2.models.layers.ms_deform_attn import MSDeformAttn
from peft_d2.models.layers.transformer import init_transformer, run_block


class Levels:
    """Feature maps (N, C, H_l, W_l) of several sizes as one sequence, as deformable attention takes them.

    Attributes:
        values: (N, S, C), one level after the other, row by row.
        sizes, shapes: (H_l, W_l) by level, and the same as a tensor (L, 2).
        starts: where each level starts (L,).
    """

    def __init__(self, maps: Sequence[Tensor]) -> None:
        device = maps[0].device
        self.sizes = [(m.shape[-2], m.shape[-1]) for m in maps]
        self.values = torch.cat([m.flatten(2) for m in maps], dim=2).transpose(1, 2)
        lengths = [height * width for height, width in self.sizes]
        self.shapes = torch.tensor(self.sizes, device=device)
        self.starts = torch.tensor([sum(lengths[:level]) for level in range(len(lengths))], device=device)

    def maps_of(self, values: Tensor) -> list[Tensor]:
        """Values (N, S, C) as maps (N, C, H_l, W_l) again."""
        parts = values.split([height * width for height, width in self.sizes], dim=1)
        return [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, self.sizes, strict=True)]


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each with dropout, residual and norm after it.

    x (N, S, C), position broadcastable to it; the other arguments as :class:`MSDeformAttn` takes them.
    """

    def __init__(self, d_model: int, d_ffn: int, dropout: float, n_levels: int, n_heads: int, n_points: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.dropout2 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.dropout3 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, position: Tensor, reference_points: Tensor, shapes: Tensor, starts: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout1(self.self_attn(x + position, reference_points, x, shapes, starts)))
        hidden = self.linear2(self.dropout2(F.relu(self.linear1(x))))
        return self.norm2(x + self.dropout3(hidden))


class DeformableEncoder(nn.Module):
    """A stack of :class:`DeformableEncoderLayer`; ``use_checkpoint`` recomputes activations in the backward pass."""

    def __init__(self, n_layers: int, *layer: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DeformableEncoderLayer(*layer) for _ in range(n_layers))  # type: ignore[arg-type]
        self.use_checkpoint = False

    def forward(self, x: Tensor, *arguments: Tensor) -> Tensor:
        for layer in self.layers:
            x = run_block(layer, x, *arguments, use_checkpoint=self.use_checkpoint)
        return x


class MultiScaleDeformableTransformer(nn.Module):
    """The encoder over several feature maps, with level embeddings and sine positions.

    Padding is not masked: the maps count as valid throughout, as the published models were trained.
    """

    def __init__(
        self, d_model: int, d_ffn: int, n_layers: int, n_levels: int, n_heads: int, n_points: int, dropout: float
    ) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(n_levels, d_model))
        self.encoder = DeformableEncoder(n_layers, d_model, d_ffn, dropout, n_levels, n_heads, n_points)
        self.position = SinePosition2d(d_model)
        init_transformer(self)
        nn.init.normal_(self.level_embed)

    def forward(self, maps: Sequence[Tensor], code_order: Sequence[int]) -> list[Tensor]:
        """Maps (N, C, H_l, W_l) by level, in any order of sizes -> the same shapes.

        ``code_order``: the maps in whose order position codes and level embeddings are laid along the sequence.
        """
        device, levels = maps[0].device, Levels(maps)
        codes = [
            self.position(*levels.sizes[i], device) + embed
            for i, embed in zip(code_order, self.level_embed, strict=True)
        ]
        points = torch.cat([pixel_centres(*size, device) for size in levels.sizes])
        references = points[None, :, None].expand(len(levels.values), -1, len(maps), -1)
        return levels.maps_of(self.encoder(levels.values, torch.cat(codes), references, levels.shapes, levels.starts))
