"""LVIS's figures by the evaluator of COCO-format sets: the package lvis is not needed, whose figures these are."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.utils.logger import create_small_table
from faster_coco_eval import COCO, COCOeval_faster

from peft_d2.evaluation.coco import FastCOCOEvaluator, mean_precision, predictions, renumbered

_MAX_DETECTIONS = 300  # of an image, over all classes
logger = logging.getLogger(__name__)


class FastLVISEvaluator(FastCOCOEvaluator):
    """LVIS v1's AP, by size and by frequency of the class (APr, APc, APf); federated annotation is respected."""

    results_file = "lvis_instances_results.json"

    def _evaluated(
        self, results: Sequence[dict[str, Any]], task: str, img_ids: Sequence[Any] | None
    ) -> COCOeval_faster:
        return lvis_evaluation(self._coco_api.dataset, results, task)

    def _figures(self, evaluation: COCOeval_faster | None, task: str) -> dict[str, float]:
        found = figures(evaluation)
        logger.info("Evaluation results for %s: \n%s", task, create_small_table(found))
        return found


def lvis_evaluation(dataset: dict[str, Any], results: Sequence[dict[str, Any]], task: str) -> COCOeval_faster:
    """Evaluate at least one result.

    Args:
        dataset: an LVIS json: images with neg_category_ids and not_exhaustive_category_ids, categories with frequency.
        results: in the data set's own category ids.
        task: "bbox" or "segm".
    """
    dataset, results, _ = renumbered(dataset, results)
    for image in dataset["images"]:
        if "coco_url" in image:  # its end is the file's place below the set's folder
            image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for result in sorted(results, key=lambda r: -r["score"]):
        by_image[result["image_id"]].append(result)
    best = [result for image in by_image.values() for result in image[:_MAX_DETECTIONS]]
    truth = COCO({**dataset, "annotations": [a for a in dataset["annotations"] if a["area"] > 0]})
    found = predictions(dataset, best, task, keep_empty=False)
    evaluation = COCOeval_faster(truth, found, task, print_function=logger.info, lvis_style=True)
    evaluation.params.maxDets = [_MAX_DETECTIONS]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def figures(evaluation: COCOeval_faster | None) -> dict[str, float]:
    """AP, AP50, AP75, APs, APm, APl, APr, APc, APf in per cent; -100 where there is nothing to measure, as LVIS has it.

    Without predictions there is no evaluation, and all are nan.
    """
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
    if evaluation is None:
        logger.warning("no predictions to evaluate.")
        return {name: float("nan") for name in names}
    precision = evaluation.eval["precision"][..., -1]  # (IoU, recall, class, area)
    kinds = np.array([evaluation.cocoGt.cats[c].get("frequency", "") for c in evaluation.params.catIds])
    overall, thresholds = precision[..., 0], evaluation.params.iouThrs
    parts = [overall, overall[np.isclose(thresholds, 0.5)], overall[np.isclose(thresholds, 0.75)]]
    parts += [precision[..., area] for area in (1, 2, 3)]
    parts += [overall[:, :, kinds == kind] for kind in "rcf"]
    return {name: 100 * mean_precision(part) for name, part in zip(names, parts, strict=True)}
