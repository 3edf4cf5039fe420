"""Detectron2's COCO evaluator on faster-coco-eval, whose figures are pycocotools'; and instances as its results."""

from __future__ import annotations

import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as coco_mask

from peft_d2.data.segmentation import run_lengths
from peft_d2.evaluation.report import write_report

_FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")  # LVIS's keys of images that hold category ids
_CHUNK = 200  # pycocotools 2.0.11 overflows a byte when it measures more than 255 masks at once
logger = logging.getLogger(__name__)


@contextmanager
def _truth_as_json(name: str) -> Iterator[None]:
    """Within the block, a set that a function registers has a json, made of its records as they are now.

    Detectron2 would make one in the output folder, and use it again after the records have changed.
    """
    meta = MetadataCatalog.get(name)
    if meta.get("json_file"):
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "truth.json")
        with open(path, "w") as file:
            json.dump(convert_to_coco_dict(name), file, default=lambda value: value.tolist())  # NumPy's numbers
        meta.json_file = path
        try:
            yield
        finally:
            del meta.json_file


class FastCOCOEvaluator(COCOEvaluator):
    """``bbox`` and ``segm`` as Detectron2's evaluator gives them, several times faster; masks are encoded at once.

    Keypoints go the way of Detectron2's own evaluator. Figures do not depend on the json's ids.

    Args:
        dataset_name, output_dir, distributed, more: of Detectron2's evaluator.
        report: write a page for people beside the results, see :mod:`peft_d2.evaluation.report`.
        classes: the model's class index of each category id; None: as the set's metadata has them.
        max_detections: how many predictions of an image and class count.
        outside: whether the report may show images that lie outside the set's folder.
    """

    results_file = "coco_instances_results.json"

    def __init__(
        self, dataset_name: str, output_dir: str | None = None, distributed: bool = True, report: bool = False,
        classes: Mapping[int, int] | None = None, max_detections: int = 100, outside: bool = False, **more: Any,
    ) -> None:  # fmt: skip
        with _truth_as_json(dataset_name):
            super().__init__(dataset_name, output_dir=output_dir, distributed=distributed, use_fast_impl=False, **more)
        self._report, self._outside, self._max_detections = report, outside, max_detections
        self._classes = classes
        self._do_evaluation = bool(self._coco_api.dataset.get("annotations"))
        complete(self._coco_api.dataset)
        for number, annotation in enumerate(self._coco_api.dataset.get("annotations", ()), 1):
            annotation["id"] = number  # pycocotools takes an object whose id is 0 for none
        self._coco_api.createIndex()

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
        """Figures of all processes' predictions; Detectron2 calls it on the main process."""
        results = list(itertools.chain.from_iterable(p["instances"] for p in predictions))
        tasks = self._tasks or self._tasks_from_predictions(results)
        own = self._metadata.get("thing_dataset_id_to_contiguous_id")
        own = own or {category: i for i, category in enumerate(sorted(self._coco_api.cats))}  # not loaded yet
        if "keypoints" in tasks and self._do_evaluation:
            if self._classes is not None:  # Detectron2 takes the data set's own order
                for prediction in predictions:
                    found = restore_category_ids(prediction["instances"], self._classes, subset=True)
                    prediction["instances"] = [{**r, "category_id": own[r["category_id"]]} for r in found]
            super()._eval_predictions(predictions, img_ids=img_ids)
            return
        results = restore_category_ids(results, self._classes or own, subset=self._classes is not None)
        if self._output_dir:  # as COCO's evaluation server takes them
            target = os.path.join(self._output_dir, self.results_file)
            logger.info("Saving results to %s", target)
            with open(target, "w", encoding="utf-8") as file:
                json.dump(results, file)
        if not self._do_evaluation:
            logger.info("the json has no annotations: predictions are written, nothing is evaluated.")
            return
        evaluations: dict[str, COCOeval_faster] = {}
        for task in sorted(tasks):
            if results:
                evaluations[task] = self._evaluated(results, task, img_ids)
            self._results[task] = self._figures(evaluations.get(task), task)
        if self._report and self._output_dir and evaluations:
            figures = {task: self._results[task] for task in evaluations}
            root = self._metadata.get("image_root", "")
            path = write_report(self._output_dir, self._metadata.name, root, evaluations, figures, self._outside)
            logger.info("Report with curves and pictures: %s", path)

    def _evaluated(
        self, results: Sequence[dict[str, Any]], task: str, img_ids: Sequence[Any] | None
    ) -> COCOeval_faster:
        max_dets = sorted({1, 10, self._max_detections})
        return evaluate_coco(self._coco_api.dataset, results, task, img_ids, max_dets)

    def _figures(self, evaluation: COCOeval_faster | None, task: str) -> dict[str, float]:
        return self._derive_coco_results(evaluation, task, class_names=self._metadata.get("thing_classes"))


