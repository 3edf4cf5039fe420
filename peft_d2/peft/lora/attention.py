"""LoRA on q, k, v and out of an nn.MultiheadAttention, each with factors of its own.

Hu et al. 2022, arXiv 2106.09685, equation 3, one weight matrix at a time. torch's attention reads its weights instead
of calling modules, so the whole attention is adapted: it computes with ``W0 + s B A`` and never writes to ``W0``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .linear import PackedLora


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
        if "in_proj_weight" in weights and set(self.letters) - {"out"}:
            changed["in_proj_weight"] = self.fuse(weights["in_proj_weight"])
        for letter in self.letters:
            name = "out_proj.weight" if letter == "out" else f"{letter}_proj_weight"
            if name in weights:
                changed[name] = getattr(self, letter).effective(weights[name])
        return changed

    def forward(self, weights: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:  # type: ignore[override]
        """All weights of the attention by name, the adapted ones changed."""
        there = {name: value for name, value in weights.items() if value is not None}
        return {**weights, **self.effective_weights(there)}

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
        weights = self(
            {
                "in_proj_weight": module.in_proj_weight,
                "q_proj_weight": module.q_proj_weight,
                "k_proj_weight": module.k_proj_weight,
                "v_proj_weight": module.v_proj_weight,
                "out_proj.weight": module.out_proj.weight,
            }
        )
        swaps = module.batch_first and query.dim() == 3
        if swaps:  # the same tensor given twice stays one: torch then projects it in one product
            swapped = {id(x): x.transpose(0, 1) for x in (query, key, value)}
            query, key, value = (swapped[id(x)] for x in (query, key, value))
        out, attention = F.multi_head_attention_forward(
            query,
            key,
            value,
            module.embed_dim,
            module.num_heads,
            weights["in_proj_weight"],
            module.in_proj_bias,
            module.bias_k,
            module.bias_v,
            module.add_zero_attn,
            module.dropout,
            weights["out_proj.weight"],
            module.out_proj.bias,
            module.training,
            key_padding_mask,
            need_weights,
            attn_mask,
            use_separate_proj_weight=module.in_proj_weight is None,
            q_proj_weight=weights["q_proj_weight"],
            k_proj_weight=weights["k_proj_weight"],
            v_proj_weight=weights["v_proj_weight"],
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (out.transpose(0, 1) if swaps else out), attention
