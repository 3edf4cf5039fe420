"""Assignment of predictions to targets.

Sources: Carion et al., DETR, ECCV 2020, section 3.1; mask costs: Cheng et al., Mask2Former, CVPR 2022, section 3.3;
focal class cost: Zhu et al., Deformable DETR, ICLR 2021; all together: Li et al., Mask DINO, CVPR 2023, section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from peft_d2.models.layers.boxes import generalized_iou, to_corners
from peft_d2.models.layers.points import sample_shared_points
from peft_d2.models.layers.targets import Target

Match = tuple[Tensor, Tensor]  # (query indices, target indices), both int64 on the CPU, sorted by target
_FORBIDDEN = 1e6  # replaces a cost that is not finite: far above any real one, small enough to be summed exactly


def mask_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy of every prediction with every target.

    With s = softplus: -[t log p + (1 - t) log(1 - p)] = s(x) - x t, so one product serves all pairs.

    Args:
        logits: (..., Q, P) at sampled points.
        labels: (T, P) in [0, 1] at the same points.

    Returns:
        (..., Q, T).
    """
    return (F.softplus(logits).sum(-1, keepdim=True) - logits @ labels.T) / labels.shape[1]


def dice_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - (2 |p t| + 1) / (|p| + |t| + 1) of every prediction with every target; shapes as in :func:`mask_cost`."""
    probability = logits.sigmoid()
    overlap = 2 * (probability @ labels.T)
    return 1 - (overlap + 1) / (probability.sum(-1, keepdim=True) + labels.sum(-1) + 1)


def assign(cost: Tensor) -> Match:
    """The cheapest one-to-one assignment of ``cost`` (Q, T) on the CPU; what is not finite is avoided if possible."""
    finite = torch.nan_to_num(cost, nan=_FORBIDDEN, posinf=_FORBIDDEN, neginf=_FORBIDDEN)
    queries, targets = (torch.as_tensor(i, dtype=torch.int64) for i in linear_sum_assignment(finite.numpy()))
    order = targets.argsort()
    return queries[order], targets[order]


class HungarianMatcher(nn.Module):
    """Matches by class probability, mask cross-entropy and dice, in float32 whatever the autocast type.

    All predictions of an image (one per decoder layer) are compared with its targets at one random set of points,
    and all costs of a batch leave the device in one copy.

    Args:
        cost_class, cost_mask, cost_dice: weights of the three costs.
        num_points: points per image.
    """

    def __init__(self, cost_class: float, cost_mask: float, cost_dice: float, num_points: int) -> None:
        super().__init__()
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice
        self.num_points = num_points

    @torch.no_grad()
    def forward(self, predictions: Sequence[dict[str, Tensor]], targets: Sequence[Target]) -> list[list[Match]]:
        """Match every prediction by itself.

        Args:
            predictions: one dict per decoder layer with ``pred_logits`` (N, Q, K + 1) and ``pred_masks`` (N, Q, H, W).
            targets: one per image.

        Returns:
            ``[layer][image]``: a :data:`Match` of min(Q, T) pairs.
        """
        with torch.autocast(predictions[0]["pred_masks"].device.type, enabled=False):
            costs = [self.costs(predictions, image, target) for image, target in enumerate(targets)]
        flat = torch.cat([cost.flatten() for cost in costs]).cpu().split([cost.numel() for cost in costs])
        by_image = [map(assign, values.view(cost.shape)) for cost, values in zip(costs, flat, strict=True)]
        return [list(layer) for layer in zip(*by_image, strict=True)]

    def costs(self, predictions: Sequence[dict[str, Tensor]], image: int, target: Target) -> Tensor:
        """(layers, Q, T) float32 costs of one image."""
        class_logits = torch.stack([p["pred_logits"][image] for p in predictions]).float()
        points = torch.rand(self.num_points, 2, device=class_logits.device)
        labels = sample_shared_points(target.masks, points)
        logits = torch.stack([sample_shared_points(p["pred_masks"][image].float(), points) for p in predictions])
        return (
            self.cost_mask * mask_cost(logits, labels)
            + self.cost_class * self.class_cost(class_logits)[..., target.labels]
            + self.cost_dice * dice_cost(logits, labels)
        )

    def class_cost(self, logits: Tensor) -> Tensor:
        """Cost of every query for every class: (..., classes) -> the same; 1 - probability but for the constant."""
        return -logits.softmax(-1)

    def extra_repr(self) -> str:
        return f"class={self.cost_class}, mask={self.cost_mask}, dice={self.cost_dice}, points={self.num_points}"


class BoxMaskMatcher(HungarianMatcher):
    """Matches by boxes besides, and by sigmoid probabilities as the focal loss sees them.

    Args:
        cost_box, cost_giou: weights of the L1 distance and of the generalised IoU of boxes.
        options: see :class:`HungarianMatcher`.
    """

    def __init__(self, *, cost_box: float, cost_giou: float, **options: Any) -> None:
        super().__init__(**options)
        self.cost_box = cost_box
        self.cost_giou = cost_giou

    def costs(self, predictions: Sequence[dict[str, Tensor]], image: int, target: Target) -> Tensor:
        """(layers, Q, T) float32 costs of one image; the predictions have ``pred_boxes`` (N, Q, 4) too."""
        boxes = torch.stack([p["pred_boxes"][image] for p in predictions]).float()[..., None, :]
        wanted = target.centre_boxes()
        return (
            super().costs(predictions, image, target)
            + self.cost_box * (boxes - wanted).abs().sum(-1)
            - self.cost_giou * generalized_iou(to_corners(boxes), to_corners(wanted))
        )

    def class_cost(self, logits: Tensor) -> Tensor:
        """Focal loss as a positive minus focal loss as a negative: alpha 0.25, gamma 2."""
        probability = logits.sigmoid()
        positive = -0.25 * (1 - probability) ** 2 * (probability + 1e-8).log()
        negative = -0.75 * probability**2 * (1 - probability + 1e-8).log()
        return positive - negative

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, box={self.cost_box}, giou={self.cost_giou}"
