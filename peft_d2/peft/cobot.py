"""COBOT: cross-block orchestration of the low-dimensional spaces of a stack of blocks.

Peng et al., "Parameter Efficient Fine-tuning via Cross Block Orchestration for Segment Anything Model", CVPR 2024,
arXiv 2311.17112. With T places of width V: coefficient sets C (V, T) and a relation matrix S (T, T) shared by all
places; per place own coefficients gamma (V,) and a quaternion linear layer Q. For ``h = down(x)`` place t computes
``h' = Q((C S)[:, t] + gamma_t) * h)`` and goes on from h'. It is switched on by ``COBOT: true`` in the entry of
``lora`` or ``adaptformer``; T is the number of that entry's places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CobotSpace(nn.Module):
    """What all places share: ``coefficients`` (V, T), ones, and ``relation`` (T, T), identity."""

    def __init__(self, width: int, places: int, tensor_options: Mapping[str, Any]) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.ones(width, places, **tensor_options))
        self.relation = nn.Parameter(torch.eye(places, **tensor_options))


class QuaternionLinear(nn.Module):
    """A linear map V -> W without bias, built from four (V/4, W/4) matrices by the Hamilton product.

    The dense matrix D of ``y = x D`` has the column blocks [r; -i; -j; -k], [i; r; -k; j], [j; k; r; -i], [k; -j; i;
    r]. At the start the real part is 0 and the others are uniform in (0, 1).
    """

    def __init__(self, inputs: int, outputs: int, tensor_options: Mapping[str, Any]) -> None:
        super().__init__()
        shape = (inputs // 4, outputs // 4)
        self.r = nn.Parameter(torch.zeros(shape, **tensor_options))
        self.i = nn.Parameter(torch.rand(shape, **tensor_options))
        self.j = nn.Parameter(torch.rand(shape, **tensor_options))
        self.k = nn.Parameter(torch.rand(shape, **tensor_options))

    def dense(self) -> Tensor:
        """D (V, W)."""
        r, i, j, k = self.r, self.i, self.j, self.k
        columns = ((r, -i, -j, -k), (i, r, -k, j), (j, k, r, -i), (k, -j, i, r))
        return torch.cat([torch.cat(column, dim=0) for column in columns], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., V) -> (..., W)."""
        return F.linear(x, self.dense().t())


class CobotPlace(nn.Module):
    """One place: its own ``gamma`` (V,), ones, its quaternion layer, and the column ``index`` of the shared space."""

    def __init__(self, width: int, index: int, space: CobotSpace, tensor_options: Mapping[str, Any]) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, **tensor_options))
        self.mix = QuaternionLinear(width, width, tensor_options)
        self.space = space
        self.index = index

    def coefficients(self) -> Tensor:
        """Column ``index`` of C S, plus gamma: (V,)."""
        return self.space.coefficients @ self.space.relation[:, self.index] + self.gamma

    def matrix(self) -> Tensor:
        """The place's linear map (V, V) for column vectors: h' = M h."""
        return self.mix.dense().t() * self.coefficients()

    def forward(self, h: Tensor) -> Tensor:
        """(..., V) -> (..., V)."""
        return self.mix(self.coefficients() * h)
