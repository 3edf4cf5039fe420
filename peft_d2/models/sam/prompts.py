"""The prompts of one image, checked, in pixels of the image as the model gets it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_d2.data.images import DatasetError
from peft_d2.models.sam.prompt_encoder import BACKGROUND, FOREGROUND, NOT_A_POINT

_KEYS = ("boxes", "point_coords", "point_labels", "mask_inputs")


class PromptError(DatasetError):
    """An image or a prompt that the model cannot take; the message names the image."""


@dataclass(frozen=True)
class Prompts:
    """N prompts, each a combination of what is given; all None is one prompt that says nothing.

    Attributes:
        boxes: (N, 4), x0 y0 x1 y1.
        points: coordinates (N, P, 2), x before y, and labels (N, P).
        masks: logits (N, 1, 4 G, 4 G) of an earlier prediction.
    """

    boxes: Tensor | None = None
    points: tuple[Tensor, Tensor] | None = None
    masks: Tensor | None = None

    def __len__(self) -> int:
        given = [x for x in (self.boxes, self.points[0] if self.points else None, self.masks) if x is not None]
        return len(given[0]) if given else 1

    def split(self, size: int) -> Iterator[Prompts]:
        """Parts of at most ``size`` prompts, in order; of no prompts, no parts."""
        if self.boxes is None and self.points is None and self.masks is None:
            yield self
            return
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Prompts(
                None if self.boxes is None else self.boxes[part],
                None if self.points is None else (self.points[0][part], self.points[1][part]),
                None if self.masks is None else self.masks[part],
            )


def read_prompts(item: Mapping[str, Any], size: tuple[int, int], mask_side: int, device: torch.device) -> Prompts:
    """The prompts of an input dict: any of ``boxes``, ``point_coords`` with ``point_labels``, ``mask_inputs``.

    Boxes that reach over the image's border are clipped to it; boxes without area are taken as they are.

    Args:
        item: the input dict.
        size: (H, W) of its image, without padding.
        mask_side: side of ``mask_inputs``.
        device: where the prompts go.

    Raises:
        PromptError: a wrong shape, different numbers of prompts, not finite, a box the wrong way round, or a prompt
            outside of the image; naming the image and the prompt.
    """
    name = str(item.get("file_name", "an image"))
    given = {key: torch.as_tensor(item[key]).to(device) for key in _KEYS if item.get(key) is not None}
    for key, value in given.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise PromptError(f"{name}: {key} holds values that are not finite")
    if ("point_coords" in given) != ("point_labels" in given):
        raise PromptError(f"{name}: point_coords and point_labels go together, but only {list(given)} are given")
    counts = {key: len(value) for key, value in given.items()}
    if len(set(counts.values())) > 1:
        raise PromptError(f"{name}: each kind of prompt must be there equally often, not {counts}")
    boxes, points, masks = given.get("boxes"), None, given.get("mask_inputs")
    if boxes is not None:
        boxes = _checked_boxes(boxes.float(), size, name)
    if "point_coords" in given:
        points = _checked_points(given["point_coords"].float(), given["point_labels"], size, name)
    if masks is not None and tuple(masks.shape[1:]) != (1, mask_side, mask_side):
        raise PromptError(f"{name}: mask_inputs are {tuple(masks.shape)}, expected (N, 1, {mask_side}, {mask_side})")
    return Prompts(boxes, points, None if masks is None else masks.float())


def _checked_boxes(boxes: Tensor, size: tuple[int, int], name: str) -> Tensor:
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise PromptError(f"{name}: boxes are {tuple(boxes.shape)}, expected (N, 4): x0, y0, x1, y1")
    height, width = size
    x0, y0, x1, y1 = boxes.unbind(1)
    _refuse(boxes, (x1 < x0) | (y1 < y0), name, "box", "is the wrong way round; expected x0, y0, x1, y1 in this order")
    outside = (x1 < 0) | (y1 < 0) | (x0 > width) | (y0 > height)
    _refuse(boxes, outside, name, "box", f"lies outside of the image of {width} x {height} px")
    return torch.stack([x0.clamp(min=0), y0.clamp(min=0), x1.clamp(max=width), y1.clamp(max=height)], dim=1)


def _checked_points(points: Tensor, labels: Tensor, size: tuple[int, int], name: str) -> tuple[Tensor, Tensor]:
    if points.dim() != 3 or points.shape[2] != 2 or labels.shape != points.shape[:2]:
        raise PromptError(
            f"{name}: point_coords are {tuple(points.shape)} and point_labels {tuple(labels.shape)}, "
            "expected (N, P, 2) and (N, P)"
        )
    known = sum(labels == label for label in (NOT_A_POINT, BACKGROUND, FOREGROUND))
    if not torch.as_tensor(known).bool().all():
        raise PromptError(f"{name}: point_labels must be 1 (object), 0 (not the object) or -1 (padding)")
    limit = points.new_tensor([size[1], size[0]])
    outside = ((points < 0) | (points > limit)).any(2) & (labels != NOT_A_POINT)
    _refuse(
        points.flatten(0, 1), outside.flatten(), name, "point", f"lies outside of the image of {size[1]} x {size[0]} px"
    )
    return points, labels


def _refuse(prompts: Tensor, bad: Tensor, name: str, kind: str, what: str) -> None:
    if bad.any():
        i = int(bad.nonzero()[0])
        values = [round(v, 2) for v in prompts[i].tolist()]
        more = f" ({int(bad.sum())} such)" if bad.sum() > 1 else ""
        raise PromptError(f"{name}: {kind} {i} {values} {what}{more}")
