"""Ground truth of one image as the criterion takes it, from what Detectron2's mappers deliver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, ImageList, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from torch import Tensor

from peft_d2.models.layers.boxes import to_centres
from peft_d2.models.layers.postprocess import mask_boxes


@dataclass
class Target:
    """Labels (T,) int64 and masks (T, H, W) float32 of 0 and 1, H and W those of the padded batch.

    ``boxes`` (T, 4), where a model asks for them: (centre x, centre y, width, height), relative to the image.
    """

    labels: Tensor
    masks: Tensor
    boxes: Tensor | None = None

    def centre_boxes(self) -> Tensor:
        """``boxes``, which have to be there."""
        if self.boxes is None:
            raise ValueError("this target has no boxes; call add_boxes on what prepare_targets returns")
        return self.boxes


def _bitmaps(masks: Any, height: int, width: int) -> Tensor:
    """(T, H, W) of whatever holds an image's masks."""
    if isinstance(masks, PolygonMasks):  # an instance that a crop left without polygons is an empty mask
        empty = np.zeros((height, width), bool)
        bitmaps = [polygons_to_bitmask(p, height, width) if len(p) else empty for p in masks.polygons]
        return torch.from_numpy(np.stack(bitmaps) if bitmaps else empty[:0].reshape(0, height, width))
    bitmaps = masks.tensor if isinstance(masks, BitMasks) else masks
    if not isinstance(bitmaps, Tensor):
        raise TypeError(f"gt_masks is {type(masks).__name__}; expected BitMasks, PolygonMasks or a tensor (T, H, W)")
    return bitmaps


def _from_sem_seg(sem_seg: Tensor, ignore_value: int) -> tuple[Tensor, Tensor]:
    """One mask per class in the map (H, W), as MaskFormer treats semantic segmentation."""
    classes = sem_seg.unique()
    classes = classes[classes != ignore_value]
    return classes.long(), sem_seg[None] == classes[:, None, None]


def prepare_targets(inputs: list[dict[str, Any]], images: ImageList, ignore_value: int) -> list[Target]:
    """Targets of a batch, zero-padded to the batch's size.

    Args:
        inputs: mapped dicts with ``instances`` (``gt_classes``, and ``gt_masks`` unless there are none) or, without it,
            ``sem_seg`` (H, W) of class ids.
        images: the padded batch.
        ignore_value: id in ``sem_seg`` that belongs to no class.

    Raises:
        KeyError: for an image with neither.
        TypeError: for masks of an unknown kind.
    """
    device, (height, width) = images.tensor.device, images.tensor.shape[-2:]
    targets = []
    for item, size in zip(inputs, images.image_sizes, strict=True):
        if "instances" in item:
            instances = item["instances"]
            labels = instances.gt_classes
            masks = _bitmaps(instances.gt_masks, *size) if len(labels) else torch.zeros(0, *size)
        elif "sem_seg" in item:
            labels, masks = _from_sem_seg(item["sem_seg"], ignore_value)
        else:
            raise KeyError(
                f"training input {item.get('file_name', '')!r} has neither 'instances' nor 'sem_seg'; "
                "the dataset mapper has to keep its annotations"
            )
        padded = torch.zeros(len(labels), height, width, device=device)
        padded[:, : masks.shape[-2], : masks.shape[-1]] = masks.to(device)
        targets.append(Target(labels.to(device), padded))
    return targets


def add_boxes(targets: list[Target], inputs: list[dict[str, Any]], images: ImageList, of_padded: bool) -> None:
    """Set the targets' boxes, in place: ``gt_boxes`` where the inputs have them, else those around the masks.

    Args:
        targets, inputs, images: results and arguments of :func:`prepare_targets`.
        of_padded: boxes are relative to the padded batch, as masks are; else to each image's own size, as published.
            Both agree where nothing is padded.
    """
    for target, item, size in zip(targets, inputs, images.image_sizes, strict=True):
        instances = item.get("instances")
        if instances is not None and instances.has("gt_boxes"):
            corners, size = instances.gt_boxes.tensor.to(target.labels.device), instances.image_size
        else:
            corners = mask_boxes(target.masks > 0)
        height, width = images.tensor.shape[-2:] if of_padded else size
        target.boxes = to_centres(corners.float()) / corners.new_tensor([width, height, width, height])
