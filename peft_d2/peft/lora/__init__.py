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

from ..cobot import CobotPlace, orchestrate
from ..match import resolve
from ..method import Method, MethodError, Placement, Site
from ..specialise import base_class
from .attention import AttentionLora, LoraAttentionMixin, attention_weight
from .conv import (
    CONVOLUTIONS,
    TRANSPOSED,
    ConvLora,
    LoraConvMixin,
    LoraNormedConvMixin,
    LoraTransposedConvMixin,
    conv_problem,
    is_normed_conv,
)
from .factors import PARTS, LoraOptions, LowRank
from .linear import EmbeddingLora, LinearLora, LoraEmbeddingMixin, LoraLinearMixin, PackedLora

__all__ = ["Lora", "LoraOptions", "LowRank"]

_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)


class Lora(Method):
    """``{NAME: lora, TARGETS: [...], RANK: 8, ALPHA: 8, ...}``; keys: :class:`~.factors.LoraOptions`."""

    name = "lora"
    options_class = LoraOptions
    options: LoraOptions

    def redirect(self, site: Site, sites: Mapping[int, Site]) -> Site:
        """``out_proj`` of an nn.MultiheadAttention is never called: its place is the attention's part ``out``."""
        if isinstance(site.parent, nn.MultiheadAttention) and site.name.endswith(".out_proj"):
            return replace(sites[id(site.parent)], parts=("out",))
        return site

    def refusal(self, site: Site) -> str:
        base = base_class(site.module)
        if base is nn.MultiheadAttention:
            return ""
        weight = getattr(site.module, "weight", None)
        if isinstance(weight, Tensor) and "weight" not in site.module._parameters:
            return "its weight is computed from others (weight_norm, spectral_norm); fold it into one weight first"
        if isinstance(weight, Tensor) and not weight.is_floating_point():
            return f"its weight is stored as {weight.dtype}"
        if isinstance(site.module, nn.Linear) and base in _LINEAR:
            return _packed_refusal(site.module, self.options.parts) if self.options.parts else ""
        if isinstance(site.module, nn.Embedding) and base is nn.Embedding:
            return "its max_norm rewrites the frozen weight as it reads it" if site.module.max_norm is not None else ""
        if base in CONVOLUTIONS or is_normed_conv(base, site.module):
            return ""
        inside = [name for name, child in site.module.named_modules() if name and base_class(child) in _LINEAR]
        hint = f"; in it are {', '.join(inside[:6])}" if inside else ""
        known = (
            "nn.Linear, nn.Embedding, nn.Conv1d to 3d, nn.ConvTranspose1d to 3d, Detectron2's Conv2d, "
            "nn.MultiheadAttention (exact types)"
        )
        return f"{base.__qualname__} is none of {known}{hint}"

    def place(self, sites: Sequence[Site]) -> list[Placement]:
        patterns = [*self.options.rank_pattern, *self.options.alpha_pattern]
        resolve(patterns, [site.name for site in sites], "place of this entry")
        counts = [len(self._site_parts(site)) or 1 for site in sites]
        made = [site.tensor_options() for site, count in zip(sites, counts, strict=True) for _ in range(count)]
        cobots = iter(orchestrate(self.options, self._cobot_rank(sites), made))
        return [self._place_one(site, list(islice(cobots, count))) for site, count in zip(sites, counts, strict=True)]

    def _cobot_rank(self, sites: Sequence[Site]) -> int:
        """The width of the one space that COBOT's places share."""
        first, *rest = [self.options.rank_and_scale(site.name)[0] for site in sites]
        for site, rank in zip(sites[1:], rest, strict=True):
            if self.options.cobot and rank != first:
                raise MethodError(f"{site.name}: COBOT shares one space, so every place needs the same RANK")
        return first

    def _site_parts(self, site: Site) -> tuple[str, ...]:
        """q, k, v, out in order, as far as they are wanted at ``site``; empty for a module that is one weight."""
        wanted = site.parts or tuple(self.options.parts)
        if isinstance(site.module, nn.MultiheadAttention):
            wanted = wanted or ("q", "v")
        return tuple(part for part in PARTS if part in wanted)

    def _place_one(self, site: Site, cobots: Sequence[CobotPlace | None]) -> Placement:
        module, options, parts = site.module, self.options, self._site_parts(site)
        made = (options, site.name, site.tensor_options())
        problem = _option_problem(module, options)
        if problem:
            raise MethodError(f"{site.name}: {problem}")
        if isinstance(module, _ConvNd):
            normed = is_normed_conv(base_class(module), module)
            mixin = LoraTransposedConvMixin if base_class(module) in TRANSPOSED else LoraConvMixin
            return Placement(site, LoraNormedConvMixin if normed else mixin, ConvLora(module, *made))
        if isinstance(module, nn.Embedding):
            return Placement(site, LoraEmbeddingMixin, EmbeddingLora(module, *made))
        pairs = list(zip(parts, cobots, strict=False))
        if isinstance(module, nn.MultiheadAttention):
            chosen = {part: LinearLora(attention_weight(module, part), *made, cobot) for part, cobot in pairs}
            return Placement(site, LoraAttentionMixin, AttentionLora(chosen))
        assert isinstance(module, nn.Linear)
        if parts:
            rows = dict(zip(PARTS, module.weight.chunk(3), strict=False))
            chosen = {part: LinearLora(rows[part], *made, cobot) for part, cobot in pairs}
            return Placement(site, LoraLinearMixin, PackedLora(chosen))
        return Placement(site, LoraLinearMixin, LinearLora(module.weight, *made, cobots[0]))


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
