"""Multi-scale deformable attention in plain torch: the compiled operator's oracle and stand-in.

Source: Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", ICLR 2021, equation 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
        width_height = spatial_shapes.flip(-1).clamp(min=1).to(sampling_offsets.dtype)
        return centre + sampling_offsets / width_height[None, None, None, :, None, :]
    n_points = sampling_offsets.shape[-2]
    return centre + sampling_offsets / n_points * reference_points[:, :, None, :, None, 2:] * 0.5


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    gather: bool = False,
) -> Tensor:
    """The operator as one weighted sum of rows of value; arguments and result as in :func:`peft_d2.ops.ms_deform_attn`.

    With ``reference_points`` the other two are offsets and logits: :func:`peft_d2.ops.ms_deform_attn_fused`. No shape
    depends on the numbers in a tensor, so that it can be exported. ``gather`` reads the rows by plain indexing instead
    of an embedding bag, which other runtimes than torch do not have.
    """
    n, rows, heads, channels = value.shape
    queries, dtype = sampling_locations.shape[1], accumulation_dtype(value.dtype)
    if reference_points is not None:
        offsets = sampling_locations.to(dtype)
        sampling_locations = sampling_locations_from_offsets(reference_points.to(dtype), offsets, spatial_shapes)
        attention_weights = attention_weights.to(dtype).softmax(-1).view(offsets.shape[:-1])
    if value.numel() == 0 or sampling_locations.numel() == 0:
        # Nothing to sample: zeros, which stay attached to the graph.
        parts = [x.flatten()[:0].to(value.dtype) for x in (value, sampling_locations, attention_weights)]
        return value.new_zeros(n, queries, heads * channels) + torch.cat(parts).sum()

    shapes, starts = (x.to(value.device, torch.int64) for x in (spatial_shapes, level_start_index))
    # The two pixels next to a point along each axis and their weights; the last axis is (lower, upper).
    size = shapes.flip(-1)[:, None]  # (L, 1, 2) as (W, H)
    pixel = sampling_locations.to(dtype) * size - 0.5
    touches = ((pixel > -1) & (pixel < size)).all(-1, keepdim=True)
    pixel = torch.where(touches, pixel, 0.0)
    lower = pixel.floor()
    fraction = pixel - lower
    neighbour = torch.stack([lower, lower + 1], -1).long()
    inside = (neighbour >= 0) & (neighbour < size[..., None]) & touches[..., None]
    (x, y), (x_inside, y_inside) = neighbour.unbind(-2), inside.unbind(-2)
    x_weight, y_weight = torch.stack([1 - fraction, fraction], -1).unbind(-2)

    # The four corners as rows of (N * S * M, D). Those outside read one more row, of zeros.
    corner_inside = y_inside[..., :, None] & x_inside[..., None, :]
    row = starts.view(-1, 1, 1, 1) + y[..., :, None] * shapes[:, 1].view(-1, 1, 1, 1) + x[..., None, :]
    batch, head = (torch.arange(count, device=value.device) for count in (n, heads))
    row = (row + batch.view(-1, *[1] * 6) * rows) * heads + head.view(-1, 1, 1, 1, 1)
    row = torch.where(corner_inside, row, n * rows * heads)
    weight = attention_weights.to(dtype)[..., None, None] * y_weight[..., :, None] * x_weight[..., None, :]
    weight = torch.where(corner_inside, weight, 0.0)
    table = torch.cat([value.to(dtype).reshape(-1, channels), value.new_zeros(1, channels, dtype=dtype)])
    row, weight = (x.flatten(3).flatten(0, 2) for x in (row, weight))  # (N * Q * M, L * P * 4)
    if gather:
        levels = zip(*(x.chunk(shapes.shape[0], 1) for x in (row, weight)), strict=True)
        output = torch.stack([(table[r] * w[..., None]).sum(1) for r, w in levels]).sum(0)
    else:
        output = F.embedding_bag(row, table, mode="sum", per_sample_weights=weight)
    return output.view(n, queries, heads * channels).to(value.dtype)
