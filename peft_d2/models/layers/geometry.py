"""Boxes, sine position codes and pixel centres.

Boxes are as detection transformers predict them: (centre x, centre y, width, height), relative to the image.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

to_corners = partial(box_convert, in_fmt="cxcywh", out_fmt="xyxy")  # (..., 4) -> x0, y0, x1, y1
to_centres = partial(box_convert, in_fmt="xyxy", out_fmt="cxcywh")
_TEMPERATURE = 10000.0


def inverse_sigmoid(x: Tensor, margin: float = 1e-5) -> Tensor:
    """The logits of ``x``, which is clamped to [0, 1]; both x and 1 - x count as at least ``margin``."""
    x = x.clamp(0, 1)
    return (x.clamp(min=margin) / (1 - x).clamp(min=margin)).log()


def sine_code(place: Tensor, channels: int) -> Tensor:
    """Sines and cosines of ``place`` in turn: (...) -> (..., channels).

    Wavelengths grow geometrically, by a factor of 10,000 over the channels; 1 is a full turn of the shortest.
    """
    pair = torch.arange(channels, dtype=torch.float32, device=place.device) // 2
    wavelength = _TEMPERATURE ** (2 * pair / channels)
    angle = (place * (2 * math.pi))[..., None] / wavelength
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)


def box_code(boxes: Tensor, channels: int) -> Tensor:
    """Code of boxes (..., 4) as (x, y, width, height) in [0, 1]: (..., 4 * channels) in the order y, x, width, height.

    Source: Liu et al., DAB-DETR, ICLR 2022, section 3.2 (equation 4).
    """
    return sine_code(boxes[..., [1, 0, 2, 3]], channels).flatten(-2)


class SinePosition2d(nn.Module):
    """Fixed sine and cosine codes of ``channels``, a multiple of 4: y in the first half of them and x in the second.

    Pixel centres count 1..H and 1..W and are normalised to 2 pi, so that the code depends on the relative place alone
    (Carion et al., End-to-End Object Detection with Transformers, ECCV 2020, appendix A.4).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % 4:
            raise ValueError(f"SinePosition2d: channels is {channels}; it should be a multiple of 4")
        self.channels = channels

    def forward(self, height: int, width: int, device: torch.device) -> Tensor:
        """Codes of a map without padding: (height * width, channels) float32, row by row."""
        y, x = (
            sine_code(torch.arange(1, n + 1, dtype=torch.float32, device=device) / (n + 1e-6), self.channels // 2)
            for n in (height, width)
        )
        return torch.cat([y[:, None].expand(-1, width, -1), x.expand(height, -1, -1)], dim=-1).flatten(0, 1)


def pixel_centres(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 2) centres as (x, y) in [0, 1], row by row, float32."""
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1)
