#!/usr/bin/env python
"""A LazyConfig model, such as ViTDet (Detectron2 0.6 and newer); what is of ours is numbered.

python examples/lazy_config.py projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py output/ [key=value ...]
"""

from __future__ import annotations

import sys
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer

import peft_d2  # 1

METHODS = [{"NAME": "lora", "TARGETS": ["backbone.net.blocks.*.attn.{qkv,proj}"], "RANK": 8}]  # 2


def main(config_file: str, output: str, *overrides: str) -> Any:
    """Train for ``train.max_iter`` steps, save the adapter; returns the model."""
    cfg = LazyConfig.apply_overrides(LazyConfig.load(config_file), list(overrides))
    model = instantiate(cfg.model).to(cfg.train.device)
    DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
    print(peft_d2.inject(model, METHODS, train=["roi_heads.box_predictor"]))  # 3
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)  # Detectron2 gives it what requires gradients
    trainer = SimpleTrainer(model.train(), instantiate(cfg.dataloader.train), optimizer)
    trainer.train(0, cfg.train.max_iter)
    peft_d2.save_adapter(model, f"{output}/adapter")  # 4
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
