"""LVIS without the package lvis, which Detectron2's loader needs and which lags behind NumPy and OpenCV."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any

from peft_d2.data.coco_json import read_json

logger = logging.getLogger(__name__)


def replace_loader(name: str) -> bool:
    """Let the registered LVIS set ``name`` be loaded by :func:`load_lvis` where the package lvis is not installed."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    if importlib.util.find_spec("lvis") is not None or name not in DatasetCatalog:
        return False
    DatasetCatalog[name] = lambda: load_lvis(MetadataCatalog.get(name).json_file, MetadataCatalog.get(name).image_root)
    return True


def load_lvis(json_file: str, image_root: str) -> list[dict[str, Any]]:
    """Detectron2's records of an LVIS json, with ``neg_category_ids`` and ``not_exhaustive_category_ids``.

    Args:
        json_file: of LVIS v0.5 or v1, whose category ids count from 1 without gaps.
        image_root: the folder that holds ``train2017`` and its like, which ``coco_url`` names.

    Raises:
        FileNotFoundError, ValueError: no such file, or not an LVIS json.
    """
    from detectron2.structures import BoxMode

    data = read_json(json_file)
    try:
        objects: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in data["images"]}
        for annotation in data.get("annotations", ()):
            objects[annotation["image_id"]].append({
                "bbox": annotation["bbox"], "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": annotation["category_id"] - 1, "segmentation": annotation["segmentation"],
            })  # fmt: skip
        records = []
        for image in sorted(data["images"], key=lambda entry: entry["id"]):
            split, file_name = image["coco_url"].split("/")[-2:]
            record = {key: image[key] for key in ("height", "width")}
            record |= {key: image.get(key, []) for key in ("neg_category_ids", "not_exhaustive_category_ids")}
            path = os.path.join(image_root, split, file_name)
            records.append({**record, "file_name": path, "image_id": image["id"], "annotations": objects[image["id"]]})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{json_file}: not an LVIS json ({type(error).__name__}: {error}).") from error
    logger.info("%d images in %s.", len(records), json_file)
    return records
