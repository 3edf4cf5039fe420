"""Losses of mask classification (Cheng et al., Masked-attention Mask Transformer, CVPR 2022, sections 3.3 and 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_d2.models.layers.joined_batch import average_class_weight, average_count, objects_of_all
from peft_d2.models.layers.matcher import HungarianMatcher, Match
from peft_d2.models.layers.points import sample_points, uncertain_points
from peft_d2.models.layers.targets import Target


def dice_loss(logits: Tensor, labels: Tensor, count: float) -> Tensor:
    """Sum over masks of 1 - (2 |p t| + 1) / (|p| + |t| + 1), divided by ``count``; logits and labels (M, P)."""
    probability = logits.sigmoid()
    overlap = 2 * (probability * labels).sum(-1)
    loss = 1 - (overlap + 1) / (probability.sum(-1) + labels.sum(-1) + 1)
    return loss.sum() / count


def mask_loss(logits: Tensor, labels: Tensor, count: float) -> Tensor:
    """Sum over masks of the mean binary cross-entropy, divided by ``count``; logits and labels (M, P)."""
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1).sum() / count


class Matched(NamedTuple):
    """An image's target, and which of the queries is matched with which of its objects, both on the target's device."""

    target: Target
    queries: Tensor
    objects: Tensor


def pair_up(targets: Sequence[Target], matches: Sequence[Match]) -> list[Matched]:
    """Targets with their matches, which the matcher made on the CPU."""
    return [
        Matched(target, *(indices.to(target.labels.device) for indices in match))
        for target, match in zip(targets, matches, strict=True)
    ]


class SetCriterion(nn.Module):
    """Matches each decoder layer's predictions to the targets and computes its losses, in float32.

    Args:
        num_classes: K, without no-object.
        matcher: assigns queries to targets.
        weight_dict: loss name -> weight; a loss that is not named is neither computed nor returned.
        no_object_weight: weight of the no-object class in the cross-entropy.
        points: ``count``, ``oversample_ratio`` and ``importance_ratio``, see
            :func:`peft_d2.models.layers.points.uncertain_points`.
    """

    empty_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        weight_dict: dict[str, float],
        no_object_weight: float,
        points: tuple[int, float, float],
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.no_object_weight = no_object_weight
        weight = torch.ones(num_classes + 1)
        weight[-1] = no_object_weight
        self.register_buffer("empty_weight", weight)
        self.points = points

    def forward(
        self, outputs: dict, targets: Sequence[Target], objects: Sequence[Sequence[int]] | None = None
    ) -> dict[str, Tensor]:
        """Losses, not weighted.

        Args:
            outputs: ``pred_logits`` (N, Q, K + 1), ``pred_masks`` (N, Q, H, W), ``aux_outputs``: a list of such dicts.
            targets: one per image.
            objects: how many each image of the whole batch has, by the parts whose losses are averaged; where it is
                not known, ``targets`` and those of the other workers are the batch.

        Returns:
            ``loss_ce``, ``loss_mask``, ``loss_dice`` of the last layer, and with ``_0``, ``_1``... of the others.
        """
        with torch.autocast(outputs["pred_masks"].device.type, enabled=False):
            return self.matched_losses(outputs, targets, objects or objects_of_all(targets))

    def matched_losses(
        self, outputs: dict, targets: Sequence[Target], objects: Sequence[Sequence[int]]
    ) -> dict[str, Tensor]:
        """The losses of all predictions, divided by what the average part of the batch holds."""
        predictions = self.supervised(outputs)
        matches = self.matcher(list(predictions.values()), targets)
        losses = {}
        for (suffix, prediction), match in zip(predictions.items(), matches, strict=True):
            values = self.layer_losses(prediction, pair_up(targets, match), average_count(objects), objects)
            losses.update({name + suffix: value for name, value in values.items()})
        return losses

    def supervised(self, outputs: dict) -> dict[str, dict[str, Tensor]]:
        """The predictions whose losses are wanted, by the suffix of the losses' names."""
        auxiliary = {f"_{i}": layer for i, layer in enumerate(outputs.get("aux_outputs", ()))}
        wanted = {suffix: layer for suffix, layer in auxiliary.items() if f"loss_ce{suffix}" in self.weight_dict}
        return {"": outputs, **wanted}

    def layer_losses(
        self,
        prediction: dict[str, Tensor],
        matched: Sequence[Matched],
        count: float,
        objects: Sequence[Sequence[int]] | None,
        masks: bool = True,
    ) -> dict[str, Tensor]:
        """The losses of one layer, or of its classes without ``masks``: see :meth:`class_loss`, :meth:`mask_losses`."""
        losses = {"loss_ce": self.class_loss(prediction["pred_logits"].float(), matched, objects)}
        return {**losses, **(self.mask_losses(prediction["pred_masks"], matched, count) if masks else {})}

    def class_loss(self, logits: Tensor, matched: Sequence[Matched], objects: Sequence[Sequence[int]] | None) -> Tensor:
        """Cross-entropy over all queries, of which unmatched ones are no-object.

        It is divided by the summed class weights of the average part of the batch, or without ``objects`` by those at
        hand.
        """
        logits, labels = logits.transpose(1, 2), self.wanted_labels(logits, matched)
        if objects is None:
            return F.cross_entropy(logits, labels, self.empty_weight)
        total = F.cross_entropy(logits, labels, self.empty_weight, reduction="sum")
        return total / average_class_weight(objects, labels.shape[1], self.no_object_weight)

    def wanted_labels(self, logits: Tensor, matched: Sequence[Matched]) -> Tensor:
        """Each query's class (N, Q) int64; ``num_classes`` where it is matched with nothing."""
        labels = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        for row, (target, queries, objects) in zip(labels, matched, strict=True):
            row[queries] = target.labels[objects]
        return labels

    def mask_losses(self, masks: Tensor, matched: Sequence[Matched], count: float) -> dict[str, Tensor]:
        """Cross-entropy and dice of the matched masks at points chosen by uncertainty, divided by ``count``.

        Without any target both are 0 and still depend on ``masks``, so that every worker has the same graph.
        """
        logits = torch.cat([m.index_select(0, queries) for m, (_, queries, _) in zip(masks, matched, strict=True)])
        logits = logits.float()
        if not len(logits):
            return {"loss_mask": logits.sum(), "loss_dice": logits.sum()}
        points = uncertain_points(logits, *self.points)
        labels = [
            # Without a copy where every mask is matched: matches are sorted by target.
            sample_points((t.masks if len(objects) == len(t.masks) else t.masks[objects])[:, None], part).squeeze(1)
            for (t, _, objects), part in zip(matched, points.split([len(m.queries) for m in matched]), strict=True)
        ]
        pair = sample_points(logits[:, None], points).squeeze(1), torch.cat(labels)
        return {"loss_mask": mask_loss(*pair, count), "loss_dice": dice_loss(*pair, count)}

    def extra_repr(self) -> str:
        return f"classes={self.num_classes}, points={self.points[0]}, weights={self.weight_dict}"
