"""Boxes, as corners or as detection transformers predict them: (centre x, centre y, width, height), relative."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torchvision.ops import box_convert

to_corners = partial(box_convert, in_fmt="cxcywh", out_fmt="xyxy")  # (..., 4) -> x0, y0, x1, y1
to_centres = partial(box_convert, in_fmt="xyxy", out_fmt="cxcywh")
_EPSILON = 1e-6  # keeps the overlap of boxes without area finite


def inverse_sigmoid(x: Tensor) -> Tensor:
    """The logits of ``x``, clamped to [0, 1]; x and 1 - x are at least 1e-5, so that logits are finite."""
    x = x.clamp(0, 1)
    return (x.clamp(min=1e-5) / (1 - x).clamp(min=1e-5)).log()


def mask_boxes(masks: Tensor) -> Tensor:
    """Tight boxes (M, 4) float32 of masks (M, H, W): x0, y0 and, one past the last pixel, x1, y1; zeros where empty."""
    sides = []
    # The largest of bytes is found many times faster than any of bools; exported graphs have no view of other numbers.
    exported = torch.compiler.is_compiling() or torch.jit.is_tracing()
    flags = masks.to(torch.uint8) if exported else masks.view(torch.uint8)
    for hit in (flags.amax(1), flags.amax(2)):  # columns, rows
        sides.append((hit.argmax(1), hit.shape[1] - hit.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = sides
    boxes = torch.stack([x0, y0, x1, y1], dim=1).float()
    return boxes * hit.any(1)[:, None]


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union (...) in [-1, 1] (Rezatofighi et al., CVPR 2019, algorithm 1).

    ``a`` and ``b`` are corners (..., 4), broadcast against each other: ``a[:, None], b[None]`` compares all pairs.
    """
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    outer = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner
    return inner / (union + _EPSILON) - (outer - union) / (outer + _EPSILON)
