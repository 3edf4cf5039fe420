"""Images with boxes as prompts, as models take them that are told where to look (Segment Anything).

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
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from torch import Tensor

from peft_d2.data.augmentation import longest_side_recipe
from peft_d2.data.images import DatasetError
from peft_d2.data.mappers import InstanceMapper

logger = logging.getLogger(__name__)
Detections = Mapping[Any, Sequence[Mapping[str, Any]]]  # by image id: bbox (XYWH), class, score


class PromptMapper(InstanceMapper):
    """Training: ``instances`` with masks, and ``boxes`` (N, 4), one for each, each side moved outwards.

    Args:
        augmentations, image_format: as for all mappers.
        noise: most px of the resized image by which a side is moved.
        limit: most objects of one image; of more, as many are drawn.
    """

    def __init__(self, augmentations: Sequence[Any], image_format: str, noise: float, limit: int) -> None:
        super().__init__(augmentations, image_format)
        self.noise = noise
        self.limit = limit

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        sample = super().__call__(record)
        instances = sample["instances"]
        if len(instances) > self.limit:
            chosen = np.sort(np.random.permutation(len(instances))[: self.limit])
            instances = sample["instances"] = instances[torch.from_numpy(chosen)]
        sample["boxes"] = widened(instances.gt_boxes.tensor, self.noise, instances.image_size)
        return sample


def widened(boxes: Tensor, noise: float, size: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) with each side moved outwards by 0 to ``noise`` px, within an image of ``size`` (H, W)."""
    moved = torch.from_numpy(np.random.uniform(0, noise, tuple(boxes.shape)).astype(np.float32))
    boxes = boxes + moved * boxes.new_tensor([-1, -1, 1, 1])
    limit = boxes.new_tensor([size[1], size[0], size[1], size[0]])
    return torch.minimum(boxes.clamp(min=0), limit)


class PromptTestMapper:
    """Inference: ``boxes`` (N, 4) in px of the resized image, ``box_classes`` (N,), and of a detector ``box_scores``.

    Args:
        augmentations, image_format: as for all mappers.
        detections: boxes of a detector by image id; None takes the ground truth's, in order, crowds left out.
    """

    def __init__(self, augmentations: Sequence[Any], image_format: str, detections: Detections | None = None) -> None:
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format = image_format
        self.detections = detections

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        record = dict(record)
        image = detection_utils.read_image(record["file_name"], format=self.image_format)
        detection_utils.check_image_size(record, image)
        if self.detections is None:
            found = [{**a, "class": a["category_id"]} for a in prompted_objects(record)]
        else:
            found = [{**d, "bbox_mode": BoxMode.XYWH_ABS} for d in self.detections.get(record["image_id"], ())]
            record["box_scores"] = torch.tensor([float(d["score"]) for d in found])
        picture = T.AugInput(image)
        transforms = self.augmentations(picture)
        corners = [BoxMode.convert(f["bbox"], f["bbox_mode"], BoxMode.XYXY_ABS) for f in found]
        moved = transforms.apply_box(np.array(corners, dtype=np.float64).reshape(-1, 4))
        record["image"] = torch.from_numpy(np.ascontiguousarray(picture.image.transpose(2, 0, 1)))
        record["boxes"] = torch.as_tensor(moved, dtype=torch.float32)
        record["box_classes"] = torch.tensor([int(f["class"]) for f in found], dtype=torch.int64)
        return record


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
        problem = _row_problem(row, contiguous, dataset_name)
        if problem:
            raise DatasetError(f"{path}: row {i} {problem}")
        found[row["image_id"]].append({**row, "class": contiguous[row["category_id"]]})
    known = {record["image_id"] for record in DatasetCatalog.get(dataset_name)}
    foreign = [image for image in found if image not in known]
    if foreign:
        text = (
            f"{path}: {len(foreign)} of {len(found)} images with results, e.g. {foreign[0]!r}, are not in the data set"
        )
        if len(foreign) == len(found):
            raise DatasetError(f"{text} {dataset_name!r}: name the results for its images in INPUT.PROMPTS.DETECTIONS.")
        logger.warning("%s %r: they are left out.", text, dataset_name)
    return found


def _row_problem(row: Any, contiguous: Mapping[int, int], dataset_name: str) -> str:
    """What is wrong with one result, "" if nothing."""
    if not isinstance(row, dict) or not {"image_id", "category_id", "bbox", "score"} <= row.keys():
        return "is no result. Expected a list of image_id, category_id, bbox, score."
    if row["category_id"] not in contiguous:
        return (
            f"is of category {row['category_id']}, which data set {dataset_name!r} does not have: it has "
            f"{sorted(contiguous)[:10]}."
        )
    box, score = row["bbox"], row["score"]
    numbers = [*box, score] if isinstance(box, list) else [None]
    if len(numbers) != 5 or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        return f"has bbox {box} and score {score}. Expected x, y, width, height and a number, all finite."
    return f"has bbox {box} with a side below 0." if min(box[2:]) < 0 else ""


def build_prompt_mapper(cfg: Any) -> PromptMapper:
    """For training, from ``INPUT.PROMPTS`` and the model's ``MODEL.SAM.IMAGE_SIZE``."""
    node = cfg.INPUT.PROMPTS
    return PromptMapper(longest_side_recipe(cfg, train=True), cfg.INPUT.FORMAT, node.BOX_NOISE, node.MAX_BOXES)


def build_prompt_test_mapper(cfg: Any, dataset_name: str) -> PromptTestMapper:
    """For inference on a data set.

    Raises:
        DatasetError: ``TEST.TILES`` is on; boxes are prompts on whole images.
    """
    if "TILES" in cfg.TEST and cfg.TEST.TILES.ENABLED:
        raise DatasetError("TEST.TILES.ENABLED cuts images, but boxes are prompts on whole ones. Set it False.")
    path = cfg.INPUT.PROMPTS.DETECTIONS
    detections = read_detections(path, dataset_name) if path else None
    return PromptTestMapper(longest_side_recipe(cfg, train=False), cfg.INPUT.FORMAT, detections)


def check_prompts(cfg: Any) -> None:
    """Refuse what the first evaluation of a prompted model would: boxes that cannot be read, or tiles.

    Raises:
        DatasetError: as :func:`build_prompt_test_mapper`.
    """
    if cfg.INPUT.DATASET_MAPPER_NAME == "sam_prompts":
        for name in cfg.DATASETS.TEST:
            build_prompt_test_mapper(cfg, name)
