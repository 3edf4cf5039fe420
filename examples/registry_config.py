#!/usr/bin/env python
"""The same by config alone: Detectron2's own trainer builds ``PEFTModel``; the five lines of ours are numbered.

python examples/registry_config.py train.json train_images/ output/ [KEY VALUE ...]
"""

from __future__ import annotations

import os
import sys
from typing import Any

from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer

import peft_d2

ZOO = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


def main(json_file: str, images: str, output: str, *opts: str) -> Any:
    """Train; returns the model."""
    register_coco_instances("mine_too", {}, json_file, images)
    peft_d2.register()  # 1
    cfg = get_cfg()
    peft_d2.add_config(cfg)  # 2
    cfg.merge_from_file(model_zoo.get_config_file(ZOO))
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PEFT.META_ARCHITECTURE = "PEFTModel", "GeneralizedRCNN"  # 3
    cfg.MODEL.PEFT.METHODS = [{"NAME": "adapter", "TARGETS": ["backbone.bottom_up.res5.*"], "REDUCTION": 8}]  # 4
    cfg.MODEL.PEFT.TRAIN = ["roi_heads.box_predictor", "roi_heads.mask_head.predictor"]  # 5
    cfg.MODEL.WEIGHTS = model_zoo.get_checkpoint_url(ZOO)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.OUTPUT_DIR = ("mine_too",), (), output
    cfg.merge_from_list(list(opts))
    os.makedirs(output, exist_ok=True)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer.model


if __name__ == "__main__":
    main(*sys.argv[1:])
