"""Sine position codes of feature maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SinePosition2d(nn.Module):
    """Fixed sine and cosine codes, y in the first half of the channels and x in the second.

    Pixel centres count 1..H and 1..W and are normalised to 2 pi, so that the code depends on the relative place alone
    (Carion et al., End-to-End Object Detection with Transformers, ECCV 2020, appendix A.4).

    Args:
        channels: channels of the code, a multiple of 4.
        temperature: base of the geometric progression of wavelengths.
    """

    def __init__(self, channels: int, temperature: float = 10000.0) -> None:
        super().__init__()
        if channels % 4:
            raise ValueError(f"SinePosition2d: channels is {channels}; it should be a multiple of 4")
        self.axis_channels = channels // 2
        self.temperature = temperature

    def forward(self, height: int, width: int, device: torch.device) -> Tensor:
        """Codes of a map without padding: (height * width, channels) float32, row by row."""
        pair = torch.arange(self.axis_channels, dtype=torch.float32, device=device) // 2
        wavelength = self.temperature ** (2 * pair / self.axis_channels)
        rows = self._encode(height, wavelength)[:, None].expand(-1, width, -1)
        columns = self._encode(width, wavelength)[None].expand(height, -1, -1)
        return torch.cat([rows, columns], dim=-1).flatten(0, 1)

    @staticmethod
    def _encode(length: int, wavelength: Tensor) -> Tensor:
        place = torch.arange(1, length + 1, dtype=torch.float32, device=wavelength.device)
        angle = (place / (length + 1e-6) * (2 * math.pi))[:, None] / wavelength
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=-1).flatten(1)

    def extra_repr(self) -> str:
        return f"channels={2 * self.axis_channels}, temperature={self.temperature:g}"
