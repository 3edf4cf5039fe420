"""LoRA on q, k, v and out of an nn.MultiheadAttention, each with factors of its own.

torch's attention reads its weights instead of calling modules, so the whole attention is adapted: it computes with
``W0 + s B A`` (Hu et al. 2022, equation 3, one weight matrix at a time) and never writes to ``W0``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .linear import PackedLora

_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def attention_weight(module: nn.MultiheadAttention, part: str) -> Tensor:
    """The weight (out, in) of one of q, k, v, out, with or without kdim / vdim."""
    if part == "out":
        return module.out_proj.weight
    if module.in_proj_weight is None:
        return getattr(module, f"{part}_proj_weight")
    return module.in_proj_weight.chunk(3)["qkv".index(part)]


class AttentionLora(PackedLora):
    """Factors of some of q, k, v, out of one nn.MultiheadAttention."""

    def effective_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        changed = {}
        if "in_proj_weight" in weights and any(letter in self for letter in "qkv"):
            changed["in_proj_weight"] = self.fuse(weights["in_proj_weight"])
        for letter, factors in self.items():
            name = "out_proj.weight" if letter == "out" else f"{letter}_proj_weight"
            if name in weights:
                changed[name] = factors.effective(weights[name])  # type: ignore[operator]
        return changed

    def adapted_forward(  # type: ignore[override]
        self,
        module: nn.MultiheadAttention,
        forward: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Inputs and outputs as torch's."""
        own = {name: getattr(module, name) for name in _WEIGHTS} | {"out_proj.weight": module.out_proj.weight}
        weights = own | self.effective_weights({name: value for name, value in own.items() if value is not None})
        in_proj, out_proj = weights.pop("in_proj_weight"), weights.pop("out_proj.weight")
        swaps = module.batch_first and query.dim() == 3
        if swaps:  # the same tensor given twice stays one: torch then projects it in one product
            swapped = {id(x): x.transpose(0, 1) for x in (query, key, value)}
            query, key, value = (swapped[id(x)] for x in (query, key, value))
        sizes = (module.embed_dim, module.num_heads)
        biases = (module.in_proj_bias, module.bias_k, module.bias_v, module.add_zero_attn, module.dropout)
        out, attention = F.multi_head_attention_forward(
            *(query, key, value, *sizes, in_proj, *biases, out_proj, module.out_proj.bias),
            training=module.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=in_proj is None,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            **weights,
        )
        return (out.transpose(0, 1) if swaps else out), attention
