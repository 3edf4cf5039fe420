"""LoRA where one weight holds several projections: nn.MultiheadAttention, and an nn.Linear with fused q, k, v.

Each of q, k, v (and the attention's out) has factors of its own (Hu et al. 2022, equation 3, one weight matrix at a
time). torch's attention reads weights instead of calling modules, so the whole attention is specialised: it computes
with ``weight + s B A`` and never writes to the frozen weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .low_rank import LowRank
from .low_rank_linear import low_rank_linear, saves_passes
from .specialise import Part, Specialised

_IN_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def attention_weight(module: nn.MultiheadAttention, part: str) -> Tensor:
    """The weight (out, in) of one of q, k, v, out, with or without kdim / vdim."""
    if part == "out":
        return module.out_proj.weight
    if module.in_proj_weight is None:
        return getattr(module, f"{part}_proj_weight")
    return module.in_proj_weight.chunk(3)["qkv".index(part)]


class PackedLora(Part):
    """Factors of some of q, k, v, each under its letter, for one fused weight (3 d, in) with rows q, then k, then v."""

    def __init__(self, factors: Mapping[str, LowRank]) -> None:
        super().__init__()
        self.letters = tuple(factors)
        for letter, value in factors.items():
            self.add_module(letter, value)

    def factors(self, letter: str) -> LowRank | None:
        """The factors of one letter; None when it is not adapted."""
        return getattr(self, letter) if letter in self.letters else None

    def fuse(self, weight: Tensor) -> Tensor:
        """The effective fused weight (3 d, in)."""
        rows = []
        for letter, block in zip("qkv", weight.chunk(3), strict=True):
            factors = self.factors(letter)
            rows.append(block if factors is None else factors.effective(block))
        return torch.cat(rows)

    def effective_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": self.fuse(weights["weight"])}

    def base_changed(self, module: nn.Module) -> None:
        for letter, block in zip("qkv", module.get_parameter("weight").chunk(3), strict=True):
            factors = self.factors(letter)
            if factors is not None:
                factors.follow(block)

    def linear_factors(self) -> tuple[Tensor, Tensor] | None:
        """A (n r, in) and B (3 d, n r) of the n adapted letters as one update of the fused weight, as LowRank's."""
        down, up = [], []
        for i, letter in enumerate("qkv"):
            if (factors := self.factors(letter)) is None:
                continue
            if (pair := factors.linear_factors()) is None:
                return None
            a, b = pair
            down.append(a)
            up.append(F.pad(b, (0, 0, i * len(b), (2 - i) * len(b))))
        return torch.cat(down), torch.cat(up, dim=1)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The adapted linear layer: (..., in) -> (..., 3 d)."""
        first = getattr(self, self.letters[0])
        if saves_passes(x, weight, first.lora_a) and (factors := self.linear_factors()) is not None:
            return low_rank_linear(x, weight, bias, *factors)
        biases = bias.chunk(3) if bias is not None else (None, None, None)
        blocks = []
        for i, (letter, block) in enumerate(zip("qkv", F.linear(x, weight, bias).chunk(3, dim=-1), strict=True)):
            part = self.factors(letter)
            blocks.append(block if part is None else part.adapted(x, block, weight.chunk(3)[i], biases[i]))
        return torch.cat(blocks, dim=-1)


class LoraPackedLinearMixin(Specialised):
    """Fused qkv nn.Linear: (..., in) -> (..., 3 d)."""

    layer = 1
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        part = self.peft_weight_part("lora")
        return super().forward(x) if part is None else part(x, self.weight, self.bias)


class AttentionLora(PackedLora):
    """Factors of some of q, k, v, out of one nn.MultiheadAttention."""

    def effective_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        changed = {}
        if "in_proj_weight" in weights and set(self.letters) - {"out"}:
            changed["in_proj_weight"] = self.fuse(weights["in_proj_weight"])
        for letter in self.letters:
            name = "out_proj.weight" if letter == "out" else f"{letter}_proj_weight"
            if name in weights:
                changed[name] = getattr(self, letter).effective(weights[name])
        return changed

    def base_changed(self, module: nn.Module) -> None:
        assert isinstance(module, nn.MultiheadAttention)
        for letter in self.letters:
            getattr(self, letter).follow(attention_weight(module, letter))

    def forward(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """The effective weights by name, for those that are adapted."""
        return self.effective_weights(weights)


class _Weights:
    """A weight and a bias, as torch's attention reads them off ``out_proj``."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias


class _AttentionView:
    """All that nn.MultiheadAttention.forward reads off ``self``, with effective weights in place of the stored ones.

    torch's own forward then runs unchanged (its fused inference kernel included), and the module is never written to.
    """

    def __init__(self, module: Any, changed: Mapping[str, Tensor]) -> None:
        self.embed_dim = module.embed_dim
        self.num_heads = module.num_heads
        self.head_dim = module.head_dim
        self.dropout = module.dropout
        self.batch_first = module.batch_first
        self.training = module.training
        self.add_zero_attn = module.add_zero_attn
        self.bias_k = module.bias_k
        self.bias_v = module.bias_v
        self._qkv_same_embed_dim = module._qkv_same_embed_dim
        self.in_proj_bias = module.in_proj_bias
        self.in_proj_weight = changed.get("in_proj_weight", module.in_proj_weight)
        self.q_proj_weight = changed.get("q_proj_weight", module.q_proj_weight)
        self.k_proj_weight = changed.get("k_proj_weight", module.k_proj_weight)
        self.v_proj_weight = changed.get("v_proj_weight", module.v_proj_weight)
        self.out_proj = _Weights(changed.get("out_proj.weight", module.out_proj.weight), module.out_proj.bias)
        self.merge_masks = module.merge_masks


class LoraAttentionMixin(Specialised):
    """nn.MultiheadAttention with adapted projections; inputs and outputs as torch's."""

    layer = 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        part = self.peft_weight_part("lora")
        if part is None:
            return super().forward(*args, **kwargs)
        named = {name: getattr(self, name) for name in _IN_WEIGHTS}
        weights = {name: value for name, value in named.items() if value is not None}
        weights["out_proj.weight"] = self.out_proj.weight  # type: ignore[union-attr]
        view = _AttentionView(self, part(weights))
        return nn.MultiheadAttention.forward(view, *args, **kwargs)  # type: ignore[arg-type]
