"""A whole Mask2Former (Swin-T, 47 million parameters) with LoRA on every layer: disabled, merged, unmerged."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("detectron2")

import peft_d2
from peft_d2 import peft
from peft_d2.engine.config import load_config

ROOT = Path(__file__).parents[2]


def outputs(model: nn.Module, image: Tensor) -> list[Tensor]:
    """Class scores and masks after every decoder layer."""
    with torch.no_grad():
        found = model.sem_seg_head(model.backbone(image))  # type: ignore[operator]
    return [value for layer in (found, *found["aux_outputs"]) for value in (layer["pred_logits"], layer["pred_masks"])]


def digest(model: nn.Module) -> str:
    """sha256 over the base's names and bytes."""
    state = peft.base_state_dict(model)
    return hashlib.sha256(b"".join(k.encode() + v.numpy().tobytes() for k, v in state.items())).hexdigest()


def test_disabled_merged_and_unmerged() -> None:
    from detectron2.modeling import build_model

    peft_d2.register()
    cfg = load_config(str(ROOT / "configs/coco/instance/mask2former_swin_t.yaml"), opts=["MODEL.DEVICE", "cpu"]).cfg
    recipe = load_config("", str(ROOT / "configs/peft/mask2former/lora_swin.yaml")).cfg.MODEL.PEFT
    torch.manual_seed(0)
    model = build_model(cfg).eval().requires_grad_(False)
    image = torch.randn(1, 3, 96, 64)
    base, weights = outputs(model, image), digest(model)
    report = peft.inject(model, recipe.METHODS, recipe.TRAIN)
    assert len(report.places) == 120 and report.total > 47e6
    assert all(map(torch.equal, outputs(model, image), base))  # the start is the base
    with torch.no_grad():
        for trained in peft.trained_parameters(model):
            trained.param.add_(0.02 * torch.randn_like(trained.param))
    adapted = outputs(model, image)
    assert all((a - b).abs().max() > 1e-2 * b.abs().max() for a, b in zip(adapted, base, strict=True))
    with peft.disabled(model):
        assert all(map(torch.equal, outputs(model, image), base)) and digest(model) == weights
    assert all(map(torch.equal, outputs(model, image), adapted))
    trained_weights = digest(model)
    assert peft.merge(model) == []
    for merged, expected in zip(outputs(model, image), adapted, strict=True):
        assert (merged - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert digest(model) != trained_weights
    peft.unmerge(model)
    assert digest(model) == trained_weights and all(map(torch.equal, outputs(model, image), adapted))
