"""The config keys of data and evaluation."""

from __future__ import annotations

from typing import Any

_DEFAULTS: dict[str, dict[str, Any]] = {
    "DATASETS": {"REGISTER": [], "CHECK": True, "ALLOW_FILES_OUTSIDE": False},
    "INPUT": {"MAX_PIXELS": 0},
    "INPUT.PROMPTS": {"BOX_NOISE": 50.0, "MAX_BOXES": 64, "DETECTIONS": ""},
    "TEST": {"MAX_DETECTIONS": 100, "REPORT": True},
    "TEST.TILES": {"ENABLED": False, "SIZE": 96, "SCALE": 2.0, "OVERLAP": 32, "MERGE_THRESH": 0.5},
}


def add_data_config(cfg: Any) -> None:
    """Add the data and evaluation keys to a Detectron2 config; what exists already keeps its value.

    ``DATASETS.REGISTER``: list of ``{NAME, JSON, IMAGES}``, COCO-format sets of one's own.
    ``DATASETS.CHECK``: check the data sets before training and refuse what would crash.
    ``DATASETS.ALLOW_FILES_OUTSIDE``: read images that lie outside a set's folder (absolute names, ``..``, links).
    ``INPUT.MAX_PIXELS``: of an image, against decompression bombs; 0 leaves Pillow's limit, 179 million.
    ``INPUT.PROMPTS``: boxes as prompts: in training each side moves outwards by 0 to ``BOX_NOISE`` px of the resized
    image, and ``MAX_BOXES`` objects of an image are taken at most; in testing ``DETECTIONS`` names a detector's results
    (COCO's result json), "" takes the ground truth's boxes.
    ``TEST.MAX_DETECTIONS``: how many predictions of an image and class COCO's figures count; 100 is the standard.
    ``TEST.REPORT``: after an evaluation of boxes or masks write ``report.html`` beside its results.
    ``TEST.TILES``: evaluate whole images by overlapping tiles of ``SIZE`` px, enlarged by ``SCALE``.
    """
    from detectron2.config import CfgNode

    for path, values in _DEFAULTS.items():
        node = cfg
        for key in path.split("."):
            if key not in node:
                node[key] = CfgNode()
            node = node[key]
        for key, value in values.items():
            if key not in node:
                node[key] = list(value) if isinstance(value, list) else value
