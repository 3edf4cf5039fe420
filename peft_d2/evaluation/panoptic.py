"""Panoptic quality (Kirillov et al. 2019, equation 1), without the panopticapi package, image by image."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.evaluation import COCOPanopticEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from PIL import Image

from peft_d2.data.images import DatasetError, read_rgb
from peft_d2.data.labels import image_key
from peft_d2.data.segmentation import panoptic_ids
from peft_d2.evaluation.report import IMAGES, Drawn, side_by_side, write_panoptic_report

_VOID = 0
_Segments = tuple[np.ndarray, Mapping[int, int]]  # segment ids (H, W), and the category of each
_Ranked = tuple[float, str, str]  # quality or its negative, file name, HTML
logger = logging.getLogger(__name__)


class PanopticQualityEvaluator(COCOPanopticEvaluator):
    """PQ, SQ and RQ of all classes, things and stuff, as Detectron2 reports them.

    Each image is compared as it comes, so that nothing but four numbers a class is kept and gathered, and of a
    ``report`` (:mod:`peft_d2.evaluation.report`), written to ``output_dir``, its best and worst images.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None, report: bool = False) -> None:
        super().__init__(dataset_name, output_dir=None)
        self._folder = output_dir if report else None
        with PathManager.open(self._metadata.panoptic_json) as file:
            truth = json.load(file)
        self._truth = {image_key(a["image_id"]): a for a in truth["annotations"]}
        self._is_thing = {c["id"]: bool(c["isthing"]) for c in truth["categories"]}
        self._names = {c["id"]: str(c.get("name", c["id"])) for c in truth["categories"]}
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self._statistics = {category: np.zeros(4) for category in self._is_thing}
        self._images = 0
        self._shown: tuple[list[_Ranked], list[_Ranked]] = [], []  # the best images, the worst

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Count each output's ``panoptic_seg``, ids (H, W) and their segments, against the image's truth.

        Without segments (None) the ids are labels as Detectron2's Panoptic-DeepLab gives them.

        Raises:
            KeyError: an image that the truth does not know.
        """
        self._images += len(inputs)
        for record, output in zip(inputs, outputs, strict=True):
            found, segments = output["panoptic_seg"]
            ids = found.cpu().numpy().astype(np.int64)
            if segments is None:
                ids, segments = self._from_labels(ids)
            categories = {s["id"]: self._convert_category_id(dict(s))["category_id"] for s in segments}
            annotation = self._truth[image_key(record["image_id"])]
            with Image.open(os.path.join(self._metadata.panoptic_root, annotation["file_name"])) as opened:
                truth = panoptic_ids(np.asarray(opened.convert("RGB")))
            statistics = {category: np.zeros(4) for category in self._statistics}
            compare(truth, annotation["segments_info"], ids, categories, statistics)
            for category, counted in statistics.items():
                self._statistics[category] += counted
            if self._folder:
                true = {s["id"]: s["category_id"] for s in annotation["segments_info"]}
                self._show(record, sum(statistics.values()), (truth, true), (ids, categories))

    def _show(self, record: dict[str, Any], counted: Any, truth: _Segments, found: _Segments) -> None:
        """Keep the pictures of an image that is among the best or the worst so far, if it can be read."""
        value = quality([counted])["PQ"]
        value, name = 1.0 if np.isnan(value) else value, os.path.basename(record["file_name"])
        html = ""
        for rows, sign in zip(self._shown, (-1, 1), strict=True):
            if len(rows) == IMAGES and (sign * value, name) >= rows[-1][:2]:
                continue
            try:
                html = html or side_by_side(read_rgb(record["file_name"]), _masks(*truth), _masks(*found), name, value)
            except (OSError, DatasetError, Image.DecompressionBombError):
                return
            rows.append((sign * value, name, html))
            rows.sort()
            del rows[IMAGES:]

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        """The figures in per cent on the main process, None on the others."""
        comm.synchronize()
        gathered, shown = comm.gather(self._statistics), comm.gather((self._images, *self._shown))
        if not comm.is_main_process():
            return None
        total = {c: sum(part[c] for part in gathered) for c in self._is_thing}
        figures: dict[str, float] = {}
        for suffix, wanted in (("", (True, False)), ("_th", (True,)), ("_st", (False,))):
            chosen = [total[c] for c, thing in self._is_thing.items() if thing in wanted]
            for name, value in quality(chosen).items():
                figures[name + suffix] = 100 * value
        logger.info("Panoptic Evaluation Results:\n%s", create_small_table(figures))
        if self._folder:
            self._report(figures, total, shown)
        return OrderedDict(panoptic_seg=figures)

    def _report(self, figures: Mapping[str, float], total: Mapping[int, Any], gathered: Sequence[Any]) -> None:
        """Write the page, of the best and worst images of all processes."""
        classes = []
        for category, thing in self._is_thing.items():
            row = [100 * value for value in quality([total[category]]).values()]
            classes.append([self._names[category], "thing" if thing else "stuff", *row, *total[category][1:]])
        images, best, worst = zip(*gathered, strict=True)
        chosen = [[html for *_, html in sorted(itertools.chain(*rows))[:IMAGES]] for rows in (best, worst)]
        assert self._folder is not None
        path = write_panoptic_report(self._folder, self._metadata.name, sum(images), figures, classes, *chosen)
        logger.info("Report with classes and pictures: %s", path)

    def _from_labels(self, labels: np.ndarray) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Ids and segments of an image whose values are category * divisor + instance, -1 where there is none."""
        things = set(self._metadata.thing_dataset_id_to_contiguous_id.values())
        segments = []
        for label in np.unique(labels[labels >= 0]).tolist():
            category = label // self._metadata.label_divisor
            segments.append({"id": label + 1, "category_id": category, "isthing": category in things})
        return labels + 1, segments


