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

from peft_d2.ops import arguments, library, reference

__all__ = ["backends", "default_backend", "ms_deform_attn", "ms_deform_attn_fused"]

logger = logging.getLogger(__name__)

_ENVIRONMENT = os.environ.get("PEFT_D2_BACKEND", "")
_TWINS = ("torch", "gather")
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
    arguments.check(*inputs, fused=False)
    return _run(inputs, backend)


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
    arguments.check(*inputs, fused=True)
    return _run(inputs, backend)


def _run(inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor], backend: str | None) -> Tensor:
    compiled = _uses_library(inputs[0].device.type, backend)
    arguments.check_levels(*inputs[:3], compiled)
    if compiled:
        return library.ms_deform_attn(*inputs)
    return reference.ms_deform_attn(*inputs, gather=(backend or _ENVIRONMENT) == "gather")
