"""Published EoMT checkpoints under our names: the authors' own form (timm's or transformers' ViT) and transformers'."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from peft_d2.storage.names import renamed

_NET, _HEAD = "backbone.net.", "sem_seg_head."
_QUERIES = {"q.weight", "query.weight"}  # of the authors, of transformers
_DROPPED = re.compile(r"^encoder\.pixel_|rope_embeddings")
_RULES = (
    (r"^encoder\.backbone\.patch_embed\.(cls_token|register_tokens|patch_embeddings)", r"embeddings.\1"),
    (r"^encoder\.backbone\.", _NET),
    (r"^(?:q|query)\.weight", _HEAD + "query_feat.weight"),
    (r"^attn_mask_probs", _HEAD + "query_feat.attn_mask_probs"),
    (r"^(?:class_head|class_predictor)\.", _HEAD + "class_embed."),
    (r"^mask_head\.fc1\.", _HEAD + "mask_embed.0."),
    (r"^mask_head\.fc2\.", _HEAD + "mask_embed.2."),
    (r"^mask_head\.fc3\.", _HEAD + "mask_embed.4."),
    (r"^mask_head\.", _HEAD + "mask_embed."),
    (r"^upscale_block\.block\.(\d+)\.layernorm2d\.", _HEAD + r"upscale.\1.norm."),
    (r"^upscale(?:_block\.block)?\.", _HEAD + "upscale."),
    (r"^embeddings\.register_tokens", _NET + "reg_token"),
    (r"^embeddings\.position_embeddings\.weight", _NET + "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?", _NET + "patch_embed.proj."),
    (r"^embeddings\.", _NET),
    (r"^layers\.", _NET + "blocks."),
    (r"^layernorm\.", _NET + "norm."),
    (r"\.attention\.(?:out|o)_proj\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma"),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)


def with_own_names(state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """A published EoMT's ``state`` under the names ``own`` of a model; other states as they are."""
    if not _QUERIES & state.keys():
        return dict(state)
    found = {}
    for name, value in state.items():
        name = renamed(name, _RULES)
        if name.endswith("attn_mask_probs"):
            value = value.clamp(0, 1)  # a difference to what a training starts with is -1
        if not _DROPPED.search(name):
            found[name] = value[None] if name == _NET + "pos_embed" and value.dim() == 2 else value
    if f"{_NET}blocks.0.gamma_1" in own:
        found = {re.sub(r"\.ls(\d)\.gamma$", r".gamma_\1", name): value for name, value in found.items()}
    for block in {name.partition(".attn.")[0] for name in found if ".attn." in name}:
        _fit_attention(found, own, block + ".attn.")
    return found


def _fit_attention(state: dict[str, Tensor], own: Collection[str], attn: str) -> None:
    """Join or split q, k and v of the attention below the prefix ``attn``, in place, as the model has them.

    timm's fused attention with rotated positions keeps biases of q and v beside the matrix, and none of k.
    """
    for leaf in ("weight", "bias"):
        whole, parts = f"{attn}qkv.{leaf}", [f"{attn}{part}_proj.{leaf}" for part in "qkv"]
        if whole in own and all(part in state for part in parts):
            state[whole] = torch.cat([state.pop(part) for part in parts])
        elif whole in state and parts[0] in own:
            state.update(zip(parts, state.pop(whole).chunk(3), strict=True))
    for part in "qv":
        forms = {f"{attn}{part}_bias", f"{attn}{part}_proj.bias"}
        for found, wanted in zip(forms & state.keys(), forms & set(own), strict=False):
            state[wanted] = state.pop(found)
