"""Inputs of the operator for tests: random, or the published goldens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peft_d2 import ops

GOLDENS = Path(__file__).parents[1] / "goldens" / "msda_cases.npz"
LEVELS = ((5, 7), (1, 1), (4, 3))

# Type of value, type of offsets and logits, relative tolerance.
DTYPES = [
    (torch.float64, torch.float64, 1e-12),
    (torch.float32, torch.float32, 2e-5),
    (torch.bfloat16, torch.bfloat16, 1e-2),
    (torch.bfloat16, torch.float32, 1e-2),
    (torch.float16, torch.float16, 2e-3),
    (torch.float16, torch.float32, 2e-3),
]

# Levels that do not fill value's 48 rows one after the other: (H, W) of each, the row where each begins, what is said.
BAD_LEVELS = {
    "larger": ([[6, 8], [2, 2], [5, 4]], [0, 48, 52], "have 72 pixels; they should fill value's S = 48 rows"),
    "fewer pixels": ([[5, 7], [1, 1], [4, 2]], [0, 35, 36], "have 44 pixels"),
    "beyond value": ([[5, 7], [1, 1], [4, 3]], [40, 75, 76], "level 0 .* begins at row 40 .* should begin at row 0"),
    "overlapping": ([[5, 7], [1, 1], [4, 3]], [0, 0, 36], "level 1 .* should begin at row 35"),
    "swapped": ([[5, 7], [1, 1], [4, 3]], [13, 12, 0], "level 0"),
    "a gap": ([[5, 7], [1, 1], [4, 2]], [0, 35, 40], "level 2"),
    "negative sizes": ([[-5, -7], [1, 1], [4, 3]], [0, 35, 36], "level 0 is -5 x -7"),
    "an empty level of no size": ([[5, 7], [0, 2**40], [13, 1]], [0, 35, 35], "level 1 is 0 x"),
    "one negative size": ([[-5, 7], [1, 83], [0, 3]], [0, -35, 48], "level 0 is -5 x 7"),
    "sum beyond 64 bits": ([[48, 1], [0, 1], [0, 1]], [2**63 - 48, 0, 0], "level 0"),
    "product beyond 64 bits": ([[2**32, 2**32], [5, 7], [13, 1]], [0, 0, 35], "level 0"),
}


@dataclass
class Case:
    """Arguments of one call: of the fused form, or without reference points of the plain one."""

    value: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor
    reference: Tensor | None
    points: Tensor
    weights: Tensor

    @property
    def arguments(self) -> list[Tensor]:
        """As the public function of the case's form takes them."""
        return [x for x in vars(self).values() if x is not None]

    def run(self, backend: str | None = None) -> Tensor:
        function = ops.ms_deform_attn if self.reference is None else ops.ms_deform_attn_fused
        return function(*self.arguments, backend=backend)

    def to(self, dtype: torch.dtype) -> Case:
        """Everything in one type, detached."""
        return Case(
            *(x.detach().to(dtype) if x is not None and x.is_floating_point() else x for x in vars(self).values())
        )

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that have gradients, by name, with gradients switched on."""
        tensors = {name: x for name, x in vars(self).items() if x is not None and x.is_floating_point()}
        return {name: x.requires_grad_() for name, x in tensors.items()}

    def run_with_gradients(self, grad_output: Tensor, backend: str | None = None) -> dict[str, Tensor]:
        """The output and the gradients of all leaves, by name."""
        leaves = self.leaves()
        output = self.run(backend)
        grads = torch.autograd.grad(output, list(leaves.values()), grad_output.to(output.dtype))
        return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def oracle(case: Case, grad_output: Tensor) -> dict[str, Tensor]:
    """What the pure-torch twin says in float64."""
    return case.to(torch.float64).run_with_gradients(grad_output.double(), "torch")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every array within `tolerance` of the largest number expected in it."""
    for name, array in expected.items():
        largest = array.abs().max() if array.numel() else torch.zeros(())
        difference = (found[name].double() - array).abs().max() if array.numel() else torch.zeros(())
        assert found[name].shape == array.shape, name
        assert difference <= tolerance * largest + 1e-30, f"{name}: {difference:.2e} off, the largest is {largest:.2e}"


def frames(case_reference: Tensor | None, size: Tensor, points: int) -> tuple[Tensor | float, Tensor]:
    """Origin and scale of pixel = origin + scale * raw, for each query and level; size is (L, 2) as (W, H)."""
    if case_reference is None:
        return -0.5, size[:, None].expand(-1, points, -1)
    reference = case_reference.double()[:, :, None, :, None]
    origin = reference[..., :2] * size[:, None] - 0.5
    if reference.shape[-1] == 2:
        return origin, torch.ones_like(origin)
    return origin, reference[..., 2:] * size[:, None] * 0.5 / points


def away_from_kinks(raw: Tensor, origin: Tensor | float, scale: Tensor) -> Tensor:
    """Points moved off the integer pixel coordinates, where the location gradient is one-sided; raw keeps its type."""
    for _ in range(8):
        pixel = origin + scale * raw.double()
        near = (pixel - pixel.round()).abs() < 0.02
        raw = torch.where(near, (raw.double() + 0.125 / scale).to(raw.dtype), raw)
    return raw


def random_case(
    levels=LEVELS, n=2, heads=3, channels=8, queries=5, points=2, reference=2, dtype=torch.float64, raw=None, seed=0
) -> Case:
    """A case whose points lie in and around every level, away from kinks.

    ``reference`` is 0 (plain form), 2 or 4; ``queries=0`` stands for the encoder's, one for each pixel.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.tensor(levels, dtype=torch.int64).reshape(-1, 2)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    rows, count = int(shapes.prod(1).sum()), len(levels)
    queries = rows if queries == 0 else queries
    size = shapes.flip(-1).double()
    value = torch.randn(n, rows, heads, channels, generator=generator, dtype=torch.float64)
    pixel = torch.rand(n, queries, heads, count, points, 2, generator=generator, dtype=torch.float64)
    pixel = pixel * (size[:, None] + 4) - 2.5
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ref = None
    if reference:
        ref = (torch.rand(n, queries, count, reference, generator=generator, dtype=torch.float64) + 0.1).to(wide)
    raw = wide if reference == 0 else raw or dtype
    origin, scale = frames(ref, size, points)
    placed = away_from_kinks(((pixel - origin) / scale).to(raw), origin, scale)
    weights = torch.randn(n, queries, heads, count * points, generator=generator, dtype=torch.float64).to(raw)
    weights = weights if reference else weights.view(n, queries, heads, count, points)
    return Case(value.to(dtype), shapes, starts, ref, placed, weights)


def golden_cases() -> list[dict[str, Tensor]]:
    """Arrays of the published implementation, in float64."""
    arrays = np.load(GOLDENS)
    cases: list[dict[str, Tensor]] = []
    for index in itertools.count():
        prefix = f"case{index}."
        names = [name for name in arrays if name.startswith(prefix)]
        if not names:
            return cases
        cases.append({name.removeprefix(prefix): torch.from_numpy(arrays[name]) for name in names})
    return cases
