"""Losses of Mask DINO: classes, masks and boxes of matched queries, and the same of denoising queries.

Source: Li et al., Mask DINO, CVPR 2023, section 3.4.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_d2.models.layers.boxes import generalized_iou, to_corners
from peft_d2.models.layers.criterion import SetCriterion
from peft_d2.models.layers.joined_batch import average_count
from peft_d2.models.layers.matcher import Match
from peft_d2.models.layers.targets import Target
from peft_d2.models.mask_dino.denoising import DenoisingQueries


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of -a_t (1 - p_t)^2 log p_t with a = 0.25 (Lin et al., RetinaNet, ICCV 2017, equation 5)."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    probability = logits.sigmoid()
    missed = probability + labels - 2 * probability * labels  # 1 - p_t
    weight = 0.75 - 0.5 * labels
    return (weight * missed**2 * cross_entropy).sum()


class BoxMaskCriterion(SetCriterion):
    """:class:`SetCriterion` with boxes, focal class loss, the encoder's own predictions, and denoising.

    Args:
        softmax_classes: cross-entropy with a no-object class in place of the focal loss.
        box_classes: only objects of these classes have box losses; None takes all.
        options: see :class:`SetCriterion`. Losses of the encoder's predictions end in ``_interm``, those of denoising
            queries in ``_dn`` or, of the layers before the last, ``_dn_0`` and so on.
    """

    def __init__(self, *, softmax_classes: bool, box_classes: Collection[int] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.softmax_classes = softmax_classes
        self.box_classes = box_classes

    def forward(
        self, outputs: dict, targets: Sequence[Target], objects: Sequence[Sequence[int]] | None = None
    ) -> dict[str, Tensor]:
        """Losses, not weighted.

        Args:
            outputs: as for :class:`SetCriterion`, each prediction with ``pred_boxes`` (N, Q, 4) too;
                ``interm_outputs``: the encoder's prediction; ``denoising``: what :meth:`denoising_losses` takes, None
                where there is nothing to restore.
            targets: one per image, with boxes.
            objects: see :class:`SetCriterion`.
        """
        return super().forward(outputs, targets, objects)

    def matched_losses(
        self, outputs: dict, targets: Sequence[Target], objects: Sequence[Sequence[int]]
    ) -> dict[str, Tensor]:
        """The losses of all predictions, denoising included."""
        losses = super().matched_losses(outputs, targets, objects)
        if outputs.get("denoising") is not None:
            queries, predictions = outputs["denoising"]
            losses.update(self.denoising_losses(queries, predictions, targets, average_count(objects)))
        else:  # every worker has the same losses, whatever its images hold
            zero = outputs["pred_logits"].sum() * 0.0
            losses.update({name: zero for name in self.weight_dict if "_dn" in name})
        return losses

    def supervised(self, outputs: dict) -> dict[str, dict[str, Tensor]]:
        """As for :class:`SetCriterion`, and the encoder's prediction."""
        wanted = super().supervised(outputs)
        if "interm_outputs" in outputs and "loss_ce_interm" in self.weight_dict:
            wanted["_interm"] = outputs["interm_outputs"]
        return wanted

    def denoising_losses(
        self,
        queries: DenoisingQueries,
        predictions: Sequence[dict[str, Tensor]],
        targets: Sequence[Target],
        count: float,
    ) -> dict[str, Tensor]:
        """Losses of restoring: every query knows its target, and all groups together count as one.

        Args:
            queries: who restores what.
            predictions: of these queries, by layer, the last layer last.
            targets: one per image.
            count: of objects in the average part of the batch; divides all but the cross-entropy of classes.
        """
        matches = queries.matches(targets)
        names = ["_dn", *(f"_dn_{i}" for i in range(len(predictions) - 1))]
        losses = {}
        for suffix, prediction in zip(names, [predictions[-1], *predictions[:-1]], strict=True):
            if f"loss_ce{suffix}" in self.weight_dict:
                masks = f"loss_mask{suffix}" in self.weight_dict
                values = self.restored_losses(prediction, targets, matches, count * queries.groups, masks)
                losses.update({name + suffix: value for name, value in values.items()})
        return losses

    def layer_losses(
        self,
        prediction: dict[str, Tensor],
        targets: Sequence[Target],
        matches: Sequence[Match],
        count: float,
        objects: Sequence[Sequence[int]] | None = None,
    ) -> dict[str, Tensor]:
        """The losses of one layer; ``count`` as in :meth:`denoising_losses`."""
        losses = super().layer_losses(prediction, targets, matches, count, objects)
        losses.update(self.box_losses(prediction["pred_boxes"].float(), targets, matches, count))
        if not self.softmax_classes:
            losses["loss_ce"] = losses["loss_ce"] / count
        return losses

    def class_loss(
        self,
        logits: Tensor,
        targets: Sequence[Target],
        matches: Sequence[Match],
        objects: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Summed focal loss, or the cross-entropy of :class:`SetCriterion`."""
        if self.softmax_classes:
            return super().class_loss(logits, targets, matches, objects)
        wanted = F.one_hot(self.wanted_labels(logits, targets, matches), self.num_classes + 1)[..., :-1]
        return focal_loss(logits, wanted.to(logits.dtype))

    def restored_losses(
        self,
        prediction: dict[str, Tensor],
        targets: Sequence[Target],
        matches: Sequence[Match],
        count: float,
        masks: bool,
    ) -> dict[str, Tensor]:
        """The losses of one layer's denoising queries; without ``masks`` those of classes and boxes alone.

        The cross-entropy of classes is divided by the weights at hand: a worker may have no such queries at all, so
        nothing can be exchanged here.
        """
        logits = prediction["pred_logits"].float()
        if self.softmax_classes:
            labels = self.wanted_labels(logits, targets, matches)
            losses = {"loss_ce": F.cross_entropy(logits.transpose(1, 2), labels, self.empty_weight)}
        else:
            losses = {"loss_ce": self.class_loss(logits, targets, matches) / count}
        if masks:
            losses.update(self.mask_losses(prediction["pred_masks"], targets, matches, count))
        losses.update(self.box_losses(prediction["pred_boxes"].float(), targets, matches, count))
        return losses

    def box_losses(
        self, boxes: Tensor, targets: Sequence[Target], matches: Sequence[Match], count: float
    ) -> dict[str, Tensor]:
        """L1 distance and 1 - generalised IoU of matched boxes, summed over them."""
        found = torch.cat([b[q.to(b.device)] for b, (q, _) in zip(boxes, matches, strict=True)])
        pairs = [(target, i.to(boxes.device)) for target, (_, i) in zip(targets, matches, strict=True)]
        wanted = torch.cat([target.centre_boxes()[i] for target, i in pairs])
        if self.box_classes is not None:
            labels = torch.cat([target.labels[i] for target, i in pairs])
            keep = torch.isin(labels, labels.new_tensor(sorted(self.box_classes)))
            found, wanted = found[keep], wanted[keep]
        overlap = generalized_iou(to_corners(found), to_corners(wanted))
        return {"loss_bbox": (found - wanted).abs().sum() / count, "loss_giou": (1 - overlap).sum() / count}
