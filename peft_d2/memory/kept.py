"""What autograd keeps of a block for the backward pass: on the host what would be on a GPU, less of frozen layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn import grad as gradients
from torch.overrides import TorchFunctionMode

Stored = Tensor | tuple[torch.device, torch.Size, Tensor]
_OF_INPUT: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    F.conv1d: gradients.conv1d_input,
    F.conv2d: gradients.conv2d_input,
    F.conv3d: gradients.conv3d_input,
}


class OnHost(saved_tensors_hooks):
    """Within the ``with`` block autograd keeps tensors of a GPU in pinned memory of the host; parameters stay.

    torch's ``save_on_cpu`` gives back contiguous tensors, which torch's own attention refuses where it had padded the
    rows of a mask, and it copies the weights, which never leave the device.
    """

    def __init__(self) -> None:
        super().__init__(_store, _fetch)


def _store(tensor: Tensor) -> Stored:
    base = tensor if tensor._base is None else tensor._base
    if not tensor.is_cuda or tensor.layout != torch.strided or isinstance(base, nn.Parameter):
        return tensor
    # An axis along which the tensor repeats itself (of a mask, for each head) is stored once.
    once = tensor.detach()[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
    host = torch.empty_strided(once.size(), strides_to_keep(once), dtype=once.dtype, pin_memory=True)
    host.copy_(once, non_blocking=True)  # in the order of the stream, as is all that follows
    return tensor.device, tensor.size(), host


def _fetch(stored: Stored) -> Tensor:
    if isinstance(stored, Tensor):
        return stored
    device, size, host = stored
    tensor = torch.empty_strided(host.size(), host.stride(), dtype=host.dtype, device=device)
    return tensor.copy_(host, non_blocking=True).expand(size)


def strides_to_keep(tensor: Tensor) -> tuple[int, ...]:
    """The strides of ``tensor``, or contiguous ones where numbers lie twice, or less than half of the room is used."""
    room, twice = 1, False
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        twice |= size > 1 and stride < room
        room += stride * (size - 1)
    return torch.empty(tensor.size(), device="meta").stride() if twice or room > 2 * tensor.numel() else tensor.stride()


class FrozenConvolutions(TorchFunctionMode):
    """Within this block a convolution whose weight and bias are frozen keeps nothing but its weight.

    torch keeps its input, too, for a gradient of the weight that nobody asks for. Linear layers are like that by
    themselves; norms need their input for the gradient of it.
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
