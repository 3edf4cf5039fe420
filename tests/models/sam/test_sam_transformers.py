"""Segment Anything is equal to the SamModel of Hugging Face's transformers, written apart from ours."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="needs transformers, of the test extra")

# Their names -> ours; applied one after the other.
RULES = [
    (r"^vision_encoder\.layers\.(\d+)\.layer_norm", r"image_encoder.blocks.\1.norm"),
    (r"^vision_encoder\.layers", "image_encoder.blocks"),
    (r"^vision_encoder\.patch_embed\.projection", "image_encoder.patch_embed.proj"),
    (r"^vision_encoder\.neck\.conv(\d)", lambda m: f"image_encoder.neck.{2 * int(m[1]) - 2}"),
    (r"^vision_encoder\.neck\.layer_norm(\d)", lambda m: f"image_encoder.neck.{2 * int(m[1]) - 1}"),
    (r"^vision_encoder", "image_encoder"),
    (r"shared_image_embedding\.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"prompt_encoder\.mask_embed\.conv(\d)", lambda m: f"prompt_encoder.mask_downscaling.{3 * int(m[1]) - 3}"),
    (r"prompt_encoder\.mask_embed\.layer_norm(\d)", lambda m: f"prompt_encoder.mask_downscaling.{3 * int(m[1]) - 2}"),
    (r"prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
    (r"mask_decoder\.transformer\.layer_norm_final_attn", "mask_decoder.transformer.norm_final_attn"),
    (r"(mask_decoder\.transformer\.layers\.\d+)\.layer_norm", r"\1.norm"),
    (r"mask_decoder\.upscale_conv(\d)", lambda m: f"mask_decoder.output_upscaling.{3 * int(m[1]) - 3}"),
    (r"mask_decoder\.upscale_layer_norm", "mask_decoder.output_upscaling.1"),
    (r"(mask_decoder\..*)\.layers\.0(\.(?:weight|bias))$", r"\1.layers.1\2"),
    (r"\.proj_in\.", ".layers.0."),
    (r"\.proj_out\.", ".layers.2."),
]


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        if key == "prompt_encoder.shared_embedding.positional_embedding":
            continue  # the same tensor once more
        for pattern, replacement in RULES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


@pytest.fixture
def theirs(filler: Any) -> torch.nn.Module:
    config = transformers.SamConfig(
        vision_config=transformers.SamVisionConfig(
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=128,
            window_size=3,
            global_attn_indexes=[1, 3],
            output_channels=32,
            mlp_dim=192,
            num_pos_feats=16,
        ),
        prompt_encoder_config=transformers.SamPromptEncoderConfig(hidden_size=32, image_size=128),
        # Their decoder norms with 1e-6 unless told, the published one with 1e-5.
        mask_decoder_config=transformers.SamMaskDecoderConfig(
            hidden_size=32, mlp_dim=64, num_attention_heads=4, iou_head_hidden_dim=32, layer_norm_eps=1e-5
        ),
    )
    model = transformers.SamModel(config).eval()
    filler.fill(model)
    twin = model.prompt_encoder.shared_embedding.positional_embedding
    with torch.no_grad():
        twin.copy_(model.shared_image_embedding.positional_embedding)
    return model


@pytest.mark.parametrize("multimask", [False, True])
def test_same_outputs_with_converted_weights(sam: Any, filler: Any, theirs: torch.nn.Module, multimask: bool) -> None:
    ours = sam()
    ours.load_state_dict(convert(theirs.state_dict()))
    image = filler.image(5, 90, 128)
    boxes = torch.tensor([[10.0, 20.0, 70.0, 60.0], [30.0, 5.0, 120.0, 88.0]])
    points, labels = torch.tensor([[[40.0, 33.0]], [[64.0, 50.5]]]), torch.tensor([[1], [0]])
    with torch.no_grad():
        pixels = ours.preprocess(image)[None]
        embedding = ours.image_encoder(pixels)
        cases: list[tuple[Any, dict[str, Any]]] = [
            ((None, boxes, None), {"input_boxes": boxes[None]}),
            (((points, labels), None, None), {"input_points": points[None], "input_labels": labels[None]}),
        ]
        for (given, box, mask), named in cases:
            expected = theirs(pixel_values=pixels, multimask_output=multimask, **named)
            tokens, dense = ours.prompt_encoder(given, box, mask)
            positions = ours.prompt_encoder.dense_positions()
            logits, quality = ours.mask_decoder(embedding, positions, tokens, dense, multimask)
            assert expected.pred_masks.std() > 0.1  # the comparison is not of constants
            torch.testing.assert_close(logits, expected.pred_masks[0], rtol=0, atol=1e-4)
            torch.testing.assert_close(quality, expected.iou_scores[0], rtol=0, atol=1e-4)
