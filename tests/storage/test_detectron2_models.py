"""Base weights of Detectron2's own models: heads of another class count, backbones of the usual names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2")

from peft_d2.storage import CheckpointError, load_base  # noqa: E402

MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
SEMANTIC = "Misc/semantic_R_50_FPN_1x.yaml"


def build(config: str, classes: int, *opts: Any) -> nn.Module:
    """One of Detectron2's models, as small as it goes."""
    from detectron2.config import get_cfg
    from detectron2.model_zoo import get_config_file
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(config))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64])
    cfg.merge_from_list(
        ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 32]
    )
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = classes
    cfg.merge_from_list(list(opts))
    return build_model(cfg)


@pytest.mark.parametrize("config", [MASK_RCNN, CASCADE, RETINANET, SEMANTIC])
def test_another_class_count_reinitialises_the_heads_alone(config: str, tmp_path: Path) -> None:
    source, model = build(config, 80), build(config, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"model": source.state_dict(), "__author__": "Detectron2 Model Zoo"}, tmp_path / "base.pth")
    report = load_base(model, tmp_path / "base.pth")
    heads = {name for name, *_ in report.reinitialised}
    assert heads == {name for name, value in source.state_dict().items() if value.shape != before[name].shape} != set()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in heads else source.state_dict()[name])


def test_another_width_is_not_taken_for_another_class_count(tmp_path: Path) -> None:
    """Another width is another model, in the heads too."""
    torch.save(build(MASK_RCNN, 80).state_dict(), tmp_path / "base.pth")
    with pytest.raises(CheckpointError, match=r"roi_heads\.box_head\.fc1\.weight .*\(32, \d+\) -> \(64, \d+\)"):
        load_base(build(MASK_RCNN, 3, "MODEL.ROI_BOX_HEAD.FC_DIM", 64), tmp_path / "base.pth")


@pytest.mark.parametrize("prefix", ["", "backbone.bottom_up."])
def test_an_imagenet_backbone_finds_its_place_below_the_fpn(prefix: str, tmp_path: Path) -> None:
    source, model = build(MASK_RCNN, 3), build(MASK_RCNN, 3)
    backbone = source.backbone.bottom_up.state_dict()
    state = {prefix + name: value + 1 for name, value in backbone.items()} | {"fc.weight": torch.ones(2)}
    if prefix:
        del state["fc.weight"]
    torch.save({"model": state, "matching_heuristics": True}, tmp_path / "R-18.pth")
    report = load_base(model, tmp_path / "R-18.pth")
    assert report.backbone == "backbone.bottom_up." and len(report.loaded) == len(backbone)
    assert torch.equal(model.backbone.bottom_up.stem.conv1.weight, source.backbone.bottom_up.stem.conv1.weight + 1)
