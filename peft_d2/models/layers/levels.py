"""Feature maps of several sizes as one sequence, as deformable attention takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Levels:
    """Several feature maps.

    Args:
        maps: (N, C, H_l, W_l) each.

    Attributes:
        values: (N, S, C), one level after the other, row by row.
        sizes: (H_l, W_l) by level.
        shapes, starts: the same as a tensor (L, 2), and where each level starts (L,).
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
