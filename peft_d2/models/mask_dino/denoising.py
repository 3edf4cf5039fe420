"""Denoising training: queries made of disturbed ground truth, to be restored without any matching.

Sources: Li et al., DN-DETR, CVPR 2022, section 4; Li et al., Mask DINO, CVPR 2023, section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_d2.models.layers.criterion import Match
from peft_d2.models.layers.geometry import inverse_sigmoid
from peft_d2.models.layers.inputs import Target


@dataclass
class DenoisingQueries:
    """The queries of a batch: ``groups`` times all targets of an image, each group padded to ``group_size`` by zeros.

    ``content`` (N, D, C), D = groups * group_size, one group after the other; ``box_logits`` (N, D, 4).
    """

    content: Tensor
    box_logits: Tensor
    groups: int
    group_size: int

    def __len__(self) -> int:
        return self.groups * self.group_size

    def matches(self, targets: Sequence[Target]) -> list[Match]:
        """Which query restores which target, by image."""
        starts = torch.arange(self.groups)[:, None] * self.group_size
        objects = [torch.arange(len(target.labels)) for target in targets]
        return [((starts + indices).flatten(), indices.repeat(self.groups)) for indices in objects]

    def blocked(self, matching: int) -> Tensor:
        """(D + matching, D + matching), True where a query must not see another.

        A group sees itself and the ``matching`` queries that follow all groups; those see each other alone.
        """
        device = self.content.device
        group = torch.arange(len(self) + matching, device=device) // max(self.group_size, 1)
        group[len(self) :] = self.groups
        return (group[:, None] != group[None]) & (group[None] != self.groups)


def denoising_queries(
    targets: Sequence[Target], label_embedding: nn.Embedding, count: int, noise_scale: float
) -> DenoisingQueries | None:
    """Disturb the targets, with boxes: a label is replaced with probability noise_scale / 2, a box moves and grows.

    A box's centre moves by up to noise_scale / 2 of its size, its sides change by up to noise_scale of themselves. With
    T targets in the largest image there are ``count // T`` groups; None if there are no targets, or T > ``count``.
    """
    group_size = max((len(target.labels) for target in targets), default=0)
    groups = count // group_size if group_size else 0
    if groups == 0:
        return None
    device = label_embedding.weight.device
    content = torch.zeros(len(targets), groups, group_size, label_embedding.embedding_dim, device=device)
    box_logits = torch.zeros(len(targets), groups, group_size, 4, device=device)
    for image, target in enumerate(targets):
        labels = target.labels.expand(groups, -1)
        replaced = torch.rand(labels.shape, device=device) < noise_scale / 2
        labels = torch.where(replaced, torch.randint_like(labels, label_embedding.num_embeddings), labels)
        boxes = target.centre_boxes().expand(groups, -1, -1)
        reach = torch.cat([boxes[..., 2:] / 2, boxes[..., 2:]], dim=-1) * noise_scale
        boxes = (boxes + (2 * torch.rand_like(boxes) - 1) * reach).clamp(0, 1)
        content[image, :, : len(target.labels)] = label_embedding(labels).to(content.dtype)
        box_logits[image, :, : len(target.labels)] = inverse_sigmoid(boxes)
    return DenoisingQueries(content.flatten(1, 2), box_logits.flatten(1, 2), groups, group_size)
