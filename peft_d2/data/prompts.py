"""Boxes as prompts of models that are told where to look (Segment Anything).

The boxes are the ground truth's, in training with noise, or in testing those of a detector.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import Tensor

from peft_d2.data.images import DatasetError

logger = logging.getLogger(__name__)
Detections = Mapping[Any, Sequence[Mapping[str, Any]]]  # by image id: bbox (XYWH), class, score


def widened(boxes: Tensor, noise: float, size: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) with each side moved outwards by 0 to ``noise`` px, within an image of ``size`` (H, W)."""
    moved = torch.from_numpy(np.random.uniform(0, noise, tuple(boxes.shape)).astype(np.float32))
    boxes = boxes + moved * boxes.new_tensor([-1, -1, 1, 1])
    limit = boxes.new_tensor([size[1], size[0], size[1], size[0]])
    return torch.minimum(boxes.clamp(min=0), limit)


def prompted_objects(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The annotations of a record whose boxes are prompts, in the order of the predictions.

    Raises:
        DatasetError: the record has no annotations.
    """
    if "annotations" not in record:
        raise DatasetError(
            f"{record.get('file_name')}: the data set has no annotations, so there are no boxes to prompt with. "
            "Name a detector's results (COCO's result format) in INPUT.PROMPTS.DETECTIONS."
        )
    return [a for a in record["annotations"] if not a.get("iscrowd", 0)]


def read_detections(path: str | Path, dataset_name: str) -> Detections:
    """A detector's results in COCO's format by image id, with contiguous classes.

    Raises:
        DatasetError: the file is not a list of ``{image_id, category_id, bbox, score}``, has an unknown category, a box
            or a score that is none, or no result for any image of the data set.
    """
    try:
        rows = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise DatasetError(f"INPUT.PROMPTS.DETECTIONS {path}: cannot be read as json ({error}).") from error
    contiguous = MetadataCatalog.get(dataset_name).thing_dataset_id_to_contiguous_id
    found: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for i, row in enumerate(rows if isinstance(rows, list) else [None]):
        if problem := _row_problem(row, contiguous, dataset_name):
            raise DatasetError(f"{path}: row {i} {problem}")
        found[row["image_id"]].append({**row, "class": contiguous[row["category_id"]]})
    known = {record["image_id"] for record in DatasetCatalog.get(dataset_name)}
    if foreign := [image for image in found if image not in known]:
        text = f"{path}: {len(foreign)} of {len(found)} images with results, e.g. {foreign[0]!r}, are not in the data "
        text += f"set {dataset_name!r}"
        if len(foreign) == len(found):
            raise DatasetError(f"{text}: name the results for its images in INPUT.PROMPTS.DETECTIONS.")
        logger.warning("%s: they are left out.", text)
    return found


def _row_problem(row: Any, contiguous: Mapping[int, int], dataset_name: str) -> str:
    """What is wrong with one row of a result file; "" if nothing is."""
    if not isinstance(row, dict) or not {"image_id", "category_id", "bbox", "score"} <= row.keys():
        return "is no result. Expected a list of image_id, category_id, bbox, score."
    category, box, score = row["category_id"], row["bbox"], row["score"]
    if category not in contiguous:
        return f"is of category {category}, which data set {dataset_name!r} does not have: {sorted(contiguous)[:10]}."
    numbers = [*box, score] if isinstance(box, list) else [None]
    if len(numbers) != 5 or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        return f"has bbox {box} and score {score}. Expected x, y, width, height and a number, all finite."
    return f"has bbox {box} with a side below 0." if min(box[2:]) < 0 else ""


def prompt_detections(cfg: Any, dataset_name: str) -> Detections | None:
    """The boxes that ``INPUT.PROMPTS.DETECTIONS`` names for a test set; None: the ground truth's are taken.

    Raises:
        DatasetError: ``TEST.TILES`` is on; boxes are prompts on whole images.
    """
    if "TILES" in cfg.TEST and cfg.TEST.TILES.ENABLED:
        raise DatasetError("TEST.TILES.ENABLED cuts images, but boxes are prompts on whole ones. Set it False.")
    path = cfg.INPUT.PROMPTS.DETECTIONS
    return read_detections(path, dataset_name) if path else None


def check_prompts(cfg: Any) -> None:
    """Refuse before a run what its first evaluation with prompts would refuse: boxes that are missing, or tiles.

    Raises:
        DatasetError: as :func:`prompt_detections`, or a test set without annotations to take boxes from.
    """
    for name in cfg.DATASETS.TEST if cfg.INPUT.DATASET_MAPPER_NAME == "sam_prompts" else ():
        if prompt_detections(cfg, name) is None:
            for record in DatasetCatalog.get(name)[:1]:
                prompted_objects(record)
