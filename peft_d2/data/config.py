"""The data's and the evaluation's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

PEFT_ARCHITECTURE = "PEFTModel"
PROMPTED = ("SegmentAnything", "SAM2")  # models that are told their classes with their prompts
CLASS_COUNT_KEYS = {  # published name of a model -> the key that counts its classes
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    **dict.fromkeys(("MaskFormer", "MaskDINO", "EoMT"), "MODEL.SEM_SEG_HEAD.NUM_CLASSES"),
}
KEYS = """
DATASETS:
  # One's own data sets, a list of {NAME, JSON, IMAGES}: COCO annotations and the folder of their images.
  REGISTER: []
  # Check the data sets before a training, and refuse what would crash or mislead it.
  CHECK: true
  # Read images that lie outside a set's folder (absolute names, "..", links).
  ALLOW_FILES_OUTSIDE: false
INPUT:
  # The most pixels an image may have, against decompression bombs; 0 leaves Pillow's limit, 179 million.
  MAX_PIXELS: 0
  PROMPTS:
    # In training, each side of a box prompt moves outwards by 0 to so many pixels of the resized image.
    BOX_NOISE: 50.0
    # The most objects of an image that a training prompts for.
    MAX_BOXES: 64
    # In testing: a detector's boxes, a result json of COCO's; "" prompts with the ground truth's.
    DETECTIONS: ""
TEST:
  # How many predictions of an image and class COCO's figures count; 100 is the standard.
  MAX_DETECTIONS: 100
  # After an evaluation of boxes or masks write report.html beside its results.
  REPORT: true
  TILES:
    # Evaluate whole images by overlapping tiles.
    ENABLED: false
    # Side of a tile in pixels of the image.
    SIZE: 96
    # How much a tile is enlarged before the model sees it.
    SCALE: 2.0
    # Pixels that neighbouring tiles share.
    OVERLAP: 32
    # Predictions of two tiles are one object from this IoU, or this share of the smaller mask, on.
    MERGE_THRESH: 0.5
"""


def add_keys(node: Any, defaults: str | Mapping[str, Any]) -> None:
    """Add keys with their defaults, in the form of a config file, to a config; what exists keeps its value."""
    for key, value in ((yaml.safe_load(defaults) or {}) if isinstance(defaults, str) else defaults).items():
        if isinstance(value, Mapping):
            if key not in node:
                node[key] = type(node)()
            add_keys(node[key], value)
        elif key not in node:
            node[key] = value


def add_data_config(cfg: Any) -> None:
    """Add the data and evaluation keys to a Detectron2 config; what exists already keeps its value."""
    add_keys(cfg, KEYS)


def base_architecture(cfg: Any) -> str:
    """Name of the model itself, whether or not PEFT is applied to it."""
    node = cfg.MODEL
    return node.PEFT.META_ARCHITECTURE if node.META_ARCHITECTURE == PEFT_ARCHITECTURE else node.META_ARCHITECTURE


def published_name(cfg: Any) -> str:
    """Name of the model itself as its authors have it, without this project's prefix."""
    return base_architecture(cfg).removeprefix("PD2")
