"""What a model is given: images of as many channels as ``MODEL.PIXEL_MEAN`` has, and ground truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, ImageList, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from torch import Tensor, nn

from peft_d2.data.images import DatasetError
from peft_d2.models.checks import ModelConfigError, expect
from peft_d2.models.layers.geometry import to_centres
from peft_d2.models.layers.postprocess import mask_boxes


class PixelModel(nn.Module):
    """A model that normalises its images by ``MODEL.PIXEL_MEAN`` and ``PIXEL_STD``."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
        one_each = f"a list as long as PIXEL_STD {std}, one for each channel"
        expect(len(mean) == len(std), "MODEL.PIXEL_MEAN", mean, one_each)
        expect(all(value > 0 for value in std), "MODEL.PIXEL_STD", std, "above 0 in each channel")
        self.register_buffer("pixel_mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def normalised(self, image: Tensor, name: Any = "an image") -> Tensor:
        """``image`` (C, H, W), called ``name`` in messages; other channels would be broadcast, and are refused."""
        if image.dim() != 3 or len(image) != len(self.pixel_mean):
            raise DatasetError(
                f"{name}: the image is {tuple(image.shape)}, but the model takes {len(self.pixel_mean)} channels "
                "(C, H, W): as many as MODEL.PIXEL_MEAN and PIXEL_STD have. Set these and INPUT.FORMAT to fit"
            )
        return (image.to(self.device) - self.pixel_mean) / self.pixel_std


@dataclass
class Target:
    """Ground truth of an image: labels (T,) int64, masks (T, H, W) of 0 and 1, H and W those of the padded batch.

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


def bitmaps(masks: Any, height: int, width: int) -> Tensor:
    """(T, H, W) of whatever holds an image's masks; an instance that a crop left without polygons is an empty mask."""
    if isinstance(masks, PolygonMasks):
        found = np.zeros((len(masks), height, width), bool)
        for bitmap, polygons in zip(found, masks.polygons, strict=True):
            bitmap[:] = polygons_to_bitmask(polygons, height, width) if len(polygons) else False
        return torch.from_numpy(found)
    tensor = masks.tensor if isinstance(masks, BitMasks) else masks
    if not isinstance(tensor, Tensor):
        raise TypeError(f"gt_masks is {type(masks).__name__}; expected BitMasks, PolygonMasks or a tensor (T, H, W)")
    return tensor


def prepare_targets(inputs: list[dict[str, Any]], images: ImageList, ignore_value: int) -> list[Target]:
    """Targets of a batch, with float32 masks zero-padded to the size of ``images``.

    Inputs are mapped dicts with ``instances`` (``gt_classes``, and ``gt_masks`` unless there are none) or, without it,
    ``sem_seg`` (H, W) of class ids: one mask per class other than ``ignore_value``, as in MaskFormer.
    """
    device, (height, width) = images.tensor.device, images.tensor.shape[-2:]
    targets = []
    for item, size in zip(inputs, images.image_sizes, strict=True):
        if "instances" in item:
            labels = item["instances"].gt_classes
            if len(labels) and not item["instances"].has("gt_masks"):
                raise ModelConfigError(
                    f"training input {item.get('file_name', '')!r} has objects without masks (gt_masks), which this "
                    "model is trained on. Detectron2's own mapper gives them with MODEL.MASK_ON True"
                )
            masks = bitmaps(item["instances"].gt_masks, *size) if len(labels) else torch.zeros(0, *size)
        elif "sem_seg" in item:
            classes = item["sem_seg"].unique()
            labels = classes[classes != ignore_value]
            masks = item["sem_seg"][None] == labels[:, None, None]
        else:
            raise KeyError(
                f"training input {item.get('file_name', '')!r} has neither 'instances' nor 'sem_seg'; "
                "the dataset mapper has to keep its annotations"
            )
        padded = torch.zeros(len(labels), height, width, device=device)
        padded[:, : masks.shape[-2], : masks.shape[-1]] = masks.to(device)
        targets.append(Target(labels.to(device).long(), padded))
    return targets


def add_boxes(targets: list[Target], inputs: list[dict[str, Any]], images: ImageList, of_padded: bool) -> None:
    """Set the targets' boxes, in place: ``gt_boxes`` where the inputs have them, else those around the masks.

    They are relative to the padded batch, as masks are; without ``of_padded`` to each image's own size, as published.
    """
    for target, item, size in zip(targets, inputs, images.image_sizes, strict=True):
        instances = item.get("instances")
        if instances is not None and instances.has("gt_boxes"):
            corners, size = instances.gt_boxes.tensor.to(target.labels.device), instances.image_size
        else:
            corners = mask_boxes(target.masks > 0)
        height, width = images.tensor.shape[-2:] if of_padded else size
        target.boxes = to_centres(corners.float()) / corners.new_tensor([width, height, width, height])


def count_objects(item: Mapping[str, Any], ignore_value: int = 255) -> int:
    """How many targets a mapped dict becomes: instances, or classes in ``sem_seg`` other than ``ignore_value``."""
    if "instances" in item:
        return len(item["instances"])
    if "sem_seg" in item:
        return int((item["sem_seg"].unique() != ignore_value).sum())
    return 0
