"""LoRA: the method, and its place on nn.Linear.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685, equation 3:
``h = W0 x + s B A x``, A (r, in) random and B (out, r) zero at the start: the start is the pretrained layer. See
low_rank.py for the variants, conv_lora.py and packed_lora.py for the other modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .cobot import CobotPlace, orchestrate
from .conv_lora import ConvLowRank, LoraConvMixin, LoraNormedConvMixin, conv_problem, is_normed_conv
from .low_rank import LoraOptions, LowRank
from .match import resolve
from .method import Method, MethodError, Placement, Site
from .packed_lora import AttentionLora, LoraAttentionMixin, LoraPackedLinearMixin, PackedLora, attention_weight
from .specialise import Specialised, base_class

_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)


class LoraLinearMixin(Specialised):
    """nn.Linear with the low-rank update: (..., in) -> (..., out)."""

    layer = 1
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        part = self.peft_weight_part(Lora.name)
        return super().forward(x) if part is None else part(x, self.weight, self.bias)


class Lora(Method):
    """``{NAME: lora, TARGETS: [...], RANK: 8, ALPHA: 8, ...}``; keys: :class:`~peft_d2.peft.low_rank.LoraOptions`."""

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
        if base in _LINEAR:
            return self._packed_refusal(site.module) if self.options.parts else ""
        if base is nn.Conv2d or is_normed_conv(base, site.module):
            return ""
        inside = [name for name, child in site.module.named_modules() if name and base_class(child) in _LINEAR]
        hint = f"; in it are {', '.join(inside[:6])}" if inside else ""
        known = "nn.Linear, nn.Conv2d, Detectron2's Conv2d, nn.MultiheadAttention (exact types)"
        return f"{base.__qualname__} is none of {known}{hint}"

    def _packed_refusal(self, module: nn.Module) -> str:
        assert isinstance(module, nn.Linear)
        if "out" in self.options.parts:
            return "PARTS names out, which only nn.MultiheadAttention has"
        if module.out_features != 3 * module.in_features:
            return f"PARTS needs a fused qkv, d -> 3 d; this is {module.in_features} -> {module.out_features}"
        return ""

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
        attention = isinstance(site.module, nn.MultiheadAttention)
        wanted = site.parts or tuple(self.options.parts)
        if attention and not wanted:
            wanted = ("q", "v")
        return (
            tuple(part for part in ("q", "k", "v", "out") if part in wanted) if attention or self.options.parts else ()
        )

    def _place_one(self, site: Site, cobots: Sequence[CobotPlace | None]) -> Placement:
        module, tensor_options = site.module, site.tensor_options()
        parts = self._site_parts(site)

        def factors(weight: Tensor, cobot: CobotPlace | None) -> LowRank:
            return LowRank(weight, self.options, site.name, tensor_options, cobot)

        if isinstance(module, nn.MultiheadAttention):
            if self.options.dropout:
                raise MethodError(
                    f"{site.name}: nn.MultiheadAttention is adapted through its weights, without DROPOUT on an input"
                )
            chosen = {
                part: factors(attention_weight(module, part), cobot) for part, cobot in zip(parts, cobots, strict=True)
            }
            return Placement(site, LoraAttentionMixin, AttentionLora(chosen))
        if isinstance(module, nn.Conv2d):
            problem = conv_problem(module, self.options)
            if problem:
                raise MethodError(f"{site.name}: {problem}")
            mixin = LoraConvMixin if base_class(module) is nn.Conv2d else LoraNormedConvMixin
            return Placement(site, mixin, ConvLowRank(module, self.options, site.name, tensor_options))
        assert isinstance(module, nn.Linear)
        if parts:
            rows = module.weight.chunk(3)
            chosen = {part: factors(rows["qkv".index(part)], cobot) for part, cobot in zip(parts, cobots, strict=True)}
            return Placement(site, LoraPackedLinearMixin, PackedLora(chosen))
        return Placement(site, LoraLinearMixin, factors(module.weight, cobots[0]))
