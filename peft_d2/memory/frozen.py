"""Frozen convolutions keep their input for a gradient of the weight that nobody asks for; here they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as gradients
from torch.overrides import TorchFunctionMode

_OF_INPUT: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    F.conv1d: gradients.conv1d_input,
    F.conv2d: gradients.conv2d_input,
    F.conv3d: gradients.conv3d_input,
}


class FrozenConvolutions(TorchFunctionMode):
    """Within this block a convolution whose weight and bias are frozen keeps nothing but its weight.

    Linear layers are like that by themselves; norms need their input for the gradient of it.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _OF_INPUT:
            return _convolve(function, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _convolve(
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    geometry = (stride, padding, dilation, groups)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trained or not input.requires_grad or not torch.is_grad_enabled() or isinstance(padding, str):
        return function(input, weight, bias, *geometry)
    return _FrozenConvolution.apply(function, input, weight, bias, geometry)


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.rest = function, x.shape, geometry
        return function(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (function, shape, geometry) = ctx.saved_tensors, ctx.rest
        return None, _OF_INPUT[function](shape, weight.to(grad.dtype), grad, *geometry), None, None, None
