"""MaskFormer's pixel decoder: its encoder against torch's, its pyramid against a plain one, and under Mask2Former."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from peft_d2.models.layers.transformer import TransformerEncoder, TransformerEncoderLayer
from peft_d2.models.mask2former.model import TransformerEncoderPixelDecoder

from ..conftest import make_config
from ..test_training import sample, step

CHANNELS = {"res2": 4, "res3": 6, "res4": 8, "res5": 10}
SIZES = {"res2": (13, 21), "res3": (7, 11), "res4": (4, 6), "res5": (2, 3)}
SHAPES = {name: ShapeSpec(channels=c, stride=4 * 2**i) for i, (name, c) in enumerate(CHANNELS.items())}


def pixel_decoder() -> TransformerEncoderPixelDecoder:
    head = {"IN_FEATURES": list(SIZES), "CONVS_DIM": 32, "MASK_DIM": 12, "NORM": "GN", "TRANSFORMER_ENC_LAYERS": 2}
    keys = {f"MODEL.SEM_SEG_HEAD.{key}": value for key, value in head.items()}
    former = {"NHEADS": 4, "DIM_FEEDFORWARD": 24, "DROPOUT": 0.0}
    keys |= {f"MODEL.MASK_FORMER.{key}": value for key, value in former.items()}
    return TransformerEncoderPixelDecoder(make_config(overrides=keys), SHAPES).eval()


@torch.no_grad()
@pytest.mark.parametrize("pre_norm", [False, True])
def test_encoder_without_position_is_torchs(pre_norm: bool) -> None:
    ours = TransformerEncoder(3, 16, 4, 24, pre_norm=pre_norm).eval()
    norm = nn.LayerNorm(16) if pre_norm else None
    layer = nn.TransformerEncoderLayer(16, 4, 24, norm_first=pre_norm)
    theirs = nn.TransformerEncoder(layer, 3, norm, enable_nested_tensor=False).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(7, 2, 16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pre_norm", [False, True])
def test_position_goes_into_queries_and_keys_alone(pre_norm: bool) -> None:
    layer = TransformerEncoderLayer(16, 1, 24, pre_norm=pre_norm).eval()
    nn.init.zeros_(layer.linear2.weight)  # leaves the attention and the norms
    nn.init.zeros_(layer.linear2.bias)
    x, position = torch.randn(7, 1, 16), torch.randn(7, 1, 16)
    source = layer.norm1(x) if pre_norm else x
    q, k, v = layer.self_attn.in_proj_weight.chunk(3)
    logits = F.linear(source + position, q)[:, 0] @ F.linear(source + position, k)[:, 0].T
    attended = (logits / 4).softmax(-1) @ F.linear(source, v)[:, 0]
    total = x + layer.self_attn.out_proj(attended)[:, None]
    expected = total if pre_norm else layer.norm2(layer.norm1(total))
    torch.testing.assert_close(layer(x, position), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pyramid() -> None:
    """Each level: the lateral map plus the level above at its nearest pixel, through the level's convolution."""
    decoder = pixel_decoder()
    features = {name: torch.randn(2, CHANNELS[name], *SIZES[name]) for name in SIZES}
    masks, encoded, maps = decoder.forward_features(dict(reversed(features.items())))
    assert encoded.shape == (2, 32, 2, 3)
    torch.testing.assert_close(maps[0], decoder.layer_4(encoded))
    level = maps[0]
    for number, name in ((3, "res4"), (2, "res3"), (1, "res2")):
        height, width = SIZES[name]
        rows = torch.arange(height) * level.shape[-2] // height
        columns = torch.arange(width) * level.shape[-1] // width
        lateral, output = getattr(decoder, f"adapter_{number}"), getattr(decoder, f"layer_{number}")
        level = output(lateral(features[name]) + level[:, :, rows][..., columns])
        if number > 1:
            torch.testing.assert_close(maps[4 - number], level)
    assert len(maps) == 3
    torch.testing.assert_close(masks, decoder.mask_features(level))
    assert masks.shape == (2, 12, 13, 21)


@torch.no_grad()
def test_encoder_sees_the_whole_map_and_its_places() -> None:
    decoder = pixel_decoder()
    features = {name: torch.ones(1, CHANNELS[name], *SIZES[name]) for name in SIZES}

    def encoded() -> Tensor:
        return decoder.forward_features(features)[1][0]

    before = encoded()
    assert (before[:, 0, 0] - before[:, 1, 2]).abs().max() < 1e-5  # equal values stay equal wherever they are
    features["res5"][..., 0, 0] = 2.0
    after = encoded()
    assert (after[:, 1, 2] - before[:, 1, 2]).abs().max() > 1e-4
    assert (after[:, 1, 2] - after[:, 0, 1]).abs().max() > 1e-6  # the places now tell whose neighbour it is


def test_under_mask2former(small: Any) -> None:
    model = small({"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "PD2TransformerEncoderPixelDecoder"})
    losses = step(model, [sample("bitmasks"), sample("bitmasks", 1, (48, 60))])
    assert list(losses) == list(model.criterion.weight_dict)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.sem_seg_head.pixel_decoder.transformer.encoder.layers[0].linear1.out_features == 64


def test_too_few_maps_are_refused(small: Any) -> None:
    with pytest.raises(ValueError, match=r"IN_FEATURES is \['res4', 'res5'\]; it should be 3 maps or more"):
        small(
            {
                "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "PD2TransformerEncoderPixelDecoder",
                "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res4", "res5"],
            }
        )
