"""faster-coco-eval with IoUs of masks straight from their run lengths, which it would decode and encode before."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as coco_mask

logger = logging.getLogger(__name__)


class Evaluation(COCOeval_faster):
    """COCO's or LVIS's evaluation of one task.

    Args:
        truth: the annotations.
        found: the predictions; masks as run lengths.
        task: "bbox" or "segm".
        more: of ``COCOeval_faster``.
    """

    def __init__(self, truth: COCO, found: COCO, task: str, **more: Any) -> None:
        super().__init__(truth, found, task, print_function=logger.info, **more)
        self.masks = task == "segm"
        if self.masks:
            self.params.compute_rle = False  # matching takes IoUs and areas, not masks
            self._truth, self._found = _by_image_and_class(truth), _by_image_and_class(found)

    def computeIoU(self, imgId: Any, catId: Any) -> Any:
        """IoU of one image's predictions of a class, in the order of their scores, with its annotations."""
        if not self.masks:
            return super().computeIoU(imgId, catId)
        truth, found = self._truth.get((imgId, catId)), self._found.get((imgId, catId))
        if not truth or not found:
            return []
        order = np.argsort([-row["score"] for row in found], kind="mergesort")[: self.params.maxDets[-1]]
        size = self.cocoGt.imgs[imgId]["height"], self.cocoGt.imgs[imgId]["width"]
        return coco_mask.iou(
            [run_lengths(found[i]["segmentation"], *size) for i in order],
            [run_lengths(row["segmentation"], *size) for row in truth],
            [int(row.get("iscrowd", 0)) for row in truth],
        )


def run_lengths(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """A polygon list or run lengths of either form as pycocotools takes them."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def _by_image_and_class(data: COCO) -> dict[tuple[Any, Any], list[dict[str, Any]]]:
    rows: dict[tuple[Any, Any], list[dict[str, Any]]] = defaultdict(list)
    for image in sorted(data.imgToAnns):
        for row in data.imgToAnns[image]:
            rows[image, row["category_id"]].append(row)
    return rows
