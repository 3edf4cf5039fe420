"""Multi-scale deformable attention in plain torch: the compiled operator's oracle and stand-in.

Source: Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", ICLR 2021, equation 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_d2.ops import checks


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sampling_locations_from_offsets(
    reference_points: Tensor, sampling_offsets: Tensor, spatial_shapes: Tensor
) -> Tensor:
    """Locations in units of each level's width and height (Deformable DETR, section 4.1 and appendix A.4).

    Args:
        reference_points: (N, Q, L, 2) as (x, y), or (N, Q, L, 4) as (centre x, centre y, width, height), all in [0, 1].
        sampling_offsets: (N, Q, M, L, P, 2), in pixels of the level for points, in P-ths of half a box for boxes.
        spatial_shapes: (L, 2) as (H, W).

    Returns:
        (N, Q, M, L, P, 2).
    """
    centre = reference_points[:, :, None, :, None, :2]
    if reference_points.shape[-1] == 2:
        width_height = spatial_shapes.flip(-1).to(sampling_offsets.dtype)[None, None, None, :, None, :]
        return centre + sampling_offsets / width_height
    n_points = sampling_offsets.shape[-2]
    return centre + sampling_offsets / n_points * reference_points[:, :, None, :, None, 2:] * 0.5


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The operator by ``grid_sample``; arguments and result as in :func:`peft_d2.ops.ms_deform_attn`."""
    n, _, heads, channels = value.shape
    _, queries, _, levels, points, _ = sampling_locations.shape
    dtype = accumulation_dtype(value.dtype)
    grids = 2 * sampling_locations.to(dtype) - 1
    if n == 0 or queries == 0:
        # grid_sample refuses empty batches; this keeps the result attached to the graph.
        return (grids.sum() * 0 + attention_weights.sum() * 0 + value.sum() * 0).to(value.dtype) + value.new_zeros(
            n, queries, heads * channels
        )
    sampled = []
    for level, (height, width, start) in enumerate(checks.levels_within(spatial_shapes, level_start_index, value)):
        rows = value[:, start : start + height * width].to(dtype)
        image = rows.permute(0, 2, 3, 1).reshape(n * heads, channels, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = attention_weights.to(dtype).transpose(1, 2).reshape(n * heads, 1, queries, levels * points)
    output = (torch.stack(sampled, dim=-2).flatten(-2) * weights).sum(-1)
    return output.view(n, heads * channels, queries).transpose(1, 2).contiguous().to(value.dtype)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """The fused form; arguments and result as in :func:`peft_d2.ops.ms_deform_attn_fused`."""
    dtype = accumulation_dtype(value.dtype)
    locations = sampling_locations_from_offsets(reference_points.to(dtype), sampling_offsets.to(dtype), spatial_shapes)
    weights = attention_logits.to(dtype).softmax(-1).view(sampling_offsets.shape[:-1])
    return ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights)
