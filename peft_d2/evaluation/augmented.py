"""Test-time augmentation: an image in several sizes and mirrored, and one prediction from all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, Instances
from pycocotools import mask as coco_mask
from torch import nn

from peft_d2.data.augmentation import keep_a_pixel
from peft_d2.data.images import output_size
from peft_d2.evaluation.build import outputs_node
from peft_d2.evaluation.coco import encode_masks


def check_augmentation(cfg: Any) -> None:
    """Refuse test-time augmentation together with what it does not do.

    Raises:
        ValueError: ``TEST.AUG`` together with tiles, prompts or panoptic results.
    """
    node = outputs_node(cfg)
    for key, on in (
        ("TEST.TILES.ENABLED", cfg.TEST.TILES.ENABLED),
        ("INPUT.DATASET_MAPPER_NAME sam_prompts", cfg.INPUT.DATASET_MAPPER_NAME == "sam_prompts"),
        ("the model's TEST.PANOPTIC_ON", node is not None and node.PANOPTIC_ON),
    ):
        if on and cfg.TEST.AUG.ENABLED:
            raise ValueError(f"TEST.AUG cannot be combined with {key}: switch one of them off.")


def augmented_model(cfg: Any, model: nn.Module) -> nn.Module:
    """The model under ``TEST.AUG``: Detectron2's own wrapper for Faster and Mask R-CNN, ours for all others.

    It takes images in their own size.
    """
    if isinstance(model, GeneralizedRCNN):
        return GeneralizedRCNNWithTTA(cfg, model)
    aug = cfg.TEST.AUG
    return AugmentedModel(model, aug.MIN_SIZES, aug.MAX_SIZE, flip=aug.FLIP, limit=cfg.TEST.DETECTIONS_PER_IMAGE)


class AugmentedModel(nn.Module):
    """A Detectron2 model for inference on several views of each image.

    Predictions of one class from different views are one object when they agree (by IoU of their masks, of their boxes
    where there are no masks). Its score is the mean over all views, 0 where one does not see it; a pixel is the
    object's when views with half of the members' scores say so; its box is the mean, weighted by score. Semantic maps
    are averaged.

    Args:
        model: takes ``{"image": (3, H, W), "height", "width"}``; returns ``instances``, ``sem_seg`` or both.
        sizes: lengths of the shorter side, px.
        longest: limit of the longer side, px.
        flip: each size mirrored as well.
        limit: how many predictions of an image are kept, by score.
        threshold: IoU from which two predictions are one object.
    """

    def __init__(
        self, model: nn.Module, sizes: Sequence[int], longest: int, *,
        flip: bool = True, limit: int = 100, threshold: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.limit, self.threshold = model, limit, threshold
        self.flips = (False, True) if flip else (False,)
        self.resizes = [T.AugmentationList(keep_a_pixel([T.ResizeShortestEdge(s, longest)])) for s in sizes]

    @torch.no_grad()
    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Detectron2's inference: images in their own size in, results of each out (masks on the CPU)."""
        return [self._one(record) for record in batched_inputs]

    def _one(self, record: dict[str, Any]) -> dict[str, Any]:
        """The result of one image from all its views."""
        height, width = record["image"].shape[1:]
        size = output_size(record, (height, width))
        found: list[_Found] = []
        semantic: torch.Tensor | None = None
        views = 0
        for batch in self._views({**record, "height": size[0], "width": size[1]}):
            for flip, output in zip(self.flips, self.model(batch), strict=True):
                if "sem_seg" in output:
                    maps = output["sem_seg"].flip(-1) if flip else output["sem_seg"]
                    semantic = maps.clone() if semantic is None else semantic.add_(maps)
                if "instances" in output:
                    found += _predictions(output["instances"], views, flip)
                views += 1
        result: dict[str, Any] = {}
        if semantic is not None:
            result["sem_seg"] = semantic / views
        if "instances" in output:
            groups = group(found, self.threshold)
            groups.sort(key=lambda members: -sum(m.score for m in members))
            result["instances"] = _instances(groups[: self.limit], views, size, output["instances"].has("pred_masks"))
        return result

    def _views(self, record: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
        """Batches of one size: the image as it is and mirrored."""
        image = record["image"].permute(1, 2, 0).cpu().numpy()
        for resize in self.resizes:
            picture = T.AugInput(image)
            resize(picture)
            pixels = torch.from_numpy(np.ascontiguousarray(picture.image.transpose(2, 0, 1)))
            yield [{**record, "image": pixels.flip(-1) if flip else pixels} for flip in self.flips]


class _Found(NamedTuple):
    """A prediction of one view in the image's own coordinates; ``shape`` is its run lengths, or its box x, y, w, h."""

    view: int
    label: int
    score: float
    box: np.ndarray
    shape: Any


def _predictions(instances: Instances, view: int, flip: bool) -> list[_Found]:
    """A view's predictions, flipped back if it was mirrored; those without a single pixel are left out."""
    boxes = instances.pred_boxes.tensor.detach().cpu().double().numpy()
    if flip:
        width = instances.image_size[1]
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    shapes: Any = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    seen = [True] * len(instances)
    if instances.has("pred_masks"):
        shapes = encode_masks(instances.pred_masks.flip(-1) if flip else instances.pred_masks)
        seen = [bool(area) for area in coco_mask.area(shapes)] if shapes else []
    rows = zip(instances.pred_classes.tolist(), instances.scores.tolist(), boxes, shapes, strict=True)
    return [_Found(view, *row) for row, kept in zip(rows, seen, strict=True) if kept]


def group(found: Sequence[_Found], threshold: float) -> list[list[_Found]]:
    """Group predictions that are one object: at most one of each view, the one with the best score first.

    In the order of their scores, each joins the group of its class whose first member it overlaps most, if the IoU is
    ``threshold`` or more; otherwise it begins a group.
    """
    by_class: dict[int, list[_Found]] = defaultdict(list)
    for prediction in sorted(found, key=lambda p: -p.score):
        by_class[prediction.label].append(prediction)
    groups: list[list[_Found]] = []
    for same in by_class.values():
        shapes: Any = [p.shape for p in same]
        shapes = shapes if isinstance(shapes[0], Mapping) else np.asarray(shapes)
        agreement = np.asarray(coco_mask.iou(shapes, shapes, [0] * len(same)))
        leaders: dict[int, list[_Found]] = {}
        for index, prediction in enumerate(same):
            open_to_it = [i for i, members in leaders.items() if prediction.view not in {m.view for m in members}]
            best = max(open_to_it, key=lambda i: agreement[index, i], default=-1)
            if best >= 0 and agreement[index, best] >= threshold:
                leaders[best].append(prediction)
            else:
                leaders[index] = [prediction]
        groups += leaders.values()
    return groups


def _instances(groups: Sequence[Sequence[_Found]], views: int, size: tuple[int, ...], masks: bool) -> Instances:
    """One instance of each group, on an image of ``size`` (H, W)."""
    result = Instances((size[0], size[1]))
    scores = [np.array([m.score for m in members]) for members in groups]
    shares = [s / s.sum() if s.sum() > 0 else np.full(len(s), 1 / len(s)) for s in scores]
    boxes = [share @ np.stack([m.box for m in members]) for share, members in zip(shares, groups, strict=True)]
    result.pred_boxes = Boxes(torch.tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4))
    result.scores = torch.tensor([s.sum() / views for s in scores], dtype=torch.float32)
    result.pred_classes = torch.tensor([members[0].label for members in groups], dtype=torch.int64)
    if masks:
        drawn = np.zeros((len(groups), *size), dtype=bool)
        for mask, members, share in zip(drawn, groups, shares, strict=True):
            mask[:] = sum(s * coco_mask.decode(m.shape) for s, m in zip(share, members, strict=True)) >= 0.5 - 1e-9
        result.pred_masks = torch.from_numpy(drawn)
    return result
