"""What autograd saves, kept in the host's memory until the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

Stored = Tensor | tuple[torch.device, torch.Size, Tensor]


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