def evaluate_coco(
    dataset: dict[str, Any], results: Sequence[dict[str, Any]], task: str, img_ids: Sequence[Any] | None = None,
    max_dets: Sequence[int] = (1, 10, 100),
) -> COCOeval_faster:  # fmt: skip
    """COCO's evaluation of results in the data set's own category ids; ``task`` is "bbox" or "segm".

    Sizes (small, medium, large) go by the mask's area for "segm", by the box's for "bbox". Ids may be anything.
    """
    dataset, results, images = renumbered(dataset, results)
    found = predictions(dataset, results, task)
    evaluation = COCOeval_faster(COCO(dataset), found, task, print_function=logger.info)
    if img_ids is not None:
        evaluation.params.imgIds = [images[i] for i in img_ids]
    evaluation.params.maxDets = list(max_dets)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def renumbered(
    dataset: dict[str, Any], results: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[Any, int]]:
    """The same truth and results with ids that count from 1; and the number of each image.

    pycocotools and faster-coco-eval take an annotation whose id is 0 for none, and lose ids that a double cannot hold.
    Images keep the order that pycocotools gives them, which decides between equal scores, where their ids are whole
    numbers that it treats right; others the order of the json.

    Raises:
        ValueError: a result of an image that the data set does not have.
    """
    ids = [image["id"] for image in dataset["images"]]
    sound = all(isinstance(i, int) and 0 <= i < 2**53 for i in ids)
    images = {i: number for number, i in enumerate(sorted(ids) if sound else ids, 1)}
    if unknown := {r["image_id"] for r in results} - images.keys():
        raise ValueError(f"predictions of images that the data set does not have: {sorted(unknown, key=str)[:5]}.")
    known = sorted(c["id"] for c in dataset["categories"])
    categories = {c: c if known[0] >= 0 and known[-1] < 2**53 else number for number, c in enumerate(known, 1)}

    def row(entry: dict[str, Any]) -> dict[str, Any]:
        category = categories.get(entry["category_id"], -1)  # of results that are of no category
        return {**entry, "image_id": images[entry["image_id"]], "category_id": category}

    def image(entry: dict[str, Any]) -> dict[str, Any]:
        lists = {k: [categories[c] for c in entry[k] if c in categories] for k in _FEDERATED if k in entry}
        return {**entry, **lists, "id": images[entry["id"]]}

    truth = {
        **dataset,
        "images": [image(entry) for entry in dataset["images"]],
        "annotations": [{**row(a), "id": number} for number, a in enumerate(dataset["annotations"], 1)],
        "categories": [{**c, "id": categories[c["id"]]} for c in dataset["categories"]],
    }
    return truth, [row(r) for r in results], images


def predictions(dataset: dict[str, Any], results: Sequence[dict[str, Any]], task: str, keep_empty: bool = True) -> COCO:
    """Results, in the data set's own category ids, in the form that the evaluation takes: as ``loadRes``, but faster.

    ``keep_empty``: whether results without area count, as in COCO's evaluation; LVIS's ignores them.
    """
    key = "segmentation" if task == "segm" else "bbox"
    values = [r[key] for r in results]
    if task == "segm":
        areas = [a for i in range(0, len(values), _CHUNK) for a in coco_mask.area(values[i : i + _CHUNK]).tolist()]
    else:
        areas = [width * height for _, _, width, height in values]
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
        if "area" not in annotation and annotation.get("segmentation"):
            rle = run_lengths(annotation["segmentation"], *sizes[annotation["image_id"]])
            annotation["area"] = float(coco_mask.area(rle))
        annotation.setdefault("area", float(annotation["bbox"][2] * annotation["bbox"][3]))


def restore_category_ids(
    results: Sequence[dict[str, Any]], indices: Mapping[int, int], subset: bool = False
) -> list[dict[str, Any]]:
    """Results with the json's category ids in place of the model's class indices.

    Args:
        results: of the model.
        indices: the model's class index of each category id.
        subset: the model has more classes than the json; predictions of those are left out.

    Raises:
        ValueError: a class that the data set does not have.
    """
    original = {index: category for category, index in indices.items()}
    unknown = {result["category_id"] for result in results} - original.keys()
    if unknown and not subset:
        raise ValueError(
            f"a prediction is of class {min(unknown)}, but the data set has classes 0 to "
            f"{len(original) - 1}. The model's number of classes must be the data set's."
        )
    return [{**r, "category_id": original[r["category_id"]]} for r in results if r["category_id"] in original]


def mean_precision(precision: np.ndarray) -> float:
    """Mean of a part of COCO's precision array, -1 where it holds nothing."""
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else -1.0


def encode_masks(masks: Any, chunk: int = 16) -> list[dict[str, Any]]:
    """Compressed COCO run lengths (counts as str) of (N, H, W) masks, a tensor on any device or what splits as one.

    ``chunk`` masks leave the device at once.
    """
    encoded: list[dict[str, Any]] = []
    for part in masks.split(chunk):
        # pycocotools reads columns first: a (n, w, h) array in memory is its (h, w, n).
        columns = part.permute(0, 2, 1).to(torch.uint8).contiguous().cpu().numpy()
        encoded += coco_mask.encode(np.asfortranarray(columns.transpose(2, 1, 0)))
    for rle in encoded:
        rle["counts"] = rle["counts"].decode("ascii")
    return encoded


def instances_to_results(instances: Instances, image_id: Any) -> list[dict[str, Any]]:
    """COCO results of one image, as Detectron2's; ``category_id`` is the contiguous class index."""
    fields = {name: value for name, value in instances.get_fields().items() if name != "pred_masks"}
    small = Instances(instances.image_size, **fields).to("cpu")
    if small.has("pred_keypoints"):  # which are moved by half a pixel in place
        small.pred_keypoints = small.pred_keypoints.clone()
    results = instances_to_coco_json(small, image_id)
    if results and instances.has("pred_masks"):
        for result, mask in zip(results, encode_masks(instances.pred_masks), strict=True):
            result["segmentation"] = mask
    return results
