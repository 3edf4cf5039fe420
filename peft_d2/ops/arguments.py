"""Argument checks of the operator: an error says which argument, what it is and what it should be."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _fail(name: str, found: object, expected: str) -> None:
    described = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise ValueError(f"ms_deform_attn: {name} is {described}; it should be {expected}")


def _is_tensor(tensor: object, dtypes: tuple[torch.dtype, ...], dimensions: int) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype in dtypes and tensor.dim() == dimensions


def check(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    reference: Tensor | None,
    points: Tensor,
    weights: Tensor,
    fused: bool,
) -> None:
    """Check types, shapes and devices of one call; the numbers of the levels are :func:`check_levels`'s.

    Args:
        points, weights: the plain form's locations and attention weights, or the fused form's offsets and logits.
        fused: which form; the plain one has no reference points.

    Raises:
        ValueError: naming the argument, what it is and what it should be.
    """
    if not _is_tensor(value, FLOATING, 4):
        _fail("value", value, "a float32, float64, bfloat16 or float16 tensor (N, S, M, D)")
    if not _is_tensor(shapes, INTEGER, 2) or shapes.shape[1] != 2:
        _fail("spatial_shapes", shapes, "an integer tensor (L, 2) of (H, W)")
    levels = shapes.shape[0]
    if not _is_tensor(starts, INTEGER, 1) or starts.shape[0] != levels:
        _fail("level_start_index", starts, f"an integer tensor (L,) = ({levels},)")
    points_name, weights_name = (
        ("sampling_offsets", "attention_logits") if fused else ("sampling_locations", "attention_weights")
    )
    if not _is_tensor(points, FLOATING, 6):
        _fail(points_name, points, "a floating-point tensor (N, Q, M, L, P, 2)")

    n, _, heads, _ = value.shape
    queries, n_points = points.shape[1], points.shape[4]
    floating: list[tuple[str, Tensor | None, tuple[int, ...], str]] = [
        (points_name, points, (n, queries, heads, levels, n_points, 2), "(N, Q, M, L, P, 2)"),
        (weights_name, weights, (n, queries, heads, levels, n_points), "(N, Q, M, L, P)"),
    ]
    if fused:
        numbers = reference.shape[-1] if isinstance(reference, Tensor) and reference.dim() else 0
        reference_shape = (n, queries, levels, numbers if numbers in (2, 4) else 2)
        floating[1] = (weights_name, weights, (n, queries, heads, levels * n_points), "(N, Q, M, L*P)")
        floating.append(("reference_points", reference, reference_shape, "(N, Q, L, 2|4)"))
    for name, tensor, shape, axes in floating:
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or tensor.dtype not in FLOATING:
            _fail(name, tensor, f"a floating-point tensor {axes} = {shape}")
        elif tensor.device != value.device:
            raise ValueError(f"ms_deform_attn: {name} is on {tensor.device}; it should be on value's {value.device}")


def check_levels(value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, compiled: bool) -> None:
    """Check that the levels fill value's rows one after the other, unless their numbers cannot be read here.

    They cannot while torch traces. On a GPU, reading them would wait for it, and the compiled operator checks them.

    Raises:
        ValueError: naming the first level that lies elsewhere.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    for tensor in (spatial_shapes, level_start_index):
        if type(tensor) is not Tensor or tensor.is_meta or (compiled and not tensor.is_cpu):
            return
    sizes, starts, end = spatial_shapes.tolist(), level_start_index.tolist(), 0
    for level, ((height, width), start) in enumerate(zip(sizes, starts, strict=True)):
        if not (0 <= height < 2**31 and 0 <= width < 2**31) or start != end:
            raise ValueError(
                f"ms_deform_attn: level {level} is {height} x {width} in spatial_shapes and begins at row {start} in "
                f"level_start_index; it should begin at row {end}, where the one before ends"
            )
        end += height * width
    if end != value.shape[1]:
        raise ValueError(
            f"ms_deform_attn: the levels of spatial_shapes {sizes} have {end} pixels; they should fill value's "
            f"S = {value.shape[1]} rows"
        )
