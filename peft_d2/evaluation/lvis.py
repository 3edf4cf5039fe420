"""Detectron2's LVIS evaluator on faster-coco-eval: the package lvis is not needed, whose figures these are."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import LVISEvaluator
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from faster_coco_eval import COCO

from peft_d2.evaluation.coco import (
    Evaluation,
    complete,
    mean_precision,
    predictions,
    renumbered,
    restore_category_ids,
    write_results,
)
from peft_d2.evaluation.report import write_report
from peft_d2.evaluation.results import instances_to_results

_MAX_DETECTIONS = 300  # of an image, over all classes
logger = logging.getLogger(__name__)


class FastLVISEvaluator(LVISEvaluator):
    """LVIS v1's AP, by size and by frequency of the class (APr, APc, APf); federated annotation is respected.

    ``classes``, ``report``, ``outside``: as :class:`FastCOCOEvaluator` takes them.
    """

    def __init__(
        self, dataset_name: str, output_dir: str | None = None, distributed: bool = True,
        classes: Mapping[int, int] | None = None, report: bool = False, outside: bool = False,
    ) -> None:  # fmt: skip
        # Detectron2's constructor needs the lvis package; these are the attributes that its methods use.
        self._logger = logger
        self._tasks = None
        self._distributed = distributed
        self._output_dir = output_dir
        self._cpu_device = torch.device("cpu")
        self._classes, self._report, self._outside = classes, report, outside
        self._metadata = MetadataCatalog.get(dataset_name)
        with PathManager.open(self._metadata.json_file) as file:
            self._dataset = json.load(file)
        complete(self._dataset)
        self._do_evaluation = bool(self._dataset.get("annotations"))

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Keep the ``instances`` of each output, masks as run lengths."""
        for record, output in zip(inputs, outputs, strict=True):
            results = instances_to_results(output["instances"], record["image_id"])
            self._predictions.append({"image_id": record["image_id"], "instances": results})

    def _eval_predictions(self, gathered: Sequence[dict[str, Any]]) -> None:
        results = list(itertools.chain.from_iterable(p["instances"] for p in gathered))
        contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if contiguous is None:
            contiguous = {c: i for i, c in enumerate(sorted(c["id"] for c in self._dataset["categories"]))}
        results = restore_category_ids(results, self._classes or contiguous, subset=self._classes is not None)
        if self._output_dir:
            write_results(results, os.path.join(self._output_dir, "lvis_instances_results.json"))
        if not self._do_evaluation:
            logger.info("the json has no annotations: predictions are written, nothing is evaluated.")
            return
        evaluations = {}
        for task in sorted(self._tasks_from_predictions(results)):
            if results:
                evaluations[task] = lvis_evaluation(self._dataset, results, task)
            self._results[task] = figures(evaluations.get(task))
            logger.info("Evaluation results for %s: \n%s", task, create_small_table(self._results[task]))
        if self._report and self._output_dir and evaluations:
            root = self._metadata.get("image_root", "")
            path = write_report(self._output_dir, self._metadata.name, root, evaluations, self._results, self._outside)
            logger.info("Report with curves and pictures: %s", path)


def evaluate_lvis(dataset: dict[str, Any], results: Sequence[dict[str, Any]], task: str) -> dict[str, float]:
    """The :func:`figures` of what :func:`lvis_evaluation` takes, without results nan."""
    return figures(lvis_evaluation(dataset, results, task) if results else None)


def lvis_evaluation(dataset: dict[str, Any], results: Sequence[dict[str, Any]], task: str) -> Evaluation:
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
    evaluation = Evaluation(truth, predictions(dataset, best, task, keep_empty=False), task, lvis_style=True)
    evaluation.params.maxDets = [_MAX_DETECTIONS]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def figures(evaluation: Evaluation | None) -> dict[str, float]:
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
