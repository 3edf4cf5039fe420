"""LoRA on convolutions of any dimension, transposed ones, and Detectron2's with its norm and activation after them.

The factors are a convolution A (r, in / groups, k...) with the base's stride, padding and dilation, and a 1x1
convolution B (out, r, 1...): ``W = W0 + s B A``, as in loralib and Hugging Face PEFT (Hu et al. 2022, equation 3, on
the unfolded kernel). Transposed convolutions have the same factors of their kernel seen as (out, in / groups, k...).

Two forms compute the same: a thin branch beside the frozen convolution, or one convolution with the changed weight. The
branch saves the weight's gradient, but goes over input and output once more; on CPUs small kernels gain nothing by it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..adapted import base_class, first_input
from .factors import LoraOptions, LowRank

_CONV: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def is_normed_conv(base: type[nn.Module], module: nn.Module) -> bool:
    """Whether this is Detectron2's Conv2d (convolution, optional norm, optional activation), told by its shape."""
    return (
        base.__name__ == "Conv2d"
        and base.__mro__[1] is nn.Conv2d
        and hasattr(module, "norm")
        and hasattr(module, "activation")
    )


def _branch_is_dearer(weight: Tensor, rank: int) -> bool:
    """Whether a training step takes longer with the branch than with the changed weight, per pixel of output.

    In multiplications of a dense convolution, as measured on CPUs: the weight's gradient costs one each and forming the
    weight two fifths more; the branch's three thin convolutions are 2.5 times slower, and each channel passed over
    once more costs 150.
    """
    out, inputs, *_ = weight.shape
    thin = 3 * rank * (weight[0].numel() + out)
    return 1.4 * weight.numel() < 2.5 * thin + 150 * (inputs + out)


def has_branch(module: _ConvNd) -> bool:
    """Grouped kernels and padding other than zeros have no small branch on the input: the weight is changed instead."""
    return module.groups == 1 and module.padding_mode == "zeros"


class ConvLora(LowRank):
    """Low-rank factors of one convolution kernel."""

    def __init__(self, module: _ConvNd, options: LoraOptions, *args: Any) -> None:
        self.transposed = isinstance(module, _ConvTransposeNd)
        self.groups = module.groups
        super().__init__(module.weight, options, *args)
        self.normed = is_normed_conv(base_class(module), module)
        self.has_branch = has_branch(module)
        same_dtype = module.weight.dtype == self.lora_a.dtype  # a half-precision weight would swallow small changes
        cheaper = same_dtype and not self.dropout and _branch_is_dearer(self.ordered(module.weight), len(self.lora_a))
        self.in_weight_space = cheaper or not self.has_branch

    def ordered(self, weight: Tensor) -> Tensor:
        """A transposed convolution stores (in, out / groups, k...): the same kernels as (out, in / groups, k...)."""
        if not self.transposed:
            return weight
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def as_stored(self, weight: Tensor) -> Tensor:
        return self.ordered(weight)  # the exchange of in and out within each group is its own reverse

    def branch(self, x: Tensor, convolve: Callable[..., Tensor]) -> Tensor:
        """s B A x for x (N, in, ...) -> (N, out, ...); ``convolve(x, weight, bias)`` is the base's own."""
        x, expand = self.input(x), _CONV[self.lora_b.dim() - 3]
        y = expand(convolve(x, self.as_stored(self.lora_a), None) * self.scale, self.lora_b)
        if self.lora_a_start is not None and self.lora_b_start is not None:
            start = convolve(x, self.as_stored(self.lora_a_start), None) * self.scale
            y = y - expand(start, self.lora_b_start)
        return y

    def adapted_forward(self, module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """The update of Detectron2's convolution comes before its norm and activation, so that merging is exact."""
        x = first_input(args, kwargs)
        convolve = module._conv_forward if not self.normed else _plain_convolution(module)
        if self.transposed:
            convolve = _transposed_convolution(module, x, args[1] if len(args) > 1 else kwargs.get("output_size"))
        out = self(x, convolve, module.weight, module.bias)
        if self.normed and module.norm is not None:
            out = module.norm(out)
        return module.activation(out) if self.normed and module.activation is not None else out

    def forward(self, x: Tensor, convolve: Callable[..., Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
        """The adapted convolution of x (N, in, ...)."""
        exact = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")  # which would swallow small changes
        if not self.has_branch or (self.in_weight_space and exact):
            return convolve(x, self.effective(weight), bias)
        out = convolve(x, weight, bias)
        return self.rescaled(out, self.branch(x, convolve), weight, bias, channel=1 - weight.dim())


def _plain_convolution(module: Any) -> Callable[..., Tensor]:
    geometry = (module.stride, module.padding, module.dilation, module.groups)
    return lambda x, weight, bias: F.conv2d(x, weight, bias, *geometry)


def _transposed_convolution(module: Any, x: Tensor, output_size: list[int] | None) -> Callable[..., Tensor]:
    size = (module.stride, module.padding, module.kernel_size, len(module.kernel_size), module.dilation)
    padding = module._output_padding(x, output_size, *size)
    geometry = (module.stride, module.padding, padding, module.groups, module.dilation)
    return lambda x, weight, bias: _TRANSPOSED[weight.dim() - 3](x, weight, bias, *geometry)
