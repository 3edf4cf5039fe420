"""A linear layer in weight space: ``x (W + B A)^T + b`` with the thin gradients of the low-rank branch.

The branch ``B (A x)`` beside the layer never forms the weight's gradient, but goes over the wide output and over the
input's gradient once more each. The changed weight goes over neither, but left to autograd it costs the gradient of the
whole weight. This function has what is good of both: one product with the changed weight, formed anew for the backward
pass instead of being kept, and for A and B the branch's own gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def saves_passes(x: Tensor, weight: Tensor, a: Tensor) -> bool:
    """Whether :func:`low_rank_linear` may be used on ``x`` (..., in) and is faster than the branch.

    It passes over the weight (out, in) where the branch passes over ``x`` and the output: on CPUs it wins from four
    times out in / (out + in) rows on. Weights below float32, autocast's included, would swallow small changes.
    Compilers fuse the branch's passes, and would tie a graph to the number of rows; a traced graph cannot hold it.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled(x.device.type):
        return False
    if not x.dtype == weight.dtype == a.dtype or x.dtype not in (torch.float32, torch.float64):
        return False
    out, inputs = weight.shape
    return x.numel() * (out + inputs) > 4 * inputs * weight.numel()


class _LowRankLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, torch.addmm(weight, b, a), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, weight, _, a, b = inputs
        ctx.save_for_backward(x, weight, a, b)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        for_x, for_weight, for_bias, for_a, for_b = ctx.needs_input_grad
        rows, grad = x.reshape(-1, x.shape[-1]), grad_output.reshape(-1, grad_output.shape[-1])
        # CPUs take the time of a whole weight for thin products in other memory orders than these.
        low_grad = F.linear(grad, b.t().contiguous()) if for_a else None
        return (
            (grad @ torch.addmm(weight, b, a)).view_as(x) if for_x else None,
            grad.t() @ rows if for_weight else None,
            grad.sum(0) if for_bias else None,
            low_grad.t() @ rows if low_grad is not None else None,
            (F.linear(rows, a).t() @ grad).t() if for_b else None,
        )


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``x (W + B A)^T + bias``: (..., in) -> (..., out); Hu et al. 2022, equation 3, with the scale within B or A.

    Args:
        x: (..., in).
        weight, bias: (out, in) and (out,) or None; frozen or not.
        a, b: (r, in) and (out, r), all of one floating-point type.
    """
    return _LowRankLinear.apply(x, weight, bias, a, b)
