"""Sequential adapters: a chain of bottlenecks after any sublayer.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, arXiv 1902.00751 (figure 2), placed and
chained as in Abou Baker et al., "Parameter-Efficient Fine-Tuning of Large Pretrained Models for Instance Segmentation
Tasks", MAKE 6(4), 2024, arXiv 2606.01947: for the sublayer's output s, ``h_0 = s``, ``h_i = h_(i-1) + A_i(h_(i-1))``
for i = 1..n, with ``A = up(ReLU(down(h)))``, Linear d -> d/r and back. Each up-projection starts at zero, so the
start is the pretrained model. Put after the attention (or its dropout), the residual and the norm of the block come
after it: ``out = LN(x + h_n)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import MethodError
from .method import Positive
from .outputs import OutputLayer, OutputMethod, OutputOptions
from .targets import Target


@dataclass(frozen=True)
class AdapterOptions(OutputOptions):
    """``NUM`` adapters in a chain, each with a bottleneck of width / ``REDUCTION``."""

    num: Positive = 1
    reduction: Positive = 4


class Bottleneck(nn.Module):
    """A(h) = up(ReLU(down(h))), (..., d) -> (..., d), zero at the start."""

    def __init__(self, width: int, hidden: int, made: Mapping[str, Any]) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden, **made)
        self.up = nn.Linear(hidden, width, **made)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        return _linear(self.up, F.relu(_linear(self.down, h)))


def _linear(layer: nn.Linear, h: Tensor) -> Tensor:
    """``layer(h)``; an image (N, C, ...) whose channels were moved last stays where it lies instead of being copied."""
    image = h.movedim(-1, 1)
    if h.dim() < 3 or h.is_contiguous() or not image.is_contiguous():
        return layer(h)
    rows = image.flatten(2)
    out = torch.baddbmm(layer.bias[:, None], layer.weight.expand(len(rows), -1, -1), rows)
    return out.view(len(rows), layer.out_features, *image.shape[2:]).movedim(1, -1)


class AdapterChain(OutputLayer):
    """n bottlenecks in a chain, ``adapters.0`` to ``adapters.<n-1>``."""

    def __init__(self, target: Target, options: AdapterOptions) -> None:
        super().__init__(target, options)
        if self.channels < options.reduction:
            raise MethodError(f"{target.name}: REDUCTION {options.reduction} exceeds the width {self.channels}")
        sizes = (self.channels, self.channels // options.reduction, target.factory_kwargs())
        self.adapters = nn.ModuleList(Bottleneck(*sizes) for _ in range(options.num))

    def change(self, h: Tensor) -> Tensor:
        for adapter in self.adapters:
            h = h + adapter(h)
        return h


class Adapter(OutputMethod):
    """``{NAME: adapter, TARGETS: [...], NUM: 1, REDUCTION: 4, DIM: 256, LAYOUT: auto}``."""

    name = "adapter"
    options_class = AdapterOptions
    layer_class = AdapterChain
