#!/usr/bin/env python3
"""Picture what the training mapper feeds the model: augmented images with their masks.

python tools/visualize_data.py --config-file configs/... --output fed.png --batches 4 [KEY VALUE ...]
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from command_line import require_output
from picturing import as_rgb, sheet
from PIL import Image

from peft_d2.data.classes import class_names
from peft_d2.data.loader import build_train_loader
from peft_d2.data.pictures import overlay
from peft_d2.data.segmentation import segmentation_to_mask
from peft_d2.engine.errors import ConfigError, bounded, one_line_errors
from peft_d2.engine.launch import prepare_config, training_parser


def main(arguments: list[str] | None = None) -> None:
    parser = training_parser()
    parser.description = __doc__
    parser.add_argument("--output", default="fed.png", help="file to write")
    parser.add_argument("--batches", type=bounded(int, 1), default=4, help="how many batches to show")
    parser.add_argument("--start", type=bounded(int, 0), default=0, help="the iteration to begin with")
    args = parser.parse_args(arguments)
    require_output("--output", args.output, args.config_file, args.peft_config, args.train_json)
    cfg: Any = prepare_config(args)
    if not cfg.DATASETS.TRAIN:
        raise ConfigError(
            "DATASETS.TRAIN is empty: give --train-json and --train-images, or name registered data sets."
        )
    names = class_names(cfg)
    with contextlib.closing(build_train_loader(cfg, args.start)) as loader:
        batches = itertools.islice(loader, args.batches)
        pictures = [picture_of_sample(sample, cfg.INPUT.FORMAT, names) for batch in batches for sample in batch]
    sheet([Image.fromarray(p) for p in pictures]).save(args.output)
    print(f"wrote {args.output}")


def picture_of_sample(sample: dict[str, Any], image_format: str, names: Sequence[str] = ()) -> np.ndarray:
    """(H, W, 3) uint8 RGB picture of what a mapper made: image and ``instances`` with masks of any kind."""
    image = sample["image"].permute(1, 2, 0).numpy()
    image = as_rgb(image, image_format)
    instances = sample["instances"]
    height, width = image.shape[:2]
    masks: list[np.ndarray] = []
    if instances.has("gt_masks"):
        kept = instances.gt_masks
        if hasattr(kept, "polygons"):
            masks = [segmentation_to_mask(polygons, height, width) for polygons in kept.polygons]
        else:
            masks = list(getattr(kept, "tensor", kept).numpy().astype(bool))
    labels = instances.gt_classes.tolist()[: len(masks)]
    return overlay(image, masks, labels, names)


if __name__ == "__main__":
    one_line_errors(main)
