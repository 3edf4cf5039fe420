"""Mixed batches on the models themselves: every result against a model that holds that adapter alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2")

import torch
from torch import nn

import peft_d2
from peft_d2 import peft

from .conftest import CLASSIFIERS, make_config

HEADS = ["sem_seg_head.predictor.class_embed", "sem_seg_head.predictor.mask_embed"]
VALUES = [{"NAME": "lora", "TARGETS": ["self_attn.value_proj"], "RANK": 4}]


def family(name: str) -> Callable[..., nn.Module]:
    def build(classes: int = 4) -> nn.Module:
        from detectron2.modeling import build_model

        path, small, _ = CLASSIFIERS[name]
        torch.manual_seed(0)
        return build_model(make_config(path, {**small, "MODEL.SEM_SEG_HEAD.NUM_CLASSES": classes})).eval()

    return build


def rcnn(classes: int = 4) -> nn.Module:
    from detectron2.modeling import build_model

    cfg = make_config("", {
        "MODEL.DEVICE": "cpu", "MODEL.WEIGHTS": "", "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64, "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads", "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_HEADS.NUM_CLASSES": classes, "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1, "MODEL.ROI_BOX_HEAD.FC_DIM": 32, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 20, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    })  # fmt: skip
    torch.manual_seed(0)
    return build_model(cfg).eval()


# Builds it, the layers of one adapter, the heads of another, whether it runs sample by sample.
MODELS: dict[str, tuple[Callable[..., nn.Module], list[dict[str, Any]], list[str], bool]] = {
    "mask2former": (family("mask2former"), VALUES, HEADS, True),
    "mask_dino": (family("mask_dino"), VALUES, [*HEADS, "bbox_embed"], True),
    "faster_rcnn": (rcnn, [{"NAME": "lora", "TARGETS": ["fpn_lateral*"]}], ["roi_heads.box_predictor"], False),
}


def trained(
    build: Callable[..., nn.Module], methods: list[dict[str, Any]], train: list[str], classes: int
) -> nn.Module:
    model, base = build(classes), build().state_dict()
    own = model.state_dict()
    model.load_state_dict({key: value for key, value in base.items() if own[key].shape == value.shape}, strict=False)
    peft_d2.inject(model, methods, train)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for item in peft.trained_parameters(model):
            item.param.add_(0.05 * torch.randn(item.param.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def results(model: nn.Module, names: list[str | None]) -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    images = [255 * torch.rand(3, 64, 96, generator=generator) for _ in names]
    batch = [
        {"image": image, "height": 64, "width": 96, "adapter": name} for image, name in zip(images, names, strict=True)
    ]
    if set(names) == {None}:
        batch = [{key: value for key, value in item.items() if key != "adapter"} for item in batch]
    return [result["instances"] for result in model(batch)]


def assert_same(found: Any, expected: Any, exactly: bool = True) -> None:
    assert found.get_fields().keys() == expected.get_fields().keys() and len(found) == len(expected)
    tolerance = 0 if exactly else 1e-5
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=tolerance)
    if exactly:
        assert torch.equal(found.pred_classes, expected.pred_classes)
        torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_three_tasks_and_the_base_in_one_batch(name: str, tmp_path: Path) -> None:
    build, methods, heads, by_sample = MODELS[name]
    tasks = {"lora": (methods, [], 4), "heads": (methods, heads, 4), "other_classes": ([], heads, 7)}
    own = {task: trained(build, *of) for task, of in tasks.items()}
    for task, model in own.items():
        peft_d2.save_adapter(model, tmp_path / task)
    served, names = build(), [*tasks, None]
    peft_d2.load_adapters(served, {task: tmp_path / task for task in tasks})
    before = results(build(), [None] * 4)
    for found, expected in zip(results(served, [None] * 4), before, strict=True):
        assert_same(found, expected)  # the old classes are there, exactly
    mixed = results(served, names)
    for i, task in enumerate(names):
        assert_same(mixed[i], results(served, [task or "base"] * 4)[i])
        alone = results(own[task], [None] * 4) if task else before
        assert_same(mixed[i], alone[i], exactly=not by_sample)
    assert bool(peft.get_injection(served).split.reason) != by_sample  # type: ignore[union-attr]
    assert int(mixed[2].pred_classes.max()) > 3 >= int(mixed[3].pred_classes.max())
