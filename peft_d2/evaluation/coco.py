"""Detectron2's COCO evaluator on faster-coco-eval, whose figures are pycocotools'."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.evaluation import COCOEvaluator
from faster_coco_eval import COCO
from pycocotools import mask as coco_mask

from peft_d2.evaluation.overlaps import Evaluation, run_lengths
from peft_d2.evaluation.report import write_report
from peft_d2.evaluation.results import instances_to_results

_CHUNK = 200  # pycocotools 2.0.11 overflows a byte when it measures more than 255 masks at once
logger = logging.getLogger(__name__)


class FastCOCOEvaluator(COCOEvaluator):
    """``bbox`` and ``segm`` as Detectron2's evaluator gives them, several times faster; masks are encoded at once.

    Keypoints go the way of Detectron2's own evaluator. With ``report`` a page for people is written beside the results,
    see :mod:`peft_d2.evaluation.report`.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        distributed: bool = True,
        report: bool = False,
        **more: Any,
    ) -> None:
        super().__init__(dataset_name, output_dir=output_dir, distributed=distributed, use_fast_impl=False, **more)
        self._report = report
        complete(self._coco_api.dataset)

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Keep the ``instances`` and ``proposals`` of each output, masks as run lengths: no full-size mask stays.

        Raises:
            ValueError: another number of outputs than of inputs.
        """
        for record, output in zip(inputs, outputs, strict=True):
            prediction: dict[str, Any] = {"image_id": record["image_id"]}
            if "instances" in output:
                prediction["instances"] = instances_to_results(output["instances"], record["image_id"])
            if "proposals" in output:
                prediction["proposals"] = output["proposals"].to(self._cpu_device)
            if len(prediction) > 1:
                self._predictions.append(prediction)

    def _eval_predictions(self, predictions: Sequence[dict[str, Any]], img_ids: Any = None) -> None:
        results = list(itertools.chain.from_iterable(p["instances"] for p in predictions))
        tasks = self._tasks or self._tasks_from_predictions(results)
        if "keypoints" in tasks:
            super()._eval_predictions(predictions, img_ids=img_ids)
            return
        restore_category_ids(results, self._metadata.get("thing_dataset_id_to_contiguous_id"))
        if self._output_dir:
            write_results(results, os.path.join(self._output_dir, "coco_instances_results.json"))
        if not self._do_evaluation:
            logger.info("the json has no annotations: predictions are written, nothing is evaluated.")
            return
        # The test sets of upstream's config leave _max_dets_per_image at COCO's [1, 10, 100]; 0.5 does not have it.
        max_dets = getattr(self, "_max_dets_per_image", [1, 10, 100])
        evaluations: dict[str, Evaluation] = {}
        for task in sorted(tasks):
            if results:
                evaluations[task] = evaluate_coco(self._coco_api.dataset, results, task, img_ids, max_dets)
            self._results[task] = self._derive_coco_results(
                evaluations.get(task), task, class_names=self._metadata.get("thing_classes")
            )
        if self._report and self._output_dir and evaluations:
            figures = {task: self._results[task] for task in evaluations}
            root = self._metadata.get("image_root", "")
            path = write_report(self._output_dir, self._metadata.name, root, evaluations, figures)
            logger.info("Report with curves and pictures: %s", path)


def evaluate_coco(
    dataset: dict[str, Any],
    results: Sequence[dict[str, Any]],
    task: str,
    img_ids: Sequence[Any] | None = None,
    max_dets: Sequence[int] = (1, 10, 100),
) -> Evaluation:
    """COCO's evaluation of results in the data set's own category ids; ``task`` is "bbox" or "segm".

    Sizes (small, medium, large) go by the mask's area for "segm", by the box's for "bbox". Image ids may be text, as
    ADE20K's are.
    """
    dataset, results, img_ids = _numbered(dataset, results, img_ids)
    evaluation = Evaluation(COCO(dataset), predictions(dataset, results, task), task)
    if img_ids is not None:
        evaluation.params.imgIds = list(img_ids)
    evaluation.params.maxDets = list(max_dets)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def _numbered(
    dataset: dict[str, Any], results: Sequence[dict[str, Any]], img_ids: Sequence[Any] | None
) -> tuple[dict[str, Any], Sequence[dict[str, Any]], Sequence[Any] | None]:
    """The same with numbers as image ids, which faster-coco-eval needs."""
    ids = [image["id"] for image in dataset["images"]]
    if all(isinstance(i, int) for i in ids):
        return dataset, results, img_ids
    number = {i: n for n, i in enumerate(ids, 1)}
    unknown = {r["image_id"] for r in results} - number.keys()
    if unknown:
        raise ValueError(_unknown_images(unknown))
    images = [{**image, "id": number[image["id"]]} for image in dataset["images"]]
    annotations, results = (
        [{**row, "image_id": number[row["image_id"]]} for row in rows] for rows in (dataset["annotations"], results)
    )
    chosen = None if img_ids is None else [number[i] for i in img_ids]
    return {**dataset, "images": images, "annotations": annotations}, results, chosen


def _unknown_images(ids: set[Any]) -> str:
    return f"predictions of images that the data set does not have: {sorted(ids, key=str)[:5]}."


def predictions(dataset: dict[str, Any], results: Sequence[dict[str, Any]], task: str, keep_empty: bool = True) -> COCO:
    """Results as the evaluation takes them. As loadRes makes them, but areas are measured in one go.

    Args:
        dataset: the truth.
        results: in the data set's own category ids.
        task: "bbox" or "segm".
        keep_empty: whether results without area count, as with COCO; LVIS ignores them.

    Raises:
        ValueError: a result of an image that the data set does not have.
    """
    unknown = {r["image_id"] for r in results} - {image["id"] for image in dataset["images"]}
    if unknown:
        raise ValueError(_unknown_images(unknown))
    key = "segmentation" if task == "segm" else "bbox"
    if task == "segm":
        masks = [r[key] for r in results]
        areas = [a for i in range(0, len(masks), _CHUNK) for a in coco_mask.area(masks[i : i + _CHUNK]).tolist()]
    else:
        areas = [r[key][2] * r[key][3] for r in results]
    copied = ("image_id", "category_id", "score", key)
    annotations = [
        {**{k: r[k] for k in copied}, "id": i, "area": area, "iscrowd": 0}
        for i, (r, area) in enumerate(zip(results, areas, strict=True), 1)
        if keep_empty or area > 0
    ]
    return COCO({"images": dataset["images"], "annotations": annotations, "categories": dataset["categories"]})


def complete(dataset: dict[str, Any]) -> None:
    """Give annotations what evaluation needs and training does not: ``iscrowd`` and ``area``."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in dataset["images"]}
    for annotation in dataset.get("annotations", ()):
        annotation.setdefault("iscrowd", 0)
        if "area" not in annotation:
            annotation["area"] = _area(annotation, *sizes[annotation["image_id"]])


def _area(annotation: dict[str, Any], height: int, width: int) -> float:
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return float(annotation["bbox"][2] * annotation["bbox"][3])
    return float(coco_mask.area(run_lengths(segmentation, height, width)))


def restore_category_ids(results: Sequence[dict[str, Any]], contiguous: dict[int, int] | None) -> None:
    """Contiguous class indices to the json's category ids, in place.

    Raises:
        ValueError: a prediction of a class that the data set does not have.
    """
    if contiguous is None:
        return
    original = {index: category for category, index in contiguous.items()}
    for result in results:
        if result["category_id"] not in original:
            raise ValueError(
                f"a prediction is of class {result['category_id']}, but the data set has classes 0 to "
                f"{len(original) - 1}. The model's number of classes must be the data set's."
            )
        result["category_id"] = original[result["category_id"]]


def write_results(results: Sequence[dict[str, Any]], path: str) -> None:
    """Results as json, where COCO's evaluation server takes them."""
    logger.info("Saving results to %s", path)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(results, file)


def mean_precision(precision: np.ndarray) -> float:
    """Mean of a part of COCO's precision array, -1 where it holds nothing."""
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else -1.0
