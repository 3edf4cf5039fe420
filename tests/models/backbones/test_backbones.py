"""FocalNet and DaViT under any head, and every way of fine-tuning on them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

import peft_d2
from peft_d2 import peft
from peft_d2.models import register

from ..conftest import SMALL
from ..test_training import BOXES, sample

FOCAL = {"EMBED_DIM": 16, "DEPTHS": [1, 1, 1, 1], "FOCAL_LEVELS": [2, 2, 1, 1]}
DAVIT = {"DIM_EMBED": [16, 32, 32, 64], "NUM_HEADS": [2, 2, 4, 4], "NUM_GROUPS": [2, 2, 4, 4], "DEPTHS": [1, 1, 1, 1]}
BACKBONES = {"PD2FocalNet": FOCAL, "PD2DepthwiseFocalNet": FOCAL, "PD2DaViT": DAVIT}
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def config(backbone: str) -> CfgNode:
    register()
    cfg = get_cfg()
    peft_d2.add_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.BACKBONE.NAME = backbone
    node = cfg.MODEL.BACKBONE.DAVIT if backbone == "PD2DaViT" else cfg.MODEL.BACKBONE.FOCAL
    node.merge_from_other_cfg(CfgNode(BACKBONES[backbone]))
    node.DROP_PATH_RATE = 0.0
    return cfg


def detection_config(backbone: str, architecture: str, maps: list[str]) -> CfgNode:
    cfg = config(backbone)
    cfg.MODEL.FPN.BOTTOM_UP = backbone
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.BACKBONE.NAME = "PD2FPN"
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16 * 2**i] for i in range(len(maps))]
    return cfg


def mask2former(backbone: str) -> CfgNode:
    cfg = config(backbone)
    cfg.MODEL.META_ARCHITECTURE = "PD2MaskFormer"
    cfg.MODEL.SEM_SEG_HEAD.NAME = "PD2MaskFormerHead"
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "PD2MSDeformAttnPixelDecoder"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME = "PD2MultiScaleMaskedTransformerDecoder"
    cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = True
    cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "multi_scale_pixel_decoder"
    cfg.merge_from_list([part for item in SMALL.items() if "RESNETS" not in item[0] for part in item])
    return cfg


def retinanet(backbone: str) -> CfgNode:
    maps = ["p3", "p4", "p5", "p6", "p7"]
    cfg = detection_config(backbone, "RetinaNet", maps)
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.TOP_BLOCK = "p6p7"
    cfg.MODEL.RETINANET.IN_FEATURES = maps
    cfg.MODEL.RETINANET.NUM_CLASSES = 4
    return cfg


def mask_rcnn(backbone: str) -> CfgNode:
    maps = ["p2", "p3", "p4", "p5", "p6"]
    cfg = detection_config(backbone, "GeneralizedRCNN", maps)
    cfg.MODEL.RPN.IN_FEATURES = maps
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    cfg.MODEL.ROI_HEADS.IN_FEATURES = maps[:4]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.merge_from_other_cfg(CfgNode({"NUM_FC": 1, "FC_DIM": 32, "POOLER_RESOLUTION": 7}))
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.merge_from_other_cfg(CfgNode({"NUM_CONV": 1, "CONV_DIM": 16, "POOLER_RESOLUTION": 14}))
    return cfg


def annotated() -> list[dict[str, Any]]:
    item = sample("polygons")
    instances: Instances = item["instances"]
    instances.gt_boxes = Boxes(torch.tensor(BOXES, dtype=torch.float32))
    return [item]


@every_backbone
@pytest.mark.parametrize("head", [mask2former, retinanet, mask_rcnn])
def test_any_head_trains_and_predicts(backbone: str, head: Any) -> None:
    model = build_model(head(backbone))
    torch.manual_seed(0)
    with EventStorage():
        losses = model.train()(annotated())
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    idle = {n for n, p in model.backbone.named_parameters() if p.grad is None or not p.grad.any()}
    # RetinaNet's pyramid begins at the stride of 8.
    unused = {"bottom_up.norm0.weight", "bottom_up.norm0.bias"} if head is retinanet else set()
    assert idle <= unused
    with torch.no_grad():
        (result,) = model.eval()([{"image": annotated()[0]["image"], "height": 64, "width": 80}])
    assert result["instances"].image_size == (64, 80)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("BOTTOM_UP", "", "BOTTOM_UP is ''; it should be the name of a registered backbone"),
        ("TOP_BLOCK", "p6", r"TOP_BLOCK is 'p6'; it should be one of \['pool', 'p6p7', ''\]"),
        ("IN_FEATURES", ["res5", "c6"], r"some of \['res2', .*the maps of PD2FocalNet; \['c6'\] is not among them"),
    ],
)
def test_an_impossible_pyramid_is_refused(key: str, value: Any, said: str) -> None:
    cfg = retinanet("PD2FocalNet")
    cfg.MODEL.FPN[key] = value
    with pytest.raises(ValueError, match=said):
        build_backbone(cfg)


FOCAL_METHODS: dict[str, list[dict[str, Any]]] = {
    "lora": [{"NAME": "lora", "TARGETS": ["layers.*.modulation.{f,proj}", "layers.*.mlp.{fc1,fc2}"]}],
    "lora on convolutions": [{"NAME": "lora", "TARGETS": ["layers.*.modulation.h", "downsample.proj"]}],
    "lora on context": [{"NAME": "lora", "TARGETS": ["layers.*.modulation.focal_layers.*.0"]}],
    "dora": [{"NAME": "lora", "DORA": True, "TARGETS": ["layers.*.modulation.{f,h}"]}],
    "adapters": [{"NAME": "adapter", "NUM": 2, "TARGETS": ["layers.*.{modulation,mlp}"]}],
    "adapters after context": [{"NAME": "adapter", "TARGETS": ["layers.*.modulation.focal_layers.*"]}],
    "adaptformer": [{"NAME": "adaptformer", "DROPOUT": 0.0, "TARGETS": ["layers.*.mlp"]}],
    "mona": [{"NAME": "mona", "BOTTLENECK": 8, "DROPOUT": 0.0, "TARGETS": ["layers.*.modulation"]}],
    "biases": [{"NAME": "bitfit", "TARGETS": ["layers"]}],
    "norms": [{"NAME": "norm", "TARGETS": ["layers"]}],
    "last blocks": [{"NAME": "last_blocks", "NUM": 1, "TARGETS": ["layers.*.blocks.*"]}],
}
DAVIT_METHODS: dict[str, list[dict[str, Any]]] = {
    "lora on q, v": [{"NAME": "lora", "PARTS": ["q", "v"], "TARGETS": ["blocks.*.qkv"]}],
    "lora": [{"NAME": "lora", "TARGETS": ["blocks.*.{proj,fc1,fc2}", "convs.*.proj"]}],
    "lora on depthwise": [{"NAME": "lora", "TARGETS": ["blocks.*.dw"]}],
    "dora": [{"NAME": "lora", "DORA": True, "TARGETS": ["blocks.*.proj"]}],
    "adapters": [{"NAME": "adapter", "NUM": 2, "TARGETS": ["blocks.*.{window_attn,channel_attn,ffn}"]}],
    "adapters inside": [{"NAME": "adapter", "TARGETS": ["blocks.*.{window_attn,channel_attn,ffn}.fn"]}],
    "adaptformer": [{"NAME": "adaptformer", "DROPOUT": 0.0, "TARGETS": ["blocks.*.ffn.fn"]}],
    "mona": [{"NAME": "mona", "BOTTLENECK": 8, "DROPOUT": 0.0, "TARGETS": ["blocks.*.{window_attn,channel_attn}"]}],
    "biases": [{"NAME": "bitfit", "TARGETS": ["blocks"]}],
    "norms": [{"NAME": "norm", "TARGETS": ["blocks"]}],
    "last blocks": [{"NAME": "last_blocks", "NUM": 1, "TARGETS": ["blocks.*.channel_block"]}],
}
CASES = [(name, m) for name in BACKBONES for m in (DAVIT_METHODS if name == "PD2DaViT" else FOCAL_METHODS)]


@pytest.mark.parametrize(("backbone", "method"), CASES)
def test_every_method_starts_as_the_base_and_is_live(backbone: str, method: str) -> None:
    model = build_backbone(config(backbone))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                nn.init.constant_(parameter, 0.5)  # at their start of 1e-4 layer scales hide what is in the blocks
    base = copy.deepcopy(model)
    methods = (DAVIT_METHODS if backbone == "PD2DaViT" else FOCAL_METHODS)[method]
    report = peft.inject(model, copy.deepcopy(methods))
    assert 0 < report.trainable < report.total
    images = torch.randn(1, 3, 32, 64)
    for name, parameter in base.named_parameters():  # torch may choose another kernel where no gradient is wanted
        parameter.requires_grad_(model.get_parameter(name).requires_grad)

    def outputs(module: nn.Module) -> list[Tensor]:
        return list(module(images).values())

    for training in (True, False):
        for found, expected in zip(outputs(model.train(training)), outputs(base.train(training)), strict=True):
            assert torch.equal(found, expected)
    if report.injected:
        peft.prove_live(model, outputs)
    sum(value.square().sum() for value in outputs(model.train())).backward()
    trained = [t.param for t in peft.trained_parameters(model)]
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    frozen = {id(p) for p in model.parameters()} - {id(p) for p in trained}
    assert all(p.grad is None for p in model.parameters() if id(p) in frozen)
