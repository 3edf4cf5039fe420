"""Multi-scale deformable attention: one function, several backends.

The compiled operator serves the devices that it is built for, the pure-torch twin of :mod:`peft_d2.ops.reference` all
others. The ``backend`` argument, or the environment variable ``PEFT_D2_BACKEND`` (read at import), chooses instead:
"torch" is the twin; "gather" is the twin made of plain indexing, for graphs that leave torch; "cpu" and "cuda" demand
the compiled operator for tensors there, whose absence is then an error.
"""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor

from peft_d2.ops import library, reference

__all__ = ["backends", "default_backend", "ms_deform_attn", "ms_deform_attn_fused"]

logger = logging.getLogger(__name__)

_ENVIRONMENT = os.environ.get("PEFT_D2_BACKEND", "")
_TWINS = ("torch", "gather")
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_logged: set[str] = set()


def backends() -> dict[str, str]:
    """Names of the backends; each with "" when it can run here, else with the reason why not and the remedy."""
    reasons = dict(library.UNAVAILABLE)
    if not reasons["cuda"] and not torch.cuda.is_available():
        reasons["cuda"] = "it is built, but torch sees no GPU; check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    return {**reasons, "torch": "", "gather": ""}


def default_backend(device: str) -> str:
    """The backend that serves tensors on a device ("cpu", "cuda") where a call names none.

    Raises:
        ValueError: PEFT_D2_BACKEND names no backend.
        RuntimeError: it names one that is not available.
    """
    return device if _uses_library(device, None) else "torch"


def _uses_library(device: str, backend: str | None) -> bool:
    """Whether tensors on `device` go to the compiled operator; logs each choice once."""
    choice = backend or (_ENVIRONMENT if _ENVIRONMENT in (*_TWINS, device) else "")
    if _ENVIRONMENT not in ("", *_TWINS, "cpu", "cuda") or choice not in ("", *_TWINS, "cpu", "cuda"):
        asked = repr(backend) if backend else f"PEFT_D2_BACKEND={_ENVIRONMENT!r}"
        raise ValueError(f"ms_deform_attn: backend is {asked}; it should be 'torch', 'gather', 'cpu' or 'cuda'")
    if choice in _TWINS:
        _log(device, "the pure-torch twin, as asked for", logging.INFO)
        return False
    if choice and choice != device:
        raise ValueError(f"ms_deform_attn: backend is {choice!r}, but value is on {device}; it should be {device!r}")
    reason = library.UNAVAILABLE.get(device, f"there is no compiled operator for {device}")
    if not reason:
        _log(device, "the compiled operator", logging.INFO)
        return True
    if choice:
        raise RuntimeError(f"ms_deform_attn: backend {choice!r} is not available: {reason}")
    _log(device, f"the slower pure-torch twin: {reason}", logging.WARNING)
    return False


def _log(device: str, what: str, level: int) -> None:
    if not torch.compiler.is_compiling() and (line := f"ms_deform_attn on {device} runs {what}") not in _logged:
        _logged.add(line)
        logger.log(level, line)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, equation 3).

    Args:
        value: (N, S, M, D): S rows, the pixels of all levels one level after the other, of M heads with D channels.
        spatial_shapes: (L, 2), each level's (H, W).
        level_start_index: (L,), the row where each level begins: where the one before ends.
        sampling_locations: (N, Q, M, L, P, 2) as (x, y) in units of the level's width and height.
        attention_weights: (N, Q, M, L, P).
        backend: a name of :func:`backends`, or None for the default: the compiled operator where it is built.

    Returns:
        (N, Q, M*D) in value's type. A point outside its level contributes nothing.

    Raises:
        ValueError: an argument does not fit the others. Where reading the levels would wait for a GPU, or cannot be
            done while torch traces, the compiled operator itself refuses wrong ones with a RuntimeError.
        RuntimeError: the backend asked for is not available.
    """
    inputs = (value, spatial_shapes, level_start_index, None, sampling_locations, attention_weights)
    return _run(inputs, backend, fused=False)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    backend: str | None = None,
) -> Tensor:
    """The same from the raw projections: softmax over levels and points, and the locations, happen inside.

    Args:
        value, spatial_shapes, level_start_index, backend: as in :func:`ms_deform_attn`.
        reference_points: (N, Q, L, 2) as (x, y), or (N, Q, L, 4) as (centre x, centre y, width, height), in [0, 1].
        sampling_offsets: (N, Q, M, L, P, 2), in pixels of the level (2 numbers) or P-ths of half a box (4 numbers).
        attention_logits: (N, Q, M, L*P), before the softmax.

    Returns:
        (N, Q, M*D) in value's type.

    Raises:
        ValueError, RuntimeError: as :func:`ms_deform_attn` does.
    """
    inputs = (value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits)
    return _run(inputs, backend, fused=True)


def _run(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor], backend: str | None, fused: bool
) -> Tensor:
    _check(*inputs, fused)
    compiled = _uses_library(inputs[0].device.type, backend)
    _check_levels(*inputs[:3], compiled)
    if compiled:
        return library.ms_deform_attn(*inputs)
    return reference.ms_deform_attn(*inputs, gather=(backend or _ENVIRONMENT) == "gather")


def _fail(name: str, found: object, expected: str) -> None:
    described = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise ValueError(f"ms_deform_attn: {name} is {described}; it should be {expected}")


def _is_tensor(tensor: object, dtypes: tuple[torch.dtype, ...], dimensions: int) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype in dtypes and tensor.dim() == dimensions


def _check(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    reference: Tensor | None,
    points: Tensor,
    weights: Tensor,
    fused: bool,
) -> None:
    """Check types, shapes and devices of one call; the numbers of the levels are :func:`_check_levels`'s.

    Args:
        points, weights: the plain form's locations and attention weights, or the fused form's offsets and logits.
        fused: which form; the plain one has no reference points.

    Raises:
        ValueError: naming the argument, what it is and what it should be.
    """
    if not _is_tensor(value, _FLOATING, 4):
        _fail("value", value, "a float32, float64, bfloat16 or float16 tensor (N, S, M, D)")
    if not _is_tensor(shapes, _INTEGER, 2) or shapes.shape[1] != 2:
        _fail("spatial_shapes", shapes, "an integer tensor (L, 2) of (H, W)")
    levels = shapes.shape[0]
    if not _is_tensor(starts, _INTEGER, 1) or starts.shape[0] != levels:
        _fail("level_start_index", starts, f"an integer tensor (L,) = ({levels},)")
    points_name, weights_name = (
        ("sampling_offsets", "attention_logits") if fused else ("sampling_locations", "attention_weights")
    )
    if not _is_tensor(points, _FLOATING, 6):
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
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or tensor.dtype not in _FLOATING:
            _fail(name, tensor, f"a floating-point tensor {axes} = {shape}")
        elif tensor.device != value.device:
            raise ValueError(f"ms_deform_attn: {name} is on {tensor.device}; it should be on value's {value.device}")


def _check_levels(value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, compiled: bool) -> None:
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
