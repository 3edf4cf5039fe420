"""LoRA: the method, and which modules it goes on.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685, equation 3:
``h = W0 x + s B A x``, A (r, in) random and B (out, r) zero at the start: the start is the pretrained layer.
factors.py has the variants (rsLoRA, DoRA, PiSSA); linear.py, attention.py and conv.py what each module computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..adapted import AdapterLayer, base_class
from ..cobot import CobotPlace, orchestrate
from ..errors import MethodError
from ..method import Method
from ..targets import Target, resolve
from .attention import AttentionLora, attention_weight
from .conv import CONVOLUTIONS, ConvLora, conv_problem, is_normed_conv
from .factors import PARTS, LoraOptions, LowRank
from .linear import EmbeddingLora, LinearLora, PackedLora

__all__ = ["Lora", "LoraOptions", "LowRank"]

_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)


class Lora(Method):
    """``{NAME: lora, TARGETS: [...], RANK: 8, ALPHA: 8, ...}``; keys: :class:`~.factors.LoraOptions`."""

    name = "lora"
    options_class = LoraOptions
    options: LoraOptions

    def redirect(self, target: Target, targets: Mapping[int, Target]) -> Target:
        """``out_proj`` of an nn.MultiheadAttention is never called: its place is the attention's part ``out``."""
        if isinstance(target.parent, nn.MultiheadAttention) and target.name.endswith(".out_proj"):
            return replace(targets[id(target.parent)], parts=("out",))
        return target

    def refusal(self, target: Target) -> str:
        base = base_class(target.module)
        if base is nn.MultiheadAttention:
            return ""
        weight = getattr(target.module, "weight", None)
        if isinstance(weight, Tensor) and "weight" not in target.module._parameters:
            return "its weight is computed from others (weight_norm, spectral_norm); fold it into one weight first"
        if isinstance(weight, Tensor) and not weight.is_floating_point():
            return f"its weight is stored as {weight.dtype}"
        if isinstance(target.module, nn.Linear) and base in _LINEAR:
            return _packed_refusal(target.module, self.options.parts) if self.options.parts else ""
        if isinstance(target.module, nn.Embedding) and base is nn.Embedding:
            return (
                "its max_norm rewrites the frozen weight as it reads it" if target.module.max_norm is not None else ""
            )
        if base in CONVOLUTIONS or is_normed_conv(base, target.module):
            return ""
        inside = [name for name, child in target.module.named_modules() if name and base_class(child) in _LINEAR]
        hint = f"; in it are {', '.join(inside[:6])}" if inside else ""
        known = (
            "nn.Linear, nn.Embedding, nn.Conv1d to 3d, nn.ConvTranspose1d to 3d, Detectron2's Conv2d, "
            "nn.MultiheadAttention (exact types)"
        )
        return f"{base.__qualname__} is none of {known}{hint}"

    def only_by_name(self, target: Target) -> str:
        """What LoRA could not go on before 0.2, for adapters and configs of then; embeddings are rarely called, too."""
        base = base_class(target.module)
        swept = base in (nn.Conv2d, nn.MultiheadAttention, *_LINEAR) or is_normed_conv(base, target.module)
        return "" if swept else f"a pattern that ends in a wildcard passes over {base.__qualname__}; name it outright"

    def make_layers(self, targets: Sequence[Target]) -> list[tuple[Target, AdapterLayer]]:
        patterns = [*self.options.rank_pattern, *self.options.alpha_pattern]
        resolve(patterns, [target.name for target in targets], "place of this entry")
        counts = [len(self._site_parts(target)) or 1 for target in targets]
        made = [target.factory_kwargs() for target, count in zip(targets, counts, strict=True) for _ in range(count)]
        cobots = iter(orchestrate(self.options, self._cobot_rank(targets), made))
        return [(t, self._layer(t, list(islice(cobots, count)))) for t, count in zip(targets, counts, strict=True)]

    def _cobot_rank(self, targets: Sequence[Target]) -> int:
        """The width of the one space that COBOT's places share."""
        first, *rest = [self.options.rank_and_scale(target.name)[0] for target in targets]
        for target, rank in zip(targets[1:], rest, strict=True):
            if self.options.cobot and rank != first:
                raise MethodError(f"{target.name}: COBOT shares one space, so every place needs the same RANK")
        return first

    def _site_parts(self, target: Target) -> tuple[str, ...]:
        """q, k, v, out in order, as far as they are wanted at ``target``; empty for a module that is one weight."""
        wanted = target.parts or tuple(self.options.parts)
        if isinstance(target.module, nn.MultiheadAttention):
            wanted = wanted or ("q", "v")
        return tuple(part for part in PARTS if part in wanted)

    def _layer(self, target: Target, cobots: Sequence[CobotPlace | None]) -> AdapterLayer:
        module, options, parts = target.module, self.options, self._site_parts(target)
        made = (options, target.name, target.factory_kwargs())
        problem = _option_problem(module, options)
        if problem:
            raise MethodError(f"{target.name}: {problem}")
        if isinstance(module, _ConvNd):
            return ConvLora(module, *made)
        if isinstance(module, nn.Embedding):
            return EmbeddingLora(module, *made)
        pairs = list(zip(parts, cobots, strict=False))
        if isinstance(module, nn.MultiheadAttention):
            chosen = {part: LinearLora(attention_weight(module, part), *made, cobot) for part, cobot in pairs}
            return AttentionLora(chosen)
        assert isinstance(module, nn.Linear)
        if parts:
            rows = dict(zip(PARTS, module.weight.chunk(3), strict=False))
            chosen = {part: LinearLora(rows[part], *made, cobot) for part, cobot in pairs}
            return PackedLora(chosen)
        return LinearLora(module.weight, *made, cobots[0])


def _packed_refusal(module: nn.Linear, parts: Sequence[str]) -> str:
    if "out" in parts:
        return "PARTS names out, which only nn.MultiheadAttention has"
    if module.out_features != 3 * module.in_features:
        return f"PARTS needs a fused qkv, d -> 3 d; this is {module.in_features} -> {module.out_features}"
    return ""


def _option_problem(module: nn.Module, options: LoraOptions) -> str:
    """Which option does not work on this module; empty when all do."""
    if isinstance(module, _ConvNd):
        return conv_problem(module, options)
    if isinstance(module, nn.MultiheadAttention) and options.dropout:
        return "nn.MultiheadAttention is adapted through its weights, without DROPOUT on an input"
    if isinstance(module, nn.Embedding) and (options.parts or options.cobot or options.dropout):
        wrong = "PARTS" if options.parts else "COBOT" if options.cobot else "DROPOUT"
        return f"{wrong} does not apply to an nn.Embedding, which reads indices"
    return ""
