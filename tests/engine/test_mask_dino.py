"""Mask DINO through the same trainer, evaluation, adapter files and merging as every other model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.modeling import build_model

import peft_d2
from peft_d2 import adapters, peft

from .conftest import DINO
from .test_training import assert_equal, train, trained

ROOT = Path(__file__).resolve().parents[2]


def methods_of(file: str) -> list[Any]:
    """What one of configs/peft says of methods and TRAIN, as command-line pairs."""
    tree: dict[str, Any] = {}
    while file:
        node = yaml.safe_load((ROOT / "configs" / "peft" / file).read_text(encoding="utf-8"))
        tree = {**node["MODEL"]["PEFT"], **tree}
        file = str(Path(file).parent / node["_BASE_"]) if "_BASE_" in node else ""
    return [part for key, value in tree.items() for part in (f"MODEL.PEFT.{key}", str(value))]


@pytest.mark.parametrize("file", ["mask_dino/adapters3.yaml", "mask_dino/lora.yaml"])
def test_train_evaluate_store_load_and_merge(make_cfg: Callable[..., Any], tmp_path: Path, file: str) -> None:
    cfg = make_cfg(*methods_of(file), "TEST.EVAL_PERIOD", 6, config=DINO)
    peft_d2.register()
    torch.manual_seed(3)
    torch.save({"model": build_model(make_cfg(config=DINO)).state_dict()}, tmp_path / "base.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "base.pth")
    trainer = train(cfg)  # proves before the first step that every part is live
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert {"segm/AP", "bbox/AP", "loss_mask_dn_0", "loss_giou_interm", "total_loss"} <= set().union(*rows)

    model = trainer.model.eval()
    image = {"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}
    with torch.no_grad():
        expected = model([image])[0]["instances"]
    fresh = build_model(make_cfg("MODEL.WEIGHTS", tmp_path / "base.pth", config=DINO)).eval()
    fresh.load_state_dict(torch.load(tmp_path / "base.pth", weights_only=True)["model"])
    adapters.load_adapter(fresh, tmp_path / "adapter_final")
    assert_equal(trained(trainer), {name: p for name, p in fresh.named_parameters() if p.requires_grad})
    with torch.no_grad():
        assert torch.equal(fresh([image])[0]["instances"].scores, expected.scores)
        if "lora" in file:
            peft.merge(fresh)
            merged = fresh([image])[0]["instances"]
            torch.testing.assert_close(merged.scores, expected.scores, rtol=1e-4, atol=1e-5)
