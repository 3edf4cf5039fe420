"""LoRA on nn.Conv2d and on Detectron2's Conv2d, whose norm and activation come after the low-rank branch.

The factors are a convolution A (r, in / groups, kh, kw) with the base's stride, padding and dilation, and a 1x1
convolution B (out, r, 1, 1): ``W = W0 + s B A``, as in loralib and Hugging Face PEFT (Hu et al. 2022, equation 3, on
the unfolded kernel).

Two forms compute the same: a thin branch beside the frozen convolution, or one convolution with the changed weight. The
branch saves the weight's gradient, but goes over input and output once more; small kernels gain nothing by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .low_rank import LoraOptions, LowRank, match_dtype
from .specialise import Specialised


def is_normed_conv(base: type[nn.Module], module: nn.Module) -> bool:
    """Whether this is Detectron2's Conv2d (convolution, optional norm, optional activation), told by its shape."""
    return (
        base.__name__ == "Conv2d"
        and base.__mro__[1] is nn.Conv2d
        and hasattr(module, "norm")
        and hasattr(module, "activation")
    )


def _has_no_branch(module: nn.Conv2d) -> bool:
    """Grouped kernels and padding other than zeros have no small branch on the input: the weight is changed instead."""
    return module.groups > 1 or module.padding_mode != "zeros"


def _branch_is_dearer(weight: Tensor, rank: int) -> bool:
    """Whether a training step takes longer with the branch than with the changed weight, per pixel of output.

    In multiplications of a dense convolution, as measured on CPUs: the weight's gradient costs one each and forming the
    weight two fifths more; the branch's three thin convolutions are 2.5 times slower, and each channel passed over
    once more costs 150.
    """
    out, inputs, *_ = weight.shape
    thin = 3 * rank * (weight[0].numel() + out)
    return 1.4 * weight.numel() < 2.5 * thin + 150 * (inputs + out)


def conv_problem(module: nn.Conv2d, options: LoraOptions) -> str:
    """Which option does not work on this convolution; empty when all do."""
    if options.parts or options.cobot:
        return f"{'PARTS' if options.parts else 'COBOT'} does not apply to a convolution"
    if options.dropout and _has_no_branch(module):
        return "DROPOUT needs a branch on the input, which groups or padding_mode rule out here"
    return ""


class ConvLowRank(LowRank):
    """Low-rank factors of one convolution kernel."""

    def __init__(self, module: nn.Conv2d, options: LoraOptions, name: str, tensor_options: Mapping[str, Any]) -> None:
        super().__init__(module.weight, options, name, tensor_options)
        same_dtype = module.weight.dtype == self.lora_a.dtype  # a half-precision weight would swallow small changes
        may = same_dtype and not self.dropout
        cheaper = may and _branch_is_dearer(module.weight, self.lora_a.shape[0])
        self.in_weight_space = _has_no_branch(module) or cheaper
        self.geometry: dict[str, Any] = {
            "stride": module.stride,
            "padding": module.padding,
            "dilation": module.dilation,
        }

    def branch(self, x: Tensor) -> Tensor:
        """s B A x for x (N, in, H, W) -> (N, out, H', W')."""
        x = F.dropout(match_dtype(x, self.lora_a), self.dropout, self.training)
        y = F.conv2d(F.conv2d(x, self.lora_a, **self.geometry) * self.scale, self.lora_b)
        if self.lora_a_start is not None and self.lora_b_start is not None:
            y = y - F.conv2d(F.conv2d(x, self.lora_a_start, **self.geometry) * self.scale, self.lora_b_start)
        return y

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """The adapted convolution of x (N, in, H, W); ``convolve(x, weight, bias)`` is the base's own."""
        if self.in_weight_space:
            return convolve(x, self.effective(weight), bias)
        out = convolve(x, weight, bias)
        if self.lora_magnitude is None:
            return out + self.branch(x).to(out.dtype)
        gain = self.gain(weight).view(-1, 1, 1)
        plain = out if bias is None else out - bias.view(-1, 1, 1)
        return out + ((gain - 1) * plain + gain * self.branch(x)).to(out.dtype)


class LoraConvMixin(Specialised):
    """nn.Conv2d with the branch: (N, in, H, W) -> (N, out, H', W')."""

    layer = 1
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        part = self.peft_weight_part("lora")
        if part is None:
            return super().forward(x)
        return part(x, self._conv_forward, self.weight, self.bias)


class LoraNormedConvMixin(Specialised):
    """Detectron2's Conv2d with the branch before norm and activation, so that merging is exact."""

    layer = 1
    weight: Tensor
    bias: Tensor | None
    norm: Callable[[Tensor], Tensor] | None
    activation: Callable[[Tensor], Tensor] | None

    def forward(self, x: Tensor) -> Tensor:
        part = self.peft_weight_part("lora")
        if part is None:
            return super().forward(x)
        x = part(x, self._plain_conv, self.weight, self.bias)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)

    def _plain_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        geometry: Any = (self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(x, weight, bias, *geometry)
