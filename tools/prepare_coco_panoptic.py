#!/usr/bin/env python3
"""COCO panoptic: semantic labels of its panoptic images, for evaluating all three tasks at once.

python tools/prepare_coco_panoptic.py --workers 8      # $DETECTRON2_DATASETS/coco, or datasets/coco
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from converting import converter_main, in_parallel, read_label_image, require_folder
from PIL import Image

from peft_d2.data.registration import panoptic_categories, read_json
from peft_d2.storage import disk

_UNLABELLED = 255


def convert_coco_panoptic(source: str | Path, workers: int = 1) -> dict[str, int]:
    """Write ``panoptic_semseg_{train,val}2017``, the classes of the panoptic images, into the folder ``coco``.

    Returns:
        How many images each has; splits whose json is not there are left out.

    Raises:
        FileNotFoundError: neither split is there, or its images are not.
    """
    source = require_folder(source, "annotations/panoptic_*2017.json and panoptic_*2017/ of COCO")
    places = {category["id"]: i for i, category in enumerate(panoptic_categories("coco"))}
    counts = {}
    for split in ("train", "val"):
        path = source / "annotations" / f"panoptic_{split}2017.json"
        if not path.is_file():
            continue
        images = require_folder(source / f"panoptic_{split}2017", f"the images of {path.name}, unpacked")
        annotations = read_json(path)["annotations"]
        with disk.folder(source / f"panoptic_semseg_{split}2017", ("*.png",)) as folder:
            in_parallel(partial(_panoptic_classes, images, folder, places), annotations, workers)
        counts[str(source / f"panoptic_semseg_{split}2017")] = len(annotations)
    if not counts:
        raise FileNotFoundError(f"{source / 'annotations'}: expected panoptic_train2017.json or panoptic_val2017.json.")
    return counts


def _panoptic_classes(images: Path, target: Path, places: dict[int, int], annotation: dict[str, Any]) -> None:
    colours = read_label_image(images / annotation["file_name"], channels=3).astype(np.int64)
    ids = colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
    classes = np.full(ids.shape, _UNLABELLED, dtype=np.uint8)
    for segment in annotation["segments_info"]:
        classes[ids == segment["id"]] = places[segment["category_id"]]
    Image.fromarray(classes).save(target / annotation["file_name"])


if __name__ == "__main__":
    sys.exit(converter_main(__doc__, "coco", convert_coco_panoptic, workers=("processes", 1)))
