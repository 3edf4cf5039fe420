"""Equal to the Mask2Former of Hugging Face's transformers, written apart from the published one and from ours."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="needs transformers, of the test extra")

HIDDEN, LAYERS, QUERIES, CLASSES = 64, 4, 10, 5
_PIXEL, _DECODER = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
# Their names (of releases 4 and 5) -> ours; applied one after the other.
RULES = [
    (r"^model\.pixel_level_module\.encoder\.(?:swin\.)?", "backbone."),
    (r"^model\.pixel_level_module\.decoder\.", _PIXEL),
    (r"^model\.transformer_module\.(?:decoder\.)?", _DECODER),
    (r"^class_predictor", _DECODER + "class_embed"),
    (r"^backbone\.embeddings\.patch_embeddings\.projection", "backbone.patch_embed.proj"),
    (r"^backbone\.embeddings\.norm", "backbone.patch_embed.norm"),
    (r"^backbone\.encoder\.", "backbone."),
    (r"^backbone\.hidden_states_norms\.stage(\d)", lambda m: f"backbone.norm{int(m[1]) - 1}"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.(?:self\.)?(?:relative_position_bias\.)?(relative_position_\w+)", r"attn.\1"),
    (r"attention\.(?:self\.)?(?:query|q_proj)\.(\w+)", r"attn.qkv.\1#0"),
    (r"attention\.(?:self\.)?(?:key|k_proj)\.(\w+)", r"attn.qkv.\1#1"),
    (r"attention\.(?:self\.)?(?:value|v_proj)\.(\w+)", r"attn.qkv.\1#2"),
    (r"attention\.(?:output\.dense|o_proj)", "attn.proj"),
    (r"blocks\.(\d+)\.intermediate\.dense", r"blocks.\1.mlp.fc1"),
    (r"blocks\.(\d+)\.output\.dense", r"blocks.\1.mlp.fc2"),
    (_PIXEL + "level_embed", _PIXEL + "transformer.level_embed"),
    (_PIXEL + "input_projections", _PIXEL + "input_proj"),
    (_PIXEL + "mask_projection", _PIXEL + "mask_features"),
    (_PIXEL + r"((?:adapter|layer)_\d)\.0", _PIXEL + r"\1"),
    (_PIXEL + r"((?:adapter|layer)_\d)\.1", _PIXEL + r"\1.norm"),
    (_PIXEL + "encoder", _PIXEL + "transformer.encoder"),
    (r"(transformer\.encoder\.layers\.\d+)\.self_attn_layer_norm", r"\1.norm1"),
    (r"(transformer\.encoder\.layers\.\d+)\.final_layer_norm", r"\1.norm2"),
    (r"(transformer\.encoder\.layers\.\d+)\.fc", r"\1.linear"),
    (_DECODER + "queries_embedder", _DECODER + "query_embed"),
    (_DECODER + "queries_features", _DECODER + "query_feat"),
    (_DECODER + r"layernorm\.", _DECODER + "decoder_norm."),
    (_DECODER + r"mask_predictor\.mask_embedder\.(\d)\.0", _DECODER + r"mask_embed.layers.\1"),
    (
        _DECODER + r"layers\.(\d+)\.self_attn\.out_proj",
        _DECODER + r"transformer_self_attention_layers.\1.self_attn.out_proj",
    ),
    (
        _DECODER + r"layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)",
        lambda m: f"{_DECODER}transformer_self_attention_layers.{m[1]}.self_attn.in_proj_{m[3]}#{'qkv'.index(m[2])}",
    ),
    (_DECODER + r"layers\.(\d+)\.self_attn_layer_norm", _DECODER + r"transformer_self_attention_layers.\1.norm"),
    (_DECODER + r"layers\.(\d+)\.cross_attn\.", _DECODER + r"transformer_cross_attention_layers.\1.multihead_attn."),
    (_DECODER + r"layers\.(\d+)\.cross_attn_layer_norm", _DECODER + r"transformer_cross_attention_layers.\1.norm"),
    (_DECODER + r"layers\.(\d+)\.final_layer_norm", _DECODER + r"transformer_ffn_layers.\1.norm"),
    (_DECODER + r"layers\.(\d+)\.fc", _DECODER + r"transformer_ffn_layers.\1.linear"),
]


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict with our names; parts of a fused matrix (``name#0`` to ``name#2``) are stacked."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, replacement in RULES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    fused = {key.split("#")[0] for key in renamed if "#" in key}
    whole = {key: value for key, value in renamed.items() if "#" not in key}
    return whole | {key: torch.cat([renamed[f"{key}#{part}"] for part in range(3)]) for key in fused}


@pytest.fixture
def theirs(filler: Any) -> torch.nn.Module:
    # Their windows shrink on maps smaller than themselves, the published Swin's do not: the smallest map here is 3 x 4.
    swin = transformers.SwinConfig(
        embed_dim=24,
        depths=[2, 2, 2, 2],
        num_heads=[2, 2, 4, 4],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        drop_path_rate=0.0,
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=swin,
        feature_size=HIDDEN,
        mask_feature_size=HIDDEN,
        hidden_dim=HIDDEN,
        encoder_feedforward_dim=128,
        encoder_layers=2,
        decoder_layers=LAYERS,
        num_attention_heads=4,
        dim_feedforward=96,
        num_queries=QUERIES,
        num_labels=CLASSES,
        output_auxiliary_logits=True,
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    filler.fill(model)
    return model


def test_same_outputs_with_converted_weights(
    build: Any, filler: Any, theirs: torch.nn.Module, two_threads: None
) -> None:
    ours = build(
        "coco/instance/mask2former_swin_t.yaml",
        {
            "MODEL.WEIGHTS": "",
            "MODEL.SWIN.EMBED_DIM": 24,
            "MODEL.SWIN.DEPTHS": [2, 2, 2, 2],
            "MODEL.SWIN.NUM_HEADS": [2, 2, 4, 4],
            "MODEL.SWIN.WINDOW_SIZE": 2,
            "MODEL.SEM_SEG_HEAD.CONVS_DIM": HIDDEN,
            "MODEL.SEM_SEG_HEAD.MASK_DIM": HIDDEN,
            "MODEL.SEM_SEG_HEAD.DIM_FEEDFORWARD": 128,
            "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 2,
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": CLASSES,
            "MODEL.MASK_FORMER.HIDDEN_DIM": HIDDEN,
            "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 96,
            "MODEL.MASK_FORMER.NHEADS": 4,
            "MODEL.MASK_FORMER.DEC_LAYERS": LAYERS,
            "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": QUERIES,
        },
    ).eval()
    result = ours.load_state_dict(convert(theirs.state_dict()), strict=False)
    # The index table is computed; their Swin ends in a norm that Mask2Former does not use.
    assert all(key.endswith("relative_position_index") for key in result.missing_keys)
    assert set(result.unexpected_keys) <= {"backbone.layernorm.weight", "backbone.layernorm.bias"}

    image = torch.stack([filler.image(seed, 96, 128) for seed in (3, 4)]) / 64 - 2
    with torch.no_grad():
        found = ours.sem_seg_head(ours.backbone(image))
        expected = theirs(pixel_values=image)
    pairs = [
        (found["pred_logits"], expected.class_queries_logits),
        (found["pred_masks"], expected.masks_queries_logits),
    ]
    for ours_layer, theirs_layer in zip(found["aux_outputs"], expected.auxiliary_logits, strict=True):
        pairs.append((ours_layer["pred_logits"], theirs_layer["class_queries_logits"]))
        pairs.append((ours_layer["pred_masks"], theirs_layer["masks_queries_logits"]))
    assert len(pairs) == 2 * LAYERS
    for mine, their in pairs:
        assert their.std() > 0.1  # the comparison is not of constants
        torch.testing.assert_close(mine, their, rtol=0, atol=1e-4)
