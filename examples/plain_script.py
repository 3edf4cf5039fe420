#!/usr/bin/env python
"""Mask R-CNN from Detectron2's model zoo in a plain Detectron2 script; the five lines of ours are numbered.

python examples/plain_script.py train.json train_images/ output/ [KEY VALUE ...]
"""

from __future__ import annotations

import os
import sys
from typing import Any

from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model

import peft_d2  # 1

ZOO = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
METHODS = [
    {"NAME": "lora", "TARGETS": ["roi_heads.box_head.{fc1,fc2}", "backbone.bottom_up.res5.*.conv2"], "RANK": 8}
]  # 2
HEADS = ["roi_heads.box_predictor", "roi_heads.mask_head.predictor"]


class Trainer(DefaultTrainer):
    """Detectron2's, with the base's weights loaded and the model injected before the optimizer is made."""

    @classmethod
    def build_model(cls, cfg: Any) -> Any:
        model = super().build_model(cfg)
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        print(peft_d2.inject(model, METHODS, train=HEADS))  # 3
        return model


def main(json_file: str, images: str, output: str, *opts: str) -> Any:
    """Train, save the adapter, and load it into a fresh model, which is returned."""
    register_coco_instances("mine", {}, json_file, images)
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(ZOO))
    cfg.MODEL.WEIGHTS = model_zoo.get_checkpoint_url(ZOO)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.OUTPUT_DIR = ("mine",), (), output
    cfg.merge_from_list(list(opts))
    os.makedirs(output, exist_ok=True)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    peft_d2.save_adapter(trainer.model, f"{output}/adapter")  # 4

    model = build_model(cfg)  # later, elsewhere
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    peft_d2.load_adapter(model, f"{output}/adapter")  # 5
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
