"""COBOT: cross-block orchestration of the low-dimensional spaces of a stack of blocks.

Peng et al., "Parameter Efficient Fine-tuning via Cross Block Orchestration for Segment Anything Model", CVPR 2024,
arXiv 2311.17112. With T adapter layers of width V: coefficient sets C (V, T) and a relation matrix S (T, T) shared by
all of them; per layer own coefficients gamma (V,) and a quaternion linear layer Q. For ``h = down(x)`` layer t computes
``h' = Q((C S)[:, t] + gamma_t) * h)`` and goes on from h'. It is switched on by ``COBOT: true`` in the entry of
``lora`` or ``adaptformer``; T is the number of that entry's adapter layers. What it consists of can be left out or
replaced one by one, as in the paper's ablations: see :class:`CobotOptions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .method import Options, expect, one_of


@dataclass(frozen=True)
class CobotOptions(Options):
    """Keys of COBOT; all but the first are the switches of the paper's ablations.

    ``COBOT_COEFFICIENTS``: the sets that scale the space: shared (C S), own (gamma), both of them, or none.
    ``COBOT_RELATION``: fixed keeps S the identity, so that a layer's shared set is its column of C alone; random keeps
    what was drawn at the start, normal with variance 1/T, whose columns have about the identity's length.
    ``COBOT_MIX``: quaternion (4 (V/4)^2 parameters), linear (a dense V x V, no bias), or none.
    """

    cobot: bool = False
    cobot_coefficients: Annotated[str, one_of("both", "shared", "own", "none")] = "both"
    cobot_relation: Annotated[str, one_of("learned", "fixed", "random")] = "learned"
    cobot_mix: Annotated[str, one_of("quaternion", "linear", "none")] = "quaternion"

    def check_cobot(self, key: str, *widths: int) -> None:
        """Raise :class:`MethodError` unless the switches go together and suit ``widths``, the values of ``key``."""
        sets, relation, mix = self.cobot_coefficients, self.cobot_relation, self.cobot_mix
        fits = relation == "learned" or sets in ("both", "shared")
        expect(fits, "COBOT_RELATION", relation, "to be left out without shared sets")
        expect(sets != "none" or mix != "none", "COBOT_MIX", mix, "a layer where COBOT_COEFFICIENTS is none")
        for width in widths:
            expect(mix != "quaternion" or width % 4 == 0, key, width, "a multiple of 4 (COBOT's quaternions)")


class CobotSpace(nn.Module):
    """What all layers share: ``coefficients`` (V, T), ones, and ``relation`` (T, T).

    The relation is the identity at first where it is learned, a buffer where it is random, and None where it is fixed.
    """

    relation: Tensor | None

    def __init__(self, width: int, layers: int, relation: str, made: Mapping[str, Any]) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.ones(width, layers, **made))
        if relation == "random":
            self.register_buffer("relation", torch.randn(layers, layers, **made) / layers**0.5)
        else:
            learned = nn.Parameter(torch.eye(layers, **made)) if relation == "learned" else None
            self.register_parameter("relation", learned)

    def column(self, index: int) -> Tensor:
        """Column ``index`` of C S: (V,)."""
        return self.coefficients[:, index] if self.relation is None else self.coefficients @ self.relation[:, index]


class QuaternionLinear(nn.Module):
    """A linear map V -> W without bias, built from four (V/4, W/4) matrices by the Hamilton product.

    The dense matrix D of ``y = x D`` has the column blocks [r; -i; -j; -k], [i; r; -k; j], [j; k; r; -i], [k; -j; i;
    r]. At the start the real part is 0 and the others are uniform in (0, 1).
    """

    def __init__(self, inputs: int, outputs: int, made: Mapping[str, Any]) -> None:
        super().__init__()
        shape = (inputs // 4, outputs // 4)
        self.r = nn.Parameter(torch.zeros(shape, **made))
        self.i, self.j, self.k = (nn.Parameter(torch.rand(shape, **made)) for _ in range(3))

    def dense(self) -> Tensor:
        """D (V, W)."""
        r, i, j, k = self.r, self.i, self.j, self.k
        columns = ((r, -i, -j, -k), (i, r, -k, j), (j, k, r, -i), (k, -j, i, r))
        return torch.cat([torch.cat(column, dim=0) for column in columns], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., V) -> (..., W)."""
        return F.linear(x, self.dense().t())


class CobotStep(nn.Module):
    """One layer's own ``gamma`` (V,), ones, its mixing layer, and its column ``index`` of the shared space."""

    gamma: nn.Parameter | None

    def __init__(
        self, width: int, index: int, space: CobotSpace | None, options: CobotOptions, made: Mapping[str, Any]
    ) -> None:
        super().__init__()
        own = options.cobot_coefficients in ("both", "own")
        self.register_parameter("gamma", nn.Parameter(torch.ones(width, **made)) if own else None)
        self.mix: nn.Module | None = None
        if options.cobot_mix == "quaternion":
            self.mix = QuaternionLinear(width, width, made)
        elif options.cobot_mix == "linear":
            self.mix = nn.Linear(width, width, bias=False, **made)
        self.space = space
        self.index = index
        self.width = width

    def matrix(self) -> Tensor:
        """The linear map (V, V) of this layer, for column vectors: h' = M h."""
        some = next(self.parameters())
        return self(torch.eye(self.width, dtype=some.dtype, device=some.device)).t()

    def forward(self, h: Tensor) -> Tensor:
        """(..., V) -> (..., V)."""
        shared = None if self.space is None else self.space.column(self.index)
        sets = [values for values in (shared, self.gamma) if values is not None]
        h = h * sum(sets) if sets else h
        return h if self.mix is None else self.mix(h)


def orchestrate(options: CobotOptions, width: int, made: Sequence[Mapping[str, Any]]) -> list[CobotStep]:
    """A step of width V for each of ``made`` (its device and dtype), with what they share."""
    shared = options.cobot_coefficients in ("both", "shared")
    space = CobotSpace(width, len(made), options.cobot_relation, made[0]) if shared else None
    return [CobotStep(width, index, space, options, where) for index, where in enumerate(made)]
