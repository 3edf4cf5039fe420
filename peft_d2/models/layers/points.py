"""Sampling masks at points, as PointRend (Kirillov et al., CVPR 2020, section 3.1) does for its losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of ``maps`` at ``points``; zero outside.

    Args:
        maps: (N, C, H, W).
        points: (N, P, 2) as (x, y), in units of the map's width and height.

    Returns:
        (N, C, P).
    """
    if maps.shape[0] == 0:  # grid_sample refuses empty batches; this keeps the result attached to the graph
        return maps.flatten(2)[..., :1].expand(-1, -1, points.shape[1])
    return F.grid_sample(maps, 2.0 * points[:, :, None] - 1.0, align_corners=False).squeeze(3)


def sample_shared_points(masks: Tensor, points: Tensor) -> Tensor:
    """Values of all ``masks`` (M, H, W) at the same ``points`` (P, 2) -> (M, P).

    The masks are the channels of one map, so that each point's corners and weights are worked out once.
    """
    if masks.shape[0] == 0:
        return masks.new_zeros(0, points.shape[0])
    return sample_points(masks[None], points[None])[0]


@torch.no_grad()
def uncertain_points(logits: Tensor, count: int, oversample_ratio: float, importance_ratio: float) -> Tensor:
    """Random points of which a share lies where the mask is least certain.

    Args:
        logits: (N, H, W) mask logits; the uncertainty of a point is -|its logit|.
        count: points per mask, P.
        oversample_ratio: candidates per point.
        importance_ratio: share of the P points taken from the candidates by uncertainty; the others are uniform.

    Returns:
        (N, P, 2) as (x, y) in [0, 1].
    """
    n = logits.shape[0]
    candidates = torch.rand(n, int(count * oversample_ratio), 2, device=logits.device)
    certainty = sample_points(logits[:, None], candidates).squeeze(1).abs()
    chosen = int(importance_ratio * count)
    # The order among the chosen does not matter: every loss sums over them.
    index = certainty.topk(chosen, dim=1, largest=False, sorted=False).indices
    points = candidates.gather(1, index[..., None].expand(-1, -1, 2))
    if chosen == count:
        return points
    return torch.cat([points, torch.rand(n, count - chosen, 2, device=logits.device)], dim=1)
