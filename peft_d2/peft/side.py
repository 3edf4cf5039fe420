"""E3VA: adapters beside a frozen backbone, whose gradients never enter it.

Yin et al., "Parameter-efficient is not sufficient: Exploring Parameter, Memory, and Time Efficient Adapter Tuning for
Dense Predictions", ACM MM 2023, arXiv 2306.09729, figure 2: a highway runs beside the blocks of a hierarchical
backbone. After each block it takes the activations behind the attention and behind the MLP, without their gradient,
through a bottleneck each; it is brought to the next stage by the backbone's own downsampling, and joins the map of
each stage before that stage's norm. With h the highway and z such an activation: ``h <- h + E(z + h)`` and
``E(x) = U2 U1 GELU(D2 D1 x)``, where each projection is a product of two thin ones. U2 is zero at the start, so the
start is the pretrained model. The norms of the outputs are trained in the paper: name them in TRAIN.

The backbone's activations are kept for nothing but these inputs: what it costs in memory is the highway's alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .adapted import AdapterLayer
from .errors import MethodError
from .lora.factors import match_dtype
from .method import Method, Options, Positive
from .targets import Target

_PARTS = ("attention", "mlp")


@dataclass(frozen=True)
class E3vaOptions(Options):
    """``BOTTLENECK`` is the width inside each adapter, ``RANK`` that of the factors of its two projections."""

    bottleneck: Positive = 64
    rank: Positive = 16


class SideAdapter(nn.Module):
    """E: (..., d) -> (..., d), zero at the start."""

    def __init__(self, channels: int, options: E3vaOptions, made: dict[str, Any]) -> None:
        super().__init__()
        self.down1 = nn.Linear(channels, options.rank, bias=False, **made)
        self.down2 = nn.Linear(options.rank, options.bottleneck, **made)
        self.up1 = nn.Linear(options.bottleneck, options.rank, bias=False, **made)
        self.up2 = nn.Linear(options.rank, channels, **made)
        nn.init.zeros_(self.up2.weight)
        nn.init.zeros_(self.up2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The adapter's output; same shape and dtype. Only x is kept: what is thin is soon computed again."""
        if torch.is_grad_enabled() and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            return checkpoint(self._bottleneck, x, use_reentrant=False, preserve_rng_state=False)
        return self._bottleneck(x)

    def _bottleneck(self, x: Tensor) -> Tensor:
        low = self.down2(self.down1(match_dtype(x, self.down1.weight)))
        return self.up2(self.up1(F.gelu(low))).to(x.dtype)


class Highway(AdapterLayer):
    """``e3va.<stage>.<block>.{attention,mlp}``: the adapters of one backbone, and how the highway runs beside it."""

    def __init__(self, target: Target, options: E3vaOptions) -> None:
        super().__init__()
        made = target.factory_kwargs()
        self.e3va = nn.ModuleList()
        for stage, norm in _stages(target.module):
            channels = int(norm.get_parameter("weight").shape[0])
            pairs = [[SideAdapter(channels, options, made) for _ in _PARTS] for _ in stage.blocks]
            self.e3va.append(nn.ModuleList(nn.ModuleDict(dict(zip(_PARTS, pair, strict=True))) for pair in pairs))

    def adapted_forward(self, module: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """The backbone's maps with the highway's in them; hooks live as long as this one pass."""
        run = _Run()
        with contextlib.ExitStack() as hooks:
            for (stage, norm), adapters in zip(_stages(module), self.e3va, strict=True):
                for block, pair in zip(stage.blocks, adapters, strict=True):  # type: ignore[call-overload]
                    hooks.callback(block.norm2.register_forward_pre_hook(run.note).remove)
                    after = block.register_forward_hook(lambda _, i, out, pair=pair: run.advance(pair, out))
                    hooks.callback(after.remove)
                hooks.callback(norm.register_forward_hook(run.join).remove)
                if stage.downsample is not None:
                    hooks.callback(stage.downsample.register_forward_hook(run.descend).remove)
            return forward(*args, **kwargs)


class _Run:
    """One pass of the highway: ``h`` is None until the first block, and lies as the backbone's maps do."""

    def __init__(self) -> None:
        self.h: Tensor | None = None
        self.attended: Tensor | None = None

    def note(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Keep what lies behind a block's attention; nothing is computed here, as blocks may be computed twice."""
        self.attended = inputs[0].detach()

    def advance(self, adapters: Any, output: Any) -> None:
        """Past one block."""
        x = output[0] if isinstance(output, tuple) else output
        assert self.attended is not None
        for name, z in zip(_PARTS, (self.attended, x.detach()), strict=True):
            z = z.view_as(x)
            side = adapters[name](z if self.h is None else z + self.h)
            self.h = side if self.h is None else self.h + side
        self.attended = None

    def join(self, norm: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The stage's norm, of the map with the highway in it."""
        assert self.h is not None
        return norm.forward(inputs[0].detach() + self.h.view_as(inputs[0]))

    def descend(self, downsample: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Through the backbone's own downsampling, as the difference that the highway makes there; zero stays zero."""
        assert self.h is not None
        x, *rest = (value.detach() if isinstance(value, Tensor) else value for value in inputs)
        with_side, plain = downsample.forward(x + self.h.view_as(x), *rest), output
        if isinstance(plain, tuple):
            with_side, plain = with_side[0], plain[0]
        self.h = with_side - plain.detach()


def _stages(backbone: nn.Module) -> list[tuple[Any, Any]]:
    """(stage, the norm of its output) of a backbone with ``layers``, each with ``blocks`` and a ``downsample``."""
    layers = getattr(backbone, "layers", None)
    stages = list(layers) if isinstance(layers, nn.ModuleList) else []
    return [(stage, getattr(backbone, f"norm{i}", None)) for i, stage in enumerate(stages)]


class E3va(Method):
    """``{NAME: e3va, TARGETS: [backbone], BOTTLENECK: 64, RANK: 16}``; a target is a whole hierarchical backbone."""

    name = "e3va"
    options_class = E3vaOptions
    layer_class = Highway

    def refusal(self, target: Target) -> str:
        stages = _stages(target.module)
        if not stages:
            return "e3va goes on a whole backbone with stages in `layers`, as Swin's (TARGETS: [backbone])"
        for stage, norm in stages:
            if norm is None or not isinstance(getattr(stage, "blocks", None), nn.ModuleList):
                return "its stages have no `blocks`, or its maps no norm of their own (`norm0`, `norm1`...)"
            if not all(hasattr(block, "norm2") for block in stage.blocks):
                return "its blocks have no `norm2`, whose input e3va takes as what lies behind the attention"
        return ""

    def make_layers(self, targets: Sequence[Target]) -> list[tuple[Target, AdapterLayer]]:
        if len(targets) > 1:
            raise MethodError(f"e3va has one highway; TARGETS choose {len(targets)} backbones")
        return super().make_layers(targets)
