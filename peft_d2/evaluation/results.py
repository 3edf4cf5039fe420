"""From a model's instances to COCO results, a few masks at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import BoxMode, Instances
from pycocotools import mask as coco_mask

_CHUNK = 16  # masks that leave the device at once


def encode_masks(masks: Any, chunk: int = _CHUNK) -> list[dict[str, Any]]:
    """Compressed COCO run lengths (counts as str) of (N, H, W) masks, a tensor on any device or what splits as one."""
    encoded: list[dict[str, Any]] = []
    for part in masks.split(chunk):
        # pycocotools reads columns first: a (n, w, h) array in memory is its (h, w, n).
        columns = part.permute(0, 2, 1).to(torch.uint8).contiguous().cpu().numpy()
        encoded += coco_mask.encode(np.asfortranarray(columns.transpose(2, 1, 0)))
    for rle in encoded:
        rle["counts"] = rle["counts"].decode("ascii")
    return encoded


def instances_to_results(instances: Instances, image_id: Any) -> list[dict[str, Any]]:
    """COCO results of one image; ``category_id`` is the contiguous class index."""
    if not len(instances):
        return []
    boxes = BoxMode.convert(instances.pred_boxes.tensor.detach().cpu(), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    columns: dict[str, Sequence[Any]] = {
        "category_id": instances.pred_classes.tolist(),
        "bbox": boxes,
        "score": instances.scores.tolist(),
    }
    if instances.has("pred_masks"):
        columns["segmentation"] = encode_masks(instances.pred_masks)
    if instances.has("pred_keypoints"):
        points = instances.pred_keypoints.detach().cpu().clone()
        points[..., :2] -= 0.5  # annotations count pixels, predictions measure from the corner
        columns["keypoints"] = points.flatten(1).tolist()
    return [
        {"image_id": image_id, **{key: values[i] for key, values in columns.items()}} for i in range(len(instances))
    ]
