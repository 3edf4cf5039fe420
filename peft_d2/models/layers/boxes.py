"""Boxes in the form that detection transformers predict: (centre x, centre y, width, height), relative to the image."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert

_EPSILON = 1e-6  # keeps the overlap of boxes without area finite


def inverse_sigmoid(x: Tensor, margin: float = 1e-5) -> Tensor:
    """The logits of ``x``, which is clamped to [0, 1]; both x and 1 - x count as at least ``margin``."""
    x = x.clamp(0, 1)
    return (x.clamp(min=margin) / (1 - x).clamp(min=margin)).log()


def to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size -> x0, y0, x1, y1."""
    return box_convert(boxes, "cxcywh", "xyxy")


def to_centres(boxes: Tensor) -> Tensor:
    """(..., 4) x0, y0, x1, y1 -> centre and size."""
    return box_convert(boxes, "xyxy", "cxcywh")


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union of boxes given by corners (Rezatofighi et al., CVPR 2019, algorithm 1).

    Args:
        a, b: (..., 4), broadcast against each other: ``a[:, None], b[None]`` compares all pairs.

    Returns:
        (...) in [-1, 1].
    """
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    outer = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner
    return inner / (union + _EPSILON) - (outer - union) / (outer + _EPSILON)
