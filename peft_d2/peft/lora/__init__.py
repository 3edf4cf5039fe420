"""LoRA: the method, and which modules it goes on.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685, equation 3:
``h = W0 x + s B A x``, A (r, in) random and B (out, r) zero at the start: the start is the pretrained layer.
factors.py has the variants (rsLoRA, DoRA, PiSSA); linear.py and conv.py what each module computes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..adapted import AdapterLayer, base_class
from ..cobot import CobotStep, orchestrate
from ..errors import MethodError
from ..method import Method
from ..targets import Target, resolve
from .conv import CONVOLUTIONS, ConvolutionLora, has_branch, is_normed_conv
from .factors import PARTS, LoraOptions, LowRank
from .linear import AttentionLora, EmbeddingLora, LinearLora, PackedLora, attention_weight

logger = logging.getLogger(__name__)
_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)
_KNOWN = (
    "nn.Linear, nn.Embedding, nn.Conv1d to 3d, nn.ConvTranspose1d to 3d, Detectron2's Conv2d, nn.MultiheadAttention "
    "(exact types)"
)


class Lora(Method):
    """``{NAME: lora, TARGETS: [...], RANK: 8, ALPHA: 8, ...}``; keys: :class:`~.factors.LoraOptions`."""

    name = "lora"
    options_class = LoraOptions
    options: LoraOptions

    def redirect(self, target: Target, targets: Mapping[int, Target]) -> Target:
        """``out_proj`` of an nn.MultiheadAttention is never called: it is the attention's part ``out``."""
        if isinstance(target.parent, nn.MultiheadAttention) and target.name.endswith(".out_proj"):
            return replace(targets[id(target.parent)], parts=("out",))
        return target

    def refusal(self, target: Target) -> str:
        module: Any = target.module
        base, weight, parts = base_class(module), getattr(module, "weight", None), self.options.parts
        if base.__module__.startswith("peft."):
            return "it is a layer of Hugging Face's peft: merge_and_unload() its model, or load_adapter what it saved"
        if isinstance(weight, Tensor) and "weight" not in module._parameters:
            return "its weight is computed from others (weight_norm, spectral_norm); fold it into one weight first"
        if isinstance(weight, Tensor) and not weight.is_floating_point():
            return f"its weight is stored as {weight.dtype}"
        if base in _LINEAR and "out" in parts:
            return "PARTS names out, which only nn.MultiheadAttention has"
        if (
            base in _LINEAR and parts and module.out_features / module.in_features not in (3, 6)
        ):  # 6: Hiera's, twice as wide
            return f"PARTS needs a fused qkv, d -> 3 d; this is {module.in_features} -> {module.out_features}"
        if base is nn.Embedding and module.max_norm is not None:
            return "its max_norm rewrites the frozen weight as it reads it"
        if base in (*_LINEAR, nn.Embedding, nn.MultiheadAttention, *CONVOLUTIONS) or is_normed_conv(module):
            return ""
        inside = [name for name, child in module.named_modules() if name and base_class(child) in _LINEAR]
        hint = f"; in it are {', '.join(inside[:6])}" if inside else ""
        return f"{base.__module__}.{base.__qualname__} is none of {_KNOWN}{hint}"

    def only_by_name(self, target: Target) -> str:
        """What LoRA could not go on before 0.2, for adapters and configs of then; embeddings are rarely called, too."""
        base = base_class(target.module)
        swept = base in (nn.Conv2d, nn.MultiheadAttention, *_LINEAR) or is_normed_conv(target.module)
        return "" if swept else f"a pattern that ends in a wildcard passes over {base.__qualname__}; name it outright"

    def make_layers(self, targets: Sequence[Target]) -> list[tuple[Target, AdapterLayer]]:
        """The factors of each target module; with COBOT all of them share one space.

        Raises:
            MethodError: an option that does not work on one of the modules, or ranks that COBOT cannot share.
        """
        options = self.options
        resolve([*options.rank_pattern, *options.alpha_pattern], [t.name for t in targets], "place of this entry")
        cobots: Iterator[CobotStep | None] = repeat(None)
        if options.cobot:
            ranks = {target.name: options.rank_and_scale(target.name)[0] for target in targets}
            for name, rank in ranks.items():
                if rank != ranks[targets[0].name]:
                    raise MethodError(f"{name}: COBOT shares one space, so every place needs the same RANK")
            made = [target.factory_kwargs() for target in targets for _ in self._parts(target) or ("whole",)]
            cobots = iter(orchestrate(options, rank, made))
        layers = [(target, self._layer(target, cobots)) for target in targets]
        _warn_of_idle_ranks(layers)
        return layers

    def _parts(self, target: Target) -> tuple[str, ...]:
        """q, k, v, out in order, as far as they are wanted at ``target``; empty for a module that is one weight."""
        default = ("q", "v") if isinstance(target.module, nn.MultiheadAttention) else ()
        wanted = target.parts or self.options.parts or default
        return tuple(part for part in PARTS if part in wanted)

    def _layer(self, target: Target, cobots: Iterator[CobotStep | None]) -> AdapterLayer:
        module: Any = target.module
        options, parts = self.options, self._parts(target)
        made = (options, target.name, target.factory_kwargs())
        if problem := _option_problem(module, options):
            raise MethodError(f"{target.name}: {problem}")
        if isinstance(module, _ConvNd):
            return ConvolutionLora(module, *made)
        if isinstance(module, nn.Embedding):
            return EmbeddingLora(module, *made)
        if isinstance(module, nn.MultiheadAttention):
            return AttentionLora({p: LinearLora(attention_weight(module, p), *made, next(cobots)) for p in parts})
        if parts:
            rows = module.weight.chunk(3)
            return PackedLora({p: LinearLora(rows[PARTS.index(p)], *made, next(cobots)) for p in parts})
        return LinearLora(module.weight, *made, next(cobots))


def _warn_of_idle_ranks(layers: Sequence[tuple[Target, AdapterLayer]]) -> None:
    """Say where a rank is above that of any change of the weight, the shorter side of it."""
    idle = {
        target.name: (len(item.lora_a), most)
        for target, layer in layers
        for item in layer.modules()
        if isinstance(item, LowRank) and len(item.lora_a) > (most := min(len(item.lora_b), item.lora_a[0].numel()))
    }
    if idle:
        name, (rank, most) = next(iter(idle.items()))
        logger.warning(
            "RANK is larger than any change of the weight of %d modules can use, as %d for %s, whose shorter side is "
            "%d: a smaller one, or RANK_PATTERN, does the same with fewer parameters.",
            *(len(idle), rank, name, most),
        )


def _option_problem(module: nn.Module, options: LoraOptions) -> str:
    """Which option does not work on this module; empty when all do."""
    is_convolution, is_embedding = isinstance(module, _ConvNd), isinstance(module, nn.Embedding)
    if (is_convolution or is_embedding) and (options.parts or options.cobot):
        kind = "a convolution" if is_convolution else "an nn.Embedding"
        return f"{'PARTS' if options.parts else 'COBOT'} does not apply to {kind}"
    if options.freeze_a and is_embedding:
        return "FREEZE_A leaves nothing to train in an nn.Embedding, whose A starts at zero"
    if options.dropout and isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention is adapted through its weights, without DROPOUT on an input"
    if options.dropout and is_embedding:
        return "DROPOUT does not apply to an nn.Embedding, which reads indices"
    if options.dropout and isinstance(module, _ConvNd) and not has_branch(module):
        return "DROPOUT needs a branch on the input, which groups or padding_mode rule out here"
    return ""
