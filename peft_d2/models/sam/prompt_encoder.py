"""Prompts of Segment Anything as embeddings (Kirillov et al., ICCV 2023, section 3 and appendix A).

Positions are random Fourier features (Tancik et al., NeurIPS 2020). Parameter names are the published ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from peft_d2.models.layers.norm import LayerNorm2d

NOT_A_POINT, BACKGROUND, FOREGROUND = -1, 0, 1
_TOP_LEFT, _BOTTOM_RIGHT = 2, 3


class FourierPositions(nn.Module):
    """Places in [0, 1] x [0, 1] as ``2 n`` sines and cosines of random projections."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, n))

    def forward(self, places: Tensor) -> Tensor:
        """(..., 2), x before y -> (..., 2 n)."""
        with torch.autocast(places.device.type, enabled=False):  # half precision would move the places by pixels
            matrix = self.positional_encoding_gaussian_matrix
            angles = 2 * math.pi * ((2 * places.to(matrix.dtype) - 1) @ matrix)
            return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def grid(self, size: tuple[int, int]) -> Tensor:
        """Of the centres of a map's pixels: (2 n, H, W)."""
        height, width = size
        device = self.positional_encoding_gaussian_matrix.device
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        places = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
        return self(places).permute(2, 0, 1)


class PromptEncoder(nn.Module):
    """Points, boxes and masks.

    Args:
        dim: channels of the embeddings.
        grid: side of the image's embedding.
        image_size: side of the padded image, px.
        mask_channels: hidden channels of the mask's convolutions.
    """

    def __init__(self, dim: int, grid: int, image_size: int, mask_channels: int) -> None:
        super().__init__()
        self.dim = dim
        self.grid = grid
        self.image_size = image_size
        self.pe_layer = FourierPositions(dim // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_channels // 4, kernel_size=2, stride=2),
            LayerNorm2d(mask_channels // 4),
            nn.GELU(),
            nn.Conv2d(mask_channels // 4, mask_channels, kernel_size=2, stride=2),
            LayerNorm2d(mask_channels),
            nn.GELU(),
            nn.Conv2d(mask_channels, dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, dim)

    def dense_positions(self) -> Tensor:
        """Of the image's embedding: (1, C, G, G)."""
        return self.pe_layer.grid((self.grid, self.grid))[None]

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embed B prompts, each of any combination.

        Args:
            points: coordinates (B, P, 2), x before y, in px of the padded image, and labels (B, P): 1 on the object,
                0 beside it, -1 padding.
            boxes: (B, 4), x0 y0 x1 y1, in the same px.
            masks: logits (B, 1, 4 G, 4 G) of an earlier prediction.

        Returns:
            Tokens (B, T, C), none without points and boxes, and what is added to the image's pixels (B, C, G, G).
        """
        given = [x for x in (points[0] if points else None, boxes, masks) if x is not None]
        count = len(given[0]) if given else 1
        tokens = [self.no_mask_embed.weight.new_zeros(count, 0, self.dim)]
        if points is not None:
            tokens.append(self._embed_points(*points, alone=boxes is None))
        if boxes is not None:
            tokens.append(self._embed_boxes(boxes))
        if masks is not None:
            dense = self.mask_downscaling(masks)
        else:
            dense = self.no_mask_embed.weight[:, :, None, None].expand(count, -1, self.grid, self.grid)
        return torch.cat(tokens, dim=1), dense

    def _places(self, coordinates: Tensor) -> Tensor:
        """Of pixels' centres, as shares of the padded image."""
        return self.pe_layer((coordinates.float() + 0.5) / self.image_size)

    def _embed_points(self, coordinates: Tensor, labels: Tensor, alone: bool) -> Tensor:
        if alone:  # where a box would stand
            coordinates = torch.cat([coordinates, coordinates.new_zeros(len(coordinates), 1, 2)], dim=1)
            labels = torch.cat([labels, labels.new_full((len(labels), 1), NOT_A_POINT)], dim=1)
        labels = labels[..., None]
        tokens = torch.where(labels == NOT_A_POINT, self.not_a_point_embed.weight, self._places(coordinates))
        for label in (BACKGROUND, FOREGROUND):
            tokens = torch.where(labels == label, tokens + self._kind(label), tokens)
        return tokens

    def _embed_boxes(self, boxes: Tensor) -> Tensor:
        corners = torch.cat([self._kind(_TOP_LEFT), self._kind(_BOTTOM_RIGHT)])
        return self._places(boxes.reshape(-1, 2, 2)) + corners

    def _kind(self, index: int) -> Tensor:
        """What tells background, foreground and the two corners of boxes apart: (1, C)."""
        return self.point_embeddings[index].get_parameter("weight")
