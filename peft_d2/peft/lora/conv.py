"""LoRA on convolutions of any dimension, transposed ones, and Detectron2's with its norm and activation after them.

The factors are a convolution A (r, in / groups, k...) with the base's stride, padding and dilation, and a 1x1
convolution B (out, r, 1...): ``W = W0 + s B A``, as in loralib and Hugging Face PEFT (Hu et al. 2022, equation 3, on
the unfolded kernel). Transposed convolutions have the same factors of their kernel seen as (out, in / groups, k...).

Two forms compute the same: a thin branch beside the frozen convolution, or one convolution with the changed weight. The
branch saves the weight's gradient, but goes over input and output once more; on CPUs small kernels gain nothing by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..adapted import base_class, first_input
from .factors import LoraOptions, LowRank

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_normed_conv(module: nn.Module) -> bool:
    """Whether this is Detectron2's Conv2d (convolution, optional norm, optional activation), told by its shape."""
    base = base_class(module)
    named = base.__name__ == "Conv2d" and base.__mro__[1] is nn.Conv2d
    return named and hasattr(module, "norm") and hasattr(module, "activation")


def has_branch(module: _ConvNd) -> bool:
    """Grouped kernels and padding other than zeros have no small branch on the input: the weight is changed instead."""
    return module.groups == 1 and module.padding_mode == "zeros"


def _branch_is_dearer(weight: Tensor, rank: int) -> bool:
    """Whether a training step takes longer with the branch than with the changed weight, per pixel of output.

    In multiplications of a dense convolution, as measured on CPUs: the weight's gradient costs one each and forming the
    weight two fifths more; the branch's three thin convolutions are 2.5 times slower, and each channel passed over
    once more costs 150.
    """
    out, inputs, *_ = weight.shape
    thin = 3 * rank * (weight[0].numel() + out)
    return 1.4 * weight.numel() < 2.5 * thin + 150 * (inputs + out)


class ConvolutionLora(LowRank):
    """Low-rank factors of one convolution kernel."""

    def __init__(self, module: _ConvNd, options: LoraOptions, *args: Any) -> None:
        self.transposed = isinstance(module, _ConvTransposeNd)
        self.groups = module.groups
        super().__init__(module.weight, options, *args)
        self.normed = is_normed_conv(module)
        self.has_branch = has_branch(module)
        same_dtype = module.weight.dtype == self.lora_a.dtype  # a half-precision weight would swallow small changes
        cheaper = same_dtype and not self.dropout and _branch_is_dearer(self.ordered(module.weight), len(self.lora_a))
        self.in_weight_space = cheaper or not self.has_branch

    def ordered(self, weight: Tensor) -> Tensor:
        """A transposed convolution stores (in, out / groups, k...): the same kernels as (out, in / groups, k...)."""
        if not self.transposed:
            return weight
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    as_stored = ordered  # the exchange of in and out within each group is its own reverse

    def product(self, x: Tensor, a: Tensor, b: Tensor, *context: Any) -> Tensor:
        """(N, in, ...) -> (N, out, ...); ``context`` is the base's own ``convolve(x, weight, bias)``."""
        expand = getattr(F, f"conv{b.dim() - 2}d")
        return expand(context[0](x, self.as_stored(a), None) * self.scale, b)

    def adapted_forward(self, module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """The update of Detectron2's convolution comes before its norm and activation, so that merging is exact."""
        out = self(first_input(args, kwargs), self._convolution(module, args, kwargs), module.weight, module.bias)
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

    def _convolution(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Tensor]:
        """``convolve(x, weight, bias)`` as the module does it on these arguments, before a norm and an activation."""
        if self.transposed:
            size = args[1] if len(args) > 1 else kwargs.get("output_size")
            shape = (module.stride, module.padding, module.kernel_size, len(module.kernel_size), module.dilation)
            padding = module._output_padding(first_input(args, kwargs), size, *shape)
            geometry = (module.stride, module.padding, padding, module.groups, module.dilation)
            return lambda x, *weights: getattr(F, f"conv_transpose{len(module.kernel_size)}d")(x, *weights, *geometry)
        if self.normed:
            plain = (module.stride, module.padding, module.dilation, module.groups)
            return lambda x, weight, bias: F.conv2d(x, weight, bias, *plain)
        return module._conv_forward
