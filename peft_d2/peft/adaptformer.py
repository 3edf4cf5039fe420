"""AdaptFormer: a bottleneck beside an MLP, on the MLP's input.

Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022, arXiv
2205.13535, equations 2 and 3, with the dropout and the LayerNorm of the authors' code: ``out = mlp(x) + s
Up(dropout(ReLU(Down(LayerNorm(x)))))``. Up and both biases are zero at the start, so the start is the pretrained
block. With COBOT (arXiv 2311.17112) the orchestration sits between Down and ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from .adapted import AdapterLayer, first_input
from .cobot import CobotOptions, CobotStep, orchestrate
from .errors import MethodError
from .method import Allowed, Positive, Probability
from .outputs import OutputLayer, OutputMethod, OutputOptions, map_first_tensor
from .targets import Target


@dataclass(frozen=True)
class AdaptFormerOptions(OutputOptions, CobotOptions):
    """``BOTTLENECK`` is the width inside, ``SCALE`` the factor s."""

    bottleneck: Positive = 16
    scale: Annotated[float, Allowed(bool, "a number other than 0")] = 1.0
    dropout: Probability = 0.1

    def check(self) -> None:
        super().check()
        if self.cobot:
            self.check_cobot("BOTTLENECK", self.bottleneck)


class AdaptFormerBranch(OutputLayer):
    """s Up(dropout(ReLU(Down(LayerNorm(x))))): (..., d) -> (..., d), zero at the start, added to the block's output."""

    reads = "input"
    advice = "choose modules whose input and output have one shape, or the method adapter, or set DIM and LAYOUT"

    def __init__(self, target: Target, options: AdaptFormerOptions, cobot: CobotStep | None = None) -> None:
        super().__init__(target, options)
        made = target.factory_kwargs()
        self.adaptformer_norm = nn.LayerNorm(self.channels, eps=1e-5, **made)
        self.adaptformer_down = nn.Linear(self.channels, options.bottleneck, **made)
        self.adaptformer_up = nn.Linear(options.bottleneck, self.channels, **made)
        self.adaptformer_cobot = cobot
        nn.init.kaiming_uniform_(self.adaptformer_down.weight, a=math.sqrt(5))
        for zero in (self.adaptformer_down.bias, self.adaptformer_up.weight, self.adaptformer_up.bias):
            nn.init.zeros_(zero)
        self.scale = options.scale
        self.dropout = options.dropout

    def adapted_forward(self, module: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
        branch = self(first_input(args, kwargs))

        def add(out: Tensor) -> Tensor:
            if out.shape != branch.shape:
                raise MethodError(
                    f"{self.name} makes {tuple(out.shape)} of {tuple(branch.shape)}: AdaptFormer adds what it makes of "
                    "the input, which must have the output's shape; choose other modules, or the method adapter"
                )
            return out + branch.to(out.dtype)

        return map_first_tensor(forward(*args, **kwargs), add, self.name)

    def change(self, h: Tensor) -> Tensor:
        h = self.adaptformer_down(self.adaptformer_norm(h))
        if self.adaptformer_cobot is not None:
            h = self.adaptformer_cobot(h)
        return self.adaptformer_up(F.dropout(F.relu(h), self.dropout, self.training)) * self.scale


class AdaptFormer(OutputMethod):
    """``{NAME: adaptformer, TARGETS: [mlp], BOTTLENECK: 16, SCALE: 1.0, DROPOUT: 0.1, COBOT: false}``."""

    name = "adaptformer"
    options_class = AdaptFormerOptions
    layer_class = AdaptFormerBranch

    def refusal(self, target: Target) -> str:
        if isinstance(target.module, nn.MultiheadAttention):
            return "AdaptFormer runs beside a module with one input, not an attention"
        module: Any = target.module
        is_linear, is_convolution = isinstance(module, nn.Linear), isinstance(module, _ConvNd)
        if (is_linear and module.in_features != module.out_features) or (
            is_convolution and (module.in_channels != module.out_channels or max(module.stride) > 1)
        ):
            return "AdaptFormer adds what it makes of a module's input, and this module's output has another shape"
        return super().refusal(target)

    def make_layers(self, targets: Sequence[Target]) -> list[tuple[Target, AdapterLayer]]:
        """A branch for each module; with COBOT all of them share one space."""
        options = self.options
        if not options.cobot:
            return super().make_layers(targets)
        steps = orchestrate(options, options.bottleneck, [target.factory_kwargs() for target in targets])
        return [(t, AdaptFormerBranch(t, options, step)) for t, step in zip(targets, steps, strict=True)]
