"""Multi-scale deformable attention: one function, several backends.

``PEFT_D2_BACKEND`` or the ``backend`` argument choose among :func:`backends`; the default is the compiled operator of the
tensor's device where it is built, else the pure-torch twin of :mod:`peft_d2.ops.reference`.
"""

from __future__ import annotations

from torch import Tensor

from peft_d2.ops import checks, reference

__all__ = ["backends", "ms_deform_attn", "ms_deform_attn_fused"]


def backends() -> dict[str, str]:
    """Names of the backends; each with "" when it can run here, else with the reason why not."""
    return {"torch": ""}


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
        level_start_index: (L,), the row where each level begins.
        sampling_locations: (N, Q, M, L, P, 2) as (x, y) in units of the level's width and height.
        attention_weights: (N, Q, M, L, P).
        backend: a name of :func:`backends`, or None for the default.

    Returns:
        (N, Q, M*D) in value's type. A point outside its level contributes nothing.

    Raises:
        ValueError: an argument does not fit the others.
        RuntimeError: the backend asked for is not available.
    """
    checks.check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    return reference.ms_deform_attn(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )


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
        ValueError: an argument does not fit the others.
        RuntimeError: the backend asked for is not available.
    """
    checks.check_fused(value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits)
    return reference.ms_deform_attn_fused(
        value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits
    )
