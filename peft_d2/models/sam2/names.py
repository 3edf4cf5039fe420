"""Published Segment Anything 2 checkpoints under our names: Meta's own form and transformers'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from peft_d2.storage.names import renamed

_OURS = ("image_encoder.", "prompt_encoder.", "mask_decoder.", "no_mem_embed")  # the rest is for videos
_META = (
    (r"^sam_(prompt_encoder|mask_decoder)\.", r"\1."),
    (r"\.mlp\.layers\.0\.", ".mlp.lin1."),
    (r"\.mlp\.layers\.1\.", ".mlp.lin2."),
)
_MASKS, _UPSCALING = "prompt_encoder.mask_downscaling.", "mask_decoder.output_upscaling."
_TRANSFORMERS = (
    (r"^vision_encoder\.backbone\.patch_embed\.projection\.", "image_encoder.trunk.patch_embed.proj."),
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"^vision_encoder\.neck\.convs\.(\d+)\.", r"image_encoder.neck.convs.\1.conv."),
    (r"^no_memory_embedding", "no_mem_embed"),
    (r"^shared_image_embedding\.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"^prompt_encoder\.mask_embed\.conv1\.", _MASKS + "0."),
    (r"^prompt_encoder\.mask_embed\.layer_norm1\.", _MASKS + "1."),
    (r"^prompt_encoder\.mask_embed\.conv2\.", _MASKS + "3."),
    (r"^prompt_encoder\.mask_embed\.layer_norm2\.", _MASKS + "4."),
    (r"^prompt_encoder\.mask_embed\.conv3\.", _MASKS + "6."),
    (r"^mask_decoder\.upscale_conv1\.", _UPSCALING + "0."),
    (r"^mask_decoder\.upscale_layer_norm\.", _UPSCALING + "1."),
    (r"^mask_decoder\.upscale_conv2\.", _UPSCALING + "3."),
    (r"\.layer_norm(\d|_final_attn)\.", r".norm\1."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.proj_in\.", ".mlp.lin1."),
    (r"\.mlp\.proj_out\.", ".mlp.lin2."),
    (r"(mlps\.\d+|_head)\.layers\.0\.", r"\1.layers.1."),
    (r"\.proj_in\.", ".layers.0."),
    (r"\.proj_out\.", ".layers.2."),
)
_TWICE = "prompt_encoder.shared_embedding."  # in transformers' form, the same tensor once more


def with_own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under Segment Anything's names for what both have; other states as they are."""
    if any(name.startswith("image_encoder.trunk.") for name in state):
        rules: Sequence[tuple[str, str]] = _META
    elif any(name.startswith("vision_encoder.backbone.blocks.") for name in state):
        rules = _TRANSFORMERS
    else:
        return dict(state)
    own: dict[str, Tensor] = {}
    for name, value in state.items():
        name = renamed(name, rules)
        if name == "prompt_encoder.point_embed.weight":
            own |= {f"prompt_encoder.point_embeddings.{i}.weight": row[None] for i, row in enumerate(value)}
        elif name.startswith(_OURS) and not name.startswith(_TWICE):
            own[name] = value[0, 0] if name == "no_mem_embed" and value.dim() == 3 else value
    return own
