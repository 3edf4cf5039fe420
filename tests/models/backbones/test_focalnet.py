"""The FocalNet backbones: outputs of the published ones, any image size, stochastic depth, checkpointing."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone
from torch import Tensor, nn

from peft_d2.models import add_models_config, register
from peft_d2.models.backbones.focalnet import DepthwiseFocalNet, FocalBlock, FocalNet

from ..conftest import GOLDENS

KINDS = {"focal": "PD2FocalNet", "focal_dw": "PD2DepthwiseFocalNet"}
PLAIN = {"USE_POSTLN": False, "USE_LAYERSCALE": False, "SCALING_MODULATOR": False, "DROP_PATH_RATE": 0.0}
TINY = {**PLAIN, "EMBED_DIM": 8, "DEPTHS": [1, 2, 1, 1], "FOCAL_LEVELS": [2, 1, 1, 1], "FOCAL_WINDOWS": [3, 3, 3, 3]}
both_kinds = pytest.mark.parametrize("kind", [FocalNet, DepthwiseFocalNet])


def config(**focal: Any) -> CfgNode:
    register()
    cfg = get_cfg()
    add_models_config(cfg)
    cfg.MODEL.BACKBONE.FOCAL.merge_from_other_cfg(CfgNode(focal))
    return cfg


@torch.no_grad()
def same_maps(model: nn.Module, image: Tensor, expected: dict[str, np.ndarray]) -> None:
    """The maps of an image (3, H, W) of values up to 255, within 1e-4."""
    outputs = model((image[None] - 127.5) / 64)
    assert list(outputs) == list(expected)
    for name, value in outputs.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=0, atol=1e-4, err_msg=name)


def same_shapes(model: Any, recipe: dict[str, Any]) -> None:
    shapes = {name: {"channels": s.channels, "stride": s.stride} for name, s in model.output_shape().items()}
    assert shapes == recipe["output_shape"] and model.size_divisibility == recipe["size_divisibility"]


@pytest.mark.parametrize("name", ["focal_tiny", "focal_tiny_dw"])
def test_outputs_are_the_published_ones(golden: Any, filler: ModuleType, name: str) -> None:
    recipe, expected = golden(name), np.load(GOLDENS / f"{name}.npz")
    cfg = config(**recipe["focal_cfg"])
    cfg.MODEL.BACKBONE.NAME = KINDS[recipe["backbone_name"]]
    model = build_backbone(cfg).eval()
    assert filler.fill(model) == recipe["state_dict"]
    state = model.state_dict()
    for key, factor in recipe["post_fill_scale"].items():
        state[key].mul_(factor)
    for item in recipe["inputs"]:
        image = filler.image(item["seed"], item["height"], item["width"])
        same_maps(model, image, {f: expected[f"{item['tag']}.{f}"] for f in ("res2", "res3", "res4", "res5")})
    same_shapes(model, recipe)


EVERY = dict.fromkeys(("USE_POSTLN", "USE_LAYERSCALE", "SCALING_MODULATOR", "USE_POSTLN_IN_MODULATION"), True)


@both_kinds
@pytest.mark.parametrize("options", [{}, EVERY])
@pytest.mark.parametrize("size", [(50, 71), (4, 4)])
def test_any_image_size_and_every_option(kind: type[FocalNet], options: dict, size: tuple[int, int]) -> None:
    outputs = kind(config(**{**TINY, **options}))(torch.randn(1, 3, *size))
    height, width = (-(-length // 4) for length in size)
    for i, (name, feature) in enumerate(outputs.items()):
        assert name == f"res{i + 2}" and feature.shape == (1, 8 * 2**i, height, width)
        height, width = -(-height // 2), -(-width // 2)


def test_only_the_stages_given_out_need_a_norm() -> None:
    cfg = config(EMBED_DIM=8, DEPTHS=[1, 1, 1, 1], OUT_FEATURES=["res3", "res5"], OUT_INDICES=[1, 3])
    model = FocalNet(cfg)
    assert {name for name, _ in model.named_children() if name.startswith("norm")} == {"norm1", "norm3"}
    assert list(model(torch.zeros(1, 3, 32, 32))) == list(model.output_shape()) == ["res3", "res5"]
    cfg.MODEL.BACKBONE.FOCAL.OUT_INDICES = [3]
    with pytest.raises(ValueError, match=r"FOCAL\.OUT_INDICES leaves out \['res3'\]"):
        FocalNet(cfg)
    cfg.MODEL.BACKBONE.FOCAL.OUT_FEATURES = ["p3"]
    with pytest.raises(ValueError, match=r"FOCAL\.OUT_FEATURES is \['p3'\]; it should be some of \['res2'"):
        FocalNet(cfg)


def test_lists_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"FOCAL\.FOCAL_WINDOWS is \[3\]; it should be a list of 4 entries, as DEPTHS"):
        FocalNet(config(FOCAL_WINDOWS=[3]))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("post_norm", [False, True])
def test_stochastic_depth_drops_whole_halves_and_keeps_the_mean(depthwise: bool, post_norm: bool) -> None:
    """With two halves that are dropped on their own, an image takes one of four paths; surviving ones are scaled."""
    node = config(**{**PLAIN, "USE_POSTLN": post_norm, "USE_LAYERSCALE": True, "MLP_RATIO": 2.0}).MODEL.BACKBONE.FOCAL
    block = FocalBlock(node, 6, 2, 3, 0.5, depthwise).train()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    images = torch.randn(1, 5, 4, 6).expand(64, -1, -1, -1)
    found = block(images)
    paths = []
    for first in (0.0, 2.0):
        for second in (0.0, 2.0):
            scale = iter((first, second))
            block.drop_path.forward = lambda x, scale=scale: x * next(scale)  # type: ignore[method-assign]
            paths.append(block(images[:1])[0])
    distance = torch.stack([(found - path).flatten(1).abs().amax(1) for path in paths])
    assert (distance.min(0).values < 1e-5).all()
    assert set(distance.argmin(0).tolist()) == {0, 1, 2, 3}


def test_stochastic_depth_grows_from_the_first_block_to_the_last() -> None:
    blocks = [m for m in FocalNet(config(**{**TINY, "DROP_PATH_RATE": 0.4})).modules() if isinstance(m, FocalBlock)]
    assert [block.drop_path.p for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@both_kinds
def test_checkpointing_changes_memory_alone(kind: type[FocalNet]) -> None:
    options = {**TINY, "DROP_PATH_RATE": 0.3, "USE_POSTLN": True, "USE_LAYERSCALE": True}
    plain, saving = (kind(config(**{**options, "USE_CHECKPOINT": again})) for again in (False, True))
    saving.load_state_dict(plain.state_dict())
    gradients = []
    image = torch.randn(2, 3, 32, 32)
    for model in (plain, saving):
        model.train()
        torch.manual_seed(1)
        model(image)["res5"].square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 50
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, msg=name)
