"""Matching and losses of Mask DINO: classes, masks and boxes of matched queries, and the same of denoising queries.

Source: Li et al., Mask DINO, CVPR 2023, section 3.4.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from peft_d2.models.layers.boxes import generalized_iou, to_corners
from peft_d2.models.layers.criterion import HungarianMatcher, Matched, SetCriterion, Target, average_count, pair_up
from peft_d2.models.mask_dino.transformer_decoder import DenoisingQueries


class BoxMaskMatcher(HungarianMatcher):
    """Matches by boxes (L1 distance, generalised IoU) besides, and by sigmoid probabilities as the focal loss does.

    Predictions have ``pred_boxes`` (N, Q, 4) too. ``options``: see :class:`HungarianMatcher`.
    """

    def __init__(self, *, cost_box: float, cost_giou: float, **options: Any) -> None:
        super().__init__(**options)
        self.cost_box, self.cost_giou = cost_box, cost_giou

    def costs(self, predictions: Sequence[dict[str, Any]], image: int, target: Target) -> Tensor:
        boxes = torch.stack([p["pred_boxes"][image] for p in predictions]).float()[..., None, :]
        wanted = target.centre_boxes()
        return (
            super().costs(predictions, image, target)
            + self.cost_box * (boxes - wanted).abs().sum(-1)
            - self.cost_giou * generalized_iou(to_corners(boxes), to_corners(wanted))
        )

    def class_cost(self, logits: Tensor) -> Tensor:
        """Focal loss as a positive minus focal loss as a negative (Deformable DETR): alpha 0.25, gamma 2."""
        probability = logits.sigmoid()
        positive = -0.25 * (1 - probability) ** 2 * (probability + 1e-8).log()
        negative = -0.75 * probability**2 * (1 - probability + 1e-8).log()
        return positive - negative


class BoxMaskCriterion(SetCriterion):
    """:class:`SetCriterion` with boxes, focal class loss, the encoder's own predictions, and denoising.

    Predictions have ``pred_boxes`` (N, Q, 4) too, and targets boxes. ``interm_outputs`` is the encoder's prediction,
    whose losses end in ``_interm``; ``denoising`` the denoising queries and their predictions by layer, None where
    there is nothing to restore: ``_dn`` or, of the layers before the last, ``_dn_0`` and so on. ``softmax_classes`` has
    a cross-entropy with a no-object class in place of the focal loss; only ``box_classes``, or all, have box losses.
    """

    def __init__(self, *, softmax_classes: bool, box_classes: Collection[int] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.softmax_classes = softmax_classes
        self.box_classes = box_classes

    def matched_losses(
        self, outputs: dict, targets: Sequence[Target], objects: Sequence[Sequence[int]]
    ) -> dict[str, Tensor]:
        losses = super().matched_losses(outputs, targets, objects)
        if outputs.get("denoising") is not None:
            queries, predictions = outputs["denoising"]
            return losses | self.denoising_losses(queries, predictions, targets, average_count(objects))
        zero = outputs["pred_logits"].sum() * 0.0  # every worker has the same losses, whatever its images hold
        return losses | {name: zero for name in self.weight_dict if "_dn" in name}

    def supervised(self, outputs: dict) -> dict[str, dict[str, Any]]:
        wanted = super().supervised(outputs)
        if "interm_outputs" in outputs and "loss_ce_interm" in self.weight_dict:
            wanted["_interm"] = outputs["interm_outputs"]
        return wanted

    def denoising_losses(
        self, queries: DenoisingQueries, predictions: Sequence[dict], targets: Sequence[Target], count: float
    ) -> dict[str, Tensor]:
        """Losses of restoring: every query knows its target, and all groups together count as one.

        The cross-entropy of classes is divided by the weights at hand: a worker may have no such queries at all, so
        nothing can be exchanged here. ``count``, the objects of the average part of the batch, divides all others.
        """
        matched = pair_up(targets, queries.matches(targets))
        suffixes = ["_dn", *(f"_dn_{i}" for i in range(len(predictions) - 1))]
        losses = {}
        for suffix, prediction in zip(suffixes, [predictions[-1], *predictions[:-1]], strict=True):
            if f"loss_ce{suffix}" in self.weight_dict:
                masks = f"loss_mask{suffix}" in self.weight_dict
                values = self.layer_losses(prediction, matched, count * queries.groups, None, masks)
                losses.update({name + suffix: value for name, value in values.items()})
        return losses

    def layer_losses(
        self,
        prediction: dict[str, Any],
        matched: Sequence[Matched],
        count: float,
        objects: Sequence[Sequence[int]] | None,
        masks: bool = True,
    ) -> dict[str, Tensor]:
        """As for :class:`SetCriterion`, and those of boxes; ``count`` divides the focal loss, too."""
        losses = super().layer_losses(prediction, matched, count, objects, masks)
        losses.update(self.box_losses(prediction["pred_boxes"].float(), matched, count))
        if not self.softmax_classes:
            losses["loss_ce"] = losses["loss_ce"] / count
        return losses

    def class_loss(self, logits: Tensor, matched: Sequence[Matched], objects: Sequence[Sequence[int]] | None) -> Tensor:
        """Summed focal loss (Lin et al., RetinaNet, ICCV 2017, equation 5), or the cross-entropy of the base class."""
        if self.softmax_classes:
            return super().class_loss(logits, matched, objects)
        wanted = F.one_hot(self.wanted_labels(logits, matched), self.num_classes + 1)[..., :-1]
        return sigmoid_focal_loss(logits, wanted.to(logits.dtype), alpha=0.25, gamma=2, reduction="sum")

    def box_losses(self, boxes: Tensor, matched: Sequence[Matched], count: float) -> dict[str, Tensor]:
        """L1 distance and 1 - generalised IoU of matched boxes, summed over them, divided by ``count``."""
        predicted = torch.cat([b[queries] for b, (_, queries, _) in zip(boxes, matched, strict=True)])
        wanted = torch.cat([target.centre_boxes()[objects] for target, _, objects in matched])
        if self.box_classes is not None:
            labels = torch.cat([target.labels[objects] for target, _, objects in matched])
            keep = torch.isin(labels, labels.new_tensor(sorted(self.box_classes)))
            predicted, wanted = predicted[keep], wanted[keep]
        overlap = generalized_iou(to_corners(predicted), to_corners(wanted))
        return {"loss_bbox": (predicted - wanted).abs().sum() / count, "loss_giou": (1 - overlap).sum() / count}
