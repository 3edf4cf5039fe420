"""The compiled operator as a torch library: loading, shapes for tracing, gradients, autocast.

The schemas are in csrc/registration.cpp. One operator serves both forms: without reference points ``points`` and
``weights`` are sampling locations and attention weights, with them they are offsets and logits.
"""

from __future__ import annotations

from collections.abc import Callable
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
        return f"torch is {torch.__version__}; the compiled operator, which is many times faster, needs torch >= 2.10"
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
    if not reasons["cpu"]:
        _register()
    if torch.version.cuda is None:
        reasons["cuda"] = f"torch {torch.__version__} has no CUDA; install a CUDA build of torch and this package again"
    else:  # the CPU library holds the schemas
        reasons["cuda"] = reasons["cpu"] or _load("cuda")
    return reasons


def _fake_forward(
    value: Tensor, shapes: Tensor, starts: Tensor, reference: Tensor | None, points: Tensor, weights: Tensor
) -> Tensor:
    return value.new_empty(value.shape[0], points.shape[1], value.shape[2] * value.shape[3])


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
    shape = reference_points.shape if reference_grad and reference_points is not None else (0,)
    reference = value.new_empty(shape, dtype=accumulation_dtype(value.dtype))
    return value.new_empty(value.shape), points.new_empty(points.shape), weights.new_empty(weights.shape), reference


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


def _autocast(device: str, key: str) -> Callable[..., Tensor]:
    """The operator under autocast: ``value`` gets autocast's type; locations and the softmax keep theirs."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def forward(
        value: Tensor, shapes: Tensor, starts: Tensor, reference: Tensor | None, points: Tensor, weights: Tensor
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            if value.dtype != torch.float64 and value.dtype != dtype:
                value = value.to(dtype)
                points, weights = points.float(), weights.float()
            return torch.ops.peft_d2.ms_deform_attn(value, shapes, starts, reference, points, weights)

    return forward


_registration = torch.library.Library("peft_d2", "FRAGMENT")  # ends what it registers when it is collected


def _register() -> None:
    torch.library.register_fake("peft_d2::ms_deform_attn", _fake_forward)
    torch.library.register_fake("peft_d2::ms_deform_attn_backward", _fake_backward)
    torch.library.register_autograd("peft_d2::ms_deform_attn_backward", _double_backward)
    _registration.impl("ms_deform_attn", _Differentiable.apply, "Autograd")
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _registration.impl("ms_deform_attn", _autocast(device, key), key)


def ms_deform_attn(
    value: Tensor, shapes: Tensor, starts: Tensor, reference: Tensor | None, points: Tensor, weights: Tensor
) -> Tensor:
    """Bring the arguments to the types that the compiled operator takes, and call it.

    Locations, reference points and attention weights are taken in float32 at least (float64 for float64 values);
    offsets and logits may be of value's own type.
    """
    dtype = accumulation_dtype(value.dtype)
    raw = points.dtype == weights.dtype == value.dtype and reference is not None
    return torch.ops.peft_d2.ms_deform_attn(
        value,
        shapes.to(value.device, torch.int64),
        starts.to(value.device, torch.int64),
        None if reference is None else reference.to(dtype),
        points if raw else points.to(dtype),
        weights if raw else weights.to(dtype),
    )


# Reasons why the backend of a device is not available; "" where it is.
UNAVAILABLE = _load_all()
