"""The compiled operator as a torch library: loading, shapes for tracing, gradients, autocast.

The schemas are in csrc/registration.cpp. One operator serves both forms: without reference points ``points`` and
``weights`` are sampling locations and attention weights, with them they are offsets and logits.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_d2.ops.reference import accumulation_dtype

MINIMUM_TORCH = (2, 10)
_REBUILD = "run `pip install --no-build-isolation -e .` again, its output names the reason"


def _load(device: str) -> str:
    """Load one of the two libraries; returns "" or why that failed."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        return f"torch is {torch.__version__}; the compiled operator needs torch >= 2.10"
    name = f"libpeft_d2_{device}"
    files = [file for file in Path(__file__).parent.glob(f"{name}.*") if file.suffix in (".so", ".dylib", ".dll")]
    if not files:
        return f"{name} is not built; with a {'C++17' if device == 'cpu' else 'CUDA'} compiler installed, {_REBUILD}"
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        return f"{files[0].name} does not load ({error}); it was built for another torch: {_REBUILD}"
    return ""


def _load_all() -> dict[str, str]:
    reasons = {"cpu": _load("cpu")}
    if torch.version.cuda is None:
        reasons["cuda"] = f"torch {torch.__version__} has no CUDA; install a CUDA build of torch and this package again"
    elif reasons["cpu"]:  # which holds the schemas
        reasons["cuda"] = reasons["cpu"]
    else:
        reasons["cuda"] = _load("cuda")
    if not reasons["cpu"]:
        _register()
    return reasons


def _shape(value: Tensor, points: Tensor) -> tuple[int, int, int]:
    return value.shape[0], points.shape[1], value.shape[2] * value.shape[3]


def _fake_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor | None,
    points: Tensor,
    weights: Tensor,
) -> Tensor:
    return value.new_empty(_shape(value, points))


def _fake_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor | None,
    points: Tensor,
    weights: Tensor,
    reference_grad: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(value.dtype)
    wanted = reference_grad and reference_points is not None
    return (
        value.new_empty(value.shape),
        points.new_empty(points.shape),
        weights.new_empty(weights.shape),
        value.new_empty(reference_points.shape if wanted and reference_points is not None else (0,), dtype=dtype),
    )


class _Differentiable(torch.autograd.Function):
    """The operator with its gradients.

    ``torch.library.register_autograd`` would do, but what runs between two kernels runs on cold caches, where each line
    of Python costs several times what it does in a loop: with 300 queries that was a fifth of the whole.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.peft_d2.ms_deform_attn.default(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        reference_grad = ctx.needs_input_grad[3]
        # With create_graph=True the call is recorded, so that a second derivative is an error and not a zero.
        recorded = torch.is_grad_enabled()
        with nullcontext() if recorded else torch._C._AutoDispatchBelowAutograd():
            value, points, weights, reference = torch.ops.peft_d2.ms_deform_attn_backward.default(
                grad_output, *ctx.saved_tensors, reference_grad, torch.are_deterministic_algorithms_enabled()
            )
        return value, None, None, reference if reference_grad else None, points, weights


def _double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "ms_deform_attn has no second derivatives; take the first ones without create_graph=True, "
        "or detach what the penalty is computed from"
    )


def _autograd() -> torch.library.Library:
    registration = torch.library.Library("peft_d2", "IMPL")
    registration.impl("ms_deform_attn", _Differentiable.apply, "Autograd")
    return registration


def _autocast(device: str) -> torch.library.Library:
    """Under autocast value takes autocast's type; locations and the softmax stay as precise as they are."""
    key = "Autocast" + {"cpu": "CPU", "cuda": "CUDA"}[device]
    registration = torch.library.Library("peft_d2", "IMPL")

    def forward(
        value: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        reference_points: Tensor | None,
        points: Tensor,
        weights: Tensor,
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            if value.dtype != torch.float64 and value.dtype != dtype:
                value = value.to(dtype)
                points, weights = points.float(), weights.float()
            return torch.ops.peft_d2.ms_deform_attn(
                value, spatial_shapes, level_start_index, reference_points, points, weights
            )

    registration.impl("ms_deform_attn", forward, key)
    return registration


_registrations: list[torch.library.Library] = []


def _register() -> None:
    torch.library.register_fake("peft_d2::ms_deform_attn", _fake_forward)
    torch.library.register_fake("peft_d2::ms_deform_attn_backward", _fake_backward)
    torch.library.register_autograd("peft_d2::ms_deform_attn_backward", _double_backward)
    _registrations.extend([_autograd(), *(_autocast(device) for device in ("cpu", "cuda"))])


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor | None,
    points: Tensor,
    weights: Tensor,
) -> Tensor:
    """Bring the arguments to the types that the compiled operator takes, and call it.

    Locations, reference points and attention weights are taken in float32 at least (float64 for float64 values);
    offsets and logits may be of value's own type.
    """
    dtype = accumulation_dtype(value.dtype)
    raw = points.dtype == weights.dtype == value.dtype and reference_points is not None
    return torch.ops.peft_d2.ms_deform_attn(
        value,
        spatial_shapes.to(value.device, torch.int64),
        level_start_index.to(value.device, torch.int64),
        None if reference_points is None else reference_points.to(dtype),
        points if raw else points.to(dtype),
        weights if raw else weights.to(dtype),
    )


# Reasons why the backend of a device is not available; "" where it is.
UNAVAILABLE = _load_all()