def _masks(ids: np.ndarray, categories: Mapping[int, int]) -> Drawn:
    """The masks and categories of the segments of an image, for drawing."""
    return [ids == number for number in categories], list(categories.values())


def compare(
    truth: np.ndarray, truth_segments: Sequence[Mapping[str, Any]], found: np.ndarray,
    found_categories: Mapping[int, int], statistics: Mapping[int, np.ndarray],
) -> None:  # fmt: skip
    """Add one image's matches to ``statistics[category]``: sum of IoU, true positives, false positives, negatives.

    Args:
        truth: (H, W) segment ids, 0 where nothing is annotated.
        truth_segments: ``{id, category_id, iscrowd}`` of each.
        found: (H, W) predicted segment ids, 0 for none.
        found_categories: category of each predicted id.
        statistics: changed in place.
    """
    width = int(found.max()) + 1
    pairs, counts = np.unique(truth.astype(np.int64) * width + found, return_counts=True)
    shared = {(int(p) // width, int(p) % width): int(n) for p, n in zip(pairs, counts, strict=True)}
    truth_area: Counter[int] = Counter()
    found_area: Counter[int] = Counter()
    for (true_id, found_id), count in shared.items():
        truth_area[true_id] += count
        found_area[found_id] += count
    plain = {s["id"]: s["category_id"] for s in truth_segments if not s.get("iscrowd", 0)}
    crowds = {s["category_id"]: s["id"] for s in truth_segments if s.get("iscrowd", 0)}
    matched_truth, matched_found = set(), set()
    for (true_id, found_id), count in shared.items():
        category = plain.get(true_id)
        if category is None or found_categories.get(found_id) != category:
            continue
        union = truth_area[true_id] + found_area[found_id] - count - shared.get((_VOID, found_id), 0)
        if count > 0.5 * union:
            statistics[category][:2] += (count / union, 1)
            matched_truth.add(true_id)
            matched_found.add(found_id)
    for found_id, category in found_categories.items():
        if found_id in matched_found or not found_area[found_id]:
            continue
        unjudged = shared.get((_VOID, found_id), 0) + shared.get((crowds.get(category, -1), found_id), 0)
        if unjudged <= 0.5 * found_area[found_id]:
            statistics[category][2] += 1
    for true_id, category in plain.items():
        if true_id not in matched_truth:
            statistics[category][3] += 1


def quality(statistics: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean PQ, SQ and RQ over the classes that occur; nan where none does."""
    rows = []
    for iou, true, false, missed in statistics:
        weight = true + 0.5 * false + 0.5 * missed
        if weight:
            rows.append((iou / weight, iou / true if true else 0.0, true / weight))
    means = np.mean(rows, axis=0) if rows else np.full(3, np.nan)
    return dict(zip(("PQ", "SQ", "RQ"), means.tolist(), strict=True))
