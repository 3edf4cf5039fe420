"""The multi-scale deformable attention module (Zhu et al., Deformable DETR, ICLR 2021), with the published names."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from peft_d2.ops import ms_deform_attn_fused


class MSDeformAttn(nn.Module):
    """Attention from each query to a few learned points around its reference point on every level.

    Channels ``d_model`` of queries, memory and output are a multiple of ``n_heads``. ``backend`` is that of
    :func:`peft_d2.ops.ms_deform_attn`.
    """

    backend: str | None = None

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"MSDeformAttn: d_model is {d_model}; it should be a multiple of n_heads = {n_heads}")
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Head m looks along direction m of M around the circle, point p at distance p + 1; attention is uniform."""
        angle = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        # On the unit square rather than the unit circle: the farther coordinate is one pixel a step.
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        bias = direction[:, None, None, :] * distance[None, None, :, None]
        self.sampling_offsets.bias.copy_(bias.expand(-1, self.n_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor,
        input_level_start_index: Tensor,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Sample the levels around each reference point, as far as each query (N, Q, C) wants: (N, Q, C).

        Args:
            reference_points: (N, Q, L, 2) as (x, y) or (N, Q, L, 4) as (centre x, centre y, width, height), in [0, 1].
            input_flatten: (N, S, C), the levels' pixels one level after the other.
            input_spatial_shapes, input_level_start_index: (L, 2) as (H, W), and (L,).
            input_padding_mask: (N, S), True at padding, which then contributes nothing.
        """
        n, queries, _ = query.shape
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        output = ms_deform_attn_fused(
            value.view(n, -1, self.n_heads, self.d_model // self.n_heads),
            input_spatial_shapes,
            input_level_start_index,
            reference_points,
            self.sampling_offsets(query).view(n, queries, self.n_heads, self.n_levels, self.n_points, 2),
            self.attention_weights(query).view(n, queries, self.n_heads, self.n_levels * self.n_points),
            self.backend,
        )
        return self.output_proj(output)
