"""Sequential adapters: a chain of bottlenecks after any sublayer.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, arXiv 1902.00751 (figure 2), placed and
chained as in Abou Baker et al., "Parameter-Efficient Fine-Tuning of Large Pretrained Models for Instance Segmentation
Tasks", MAKE 6(4), 2024, arXiv 2606.01947: for the sublayer's output s, ``h_0 = s``, ``h_i = h_(i-1) + A_i(h_(i-1))``
for i = 1..n, with ``A = up(ReLU(down(h)))``, Linear d -> d/r and back. Each up-projection starts at zero, so the
start is the pretrained model. Put after the attention (or its dropout), the residual and the norm of the block come
after it: ``out = LN(x + h_n)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapted import AdapterLayer, base_class
from .errors import MethodError
from .lora.factors import match_dtype
from .method import Method, expect
from .outputs import OutputOptions, Width, check_width, map_first_tensor, output_width
from .targets import Target


@dataclass(frozen=True)
class AdapterOptions(OutputOptions):
    """``NUM`` adapters in a chain, each with a bottleneck of width / ``REDUCTION``."""

    num: int = 1
    reduction: int = 4

    def check(self) -> None:
        super().check()
        expect(self.num > 0, "NUM", self.num, "a positive integer")
        expect(self.reduction > 0, "REDUCTION", self.reduction, "a positive integer")


class Bottleneck(nn.Module):
    """A(h) = up(ReLU(down(h))), (..., d) or channels first (N, d, ...), same shape; zero at the start."""

    def __init__(self, width: int, hidden: int, tensor_options: Mapping[str, Any]) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden, **tensor_options)
        self.up = nn.Linear(hidden, width, **tensor_options)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor, channels_first: bool = False) -> Tensor:
        if channels_first:
            return _on_channels(self.up, F.relu(_on_channels(self.down, h)))
        return self.up(F.relu(self.down(h)))


def _on_channels(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer on axis 1 of x (N, in, ...) -> (N, out, ...), where it lies: moving the axis would copy x twice."""
    rows = x.flatten(2)
    weight = layer.weight.expand(len(rows), -1, -1)
    return torch.baddbmm(layer.bias[:, None], weight, rows).view(len(rows), layer.out_features, *x.shape[2:])


class AdapterChain(AdapterLayer):
    """n bottlenecks in a chain, ``adapters.0`` to ``adapters.<n-1>``."""

    def __init__(self, target: Target, width: Width, options: AdapterOptions) -> None:
        super().__init__()
        if width.channels < options.reduction:
            raise MethodError(f"{target.name}: REDUCTION {options.reduction} exceeds the width {width.channels}")
        hidden, made = width.channels // options.reduction, target.factory_kwargs()
        self.adapters = nn.ModuleList(Bottleneck(width.channels, hidden, made) for _ in range(options.num))
        self.width = width
        self.name = target.name

    def adapted_forward(self, module: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
        return map_first_tensor(forward(*args, **kwargs), self, self.name)

    def forward(self, s: Tensor) -> Tensor:
        """h_n for the sublayer's output s; same shape and dtype."""
        check_width(s, self.width, self.name)
        h = match_dtype(s, self.adapters[0].down.weight)  # type: ignore[union-attr, arg-type]
        in_place = self.width.channels_first and h.dim() > 2 and h.is_contiguous()
        moved = self.width.channels_first and not in_place
        h = h.movedim(1, -1) if moved else h
        for adapter in self.adapters:
            h = h + adapter(h, in_place)
        return (h.movedim(-1, 1) if moved else h).to(s.dtype)


def never_called(target: Target) -> str:
    """Why torch never runs this module's forward; empty when nothing is known against it."""
    if isinstance(target.parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weights without calling it; choose the attention itself"
    containers = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    container = issubclass(base_class(target.module), containers)
    return "it only holds other modules and has no output; choose the modules in it" if container else ""


class Adapter(Method):
    """``{NAME: adapter, TARGETS: [...], NUM: 1, REDUCTION: 4, DIM: 256, LAYOUT: auto}``."""

    name = "adapter"
    options_class = AdapterOptions
    options: AdapterOptions

    def refusal(self, target: Target) -> str:
        return never_called(target)

    def make_layers(self, targets: Sequence[Target]) -> list[tuple[Target, AdapterLayer]]:
        options = self.options
        return [(t, AdapterChain(t, output_width(t, options), options)) for t in targets]
