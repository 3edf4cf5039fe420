"""Argument checks of the operator: an error says which argument, what it is and what it should be."""

from __future__ import annotations

import torch
from torch import Tensor

VALUE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _fail(name: str, found: object, expected: str) -> None:
    found = _describe(found) if isinstance(found, Tensor) else type(found).__name__
    raise ValueError(f"ms_deform_attn: {name} is {found}; it should be {expected}")


def _check_floating(name: str, tensor: Tensor, shape: tuple[int, ...], axes: str) -> None:
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or tensor.dtype not in VALUE_DTYPES:
        _fail(name, tensor, f"a floating-point tensor {axes} = {shape}")


def _check_levels(value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor) -> int:
    """Check what both forms share; returns L."""
    if not isinstance(value, Tensor) or value.dim() != 4 or value.dtype not in VALUE_DTYPES:
        _fail("value", value, "a float32, float64, bfloat16 or float16 tensor (N, S, M, D)")
    shapes_fit = isinstance(spatial_shapes, Tensor) and spatial_shapes.dim() == 2 and spatial_shapes.shape[1] == 2
    if not shapes_fit or spatial_shapes.is_floating_point():
        _fail("spatial_shapes", spatial_shapes, "an integer tensor (L, 2) of (H, W)")
    levels = spatial_shapes.shape[0]
    starts_fit = isinstance(level_start_index, Tensor) and tuple(level_start_index.shape) == (levels,)
    if not starts_fit or level_start_index.is_floating_point():
        _fail("level_start_index", level_start_index, f"an integer tensor (L,) = ({levels},)")
    return levels


def levels_within(spatial_shapes: Tensor, level_start_index: Tensor, value: Tensor) -> list[tuple[int, int, int]]:
    """Each level's (H, W, first row), all of them within value's rows.

    Raises:
        ValueError: a level lies outside value, or the levels do not fill it.
    """
    rows = value.shape[1]
    sizes = spatial_shapes.tolist()
    levels = [(height, width, start) for (height, width), start in zip(sizes, level_start_index.tolist(), strict=True)]
    if sum(h * w for h, w, _ in levels) != rows or any(s < 0 or s + h * w > rows for h, w, s in levels):
        raise ValueError(
            f"ms_deform_attn: spatial_shapes is {sizes} from rows {level_start_index.tolist()} on; "
            f"the levels should fill value's S = {rows} rows"
        )
    return levels


def _check_devices(value: Tensor, others: dict[str, Tensor]) -> None:
    for name, tensor in others.items():
        if tensor.device != value.device:
            raise ValueError(f"ms_deform_attn: {name} is on {tensor.device}; it should be on value's {value.device}")


def check(value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, locations: Tensor, weights: Tensor) -> None:
    """Check the arguments of the plain form.

    Raises:
        ValueError: naming the argument, what it is and what it should be.
    """
    levels = _check_levels(value, spatial_shapes, level_start_index)
    n, _, heads, _ = value.shape
    if not isinstance(locations, Tensor) or locations.dim() != 6:
        _fail("sampling_locations", locations, "a floating-point tensor (N, Q, M, L, P, 2)")
    queries, points = locations.shape[1], locations.shape[4]
    shape = (n, queries, heads, levels, points)
    _check_floating("sampling_locations", locations, (*shape, 2), "(N, Q, M, L, P, 2)")
    _check_floating("attention_weights", weights, shape, "(N, Q, M, L, P)")
    _check_devices(value, {"sampling_locations": locations, "attention_weights": weights})


def check_fused(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> None:
    """Check the arguments of the fused form.

    Raises:
        ValueError: naming the argument, what it is and what it should be.
    """
    levels = _check_levels(value, spatial_shapes, level_start_index)
    n, _, heads, _ = value.shape
    if not isinstance(offsets, Tensor) or offsets.dim() != 6:
        _fail("sampling_offsets", offsets, "a floating-point tensor (N, Q, M, L, P, 2)")
    queries, points = offsets.shape[1], offsets.shape[4]
    _check_floating("sampling_offsets", offsets, (n, queries, heads, levels, points, 2), "(N, Q, M, L, P, 2)")
    _check_floating("attention_logits", logits, (n, queries, heads, levels * points), "(N, Q, M, L*P)")
    numbers = reference_points.shape[-1] if isinstance(reference_points, Tensor) and reference_points.dim() else 0
    _check_floating(
        "reference_points",
        reference_points,
        (n, queries, levels, numbers if numbers in (2, 4) else 2),
        "(N, Q, L, 2|4)",
    )
    others = {"reference_points": reference_points, "sampling_offsets": offsets, "attention_logits": logits}
    _check_devices(value, others)
