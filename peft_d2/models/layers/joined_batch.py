"""What losses are divided by: figures of the whole batch, also where workers or pieces hold a part of it each.

A worker's share divided by its own counts would weigh every part alike, however many objects it holds. Divided by the
counts' averages, the mean over workers (DistributedDataParallel) and over pieces (gradient accumulation) is the loss
of the joined batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peft_d2.models.layers.targets import Target

_PIECES: ContextVar[list[list[int]] | None] = ContextVar("pieces", default=None)


@contextmanager
def joined_batch(pieces: Sequence[Sequence[Mapping[str, Any]]], ignore_value: int = 255) -> Iterator[None]:
    """Inside, losses of each piece are divided by what belongs to the average piece.

    Args:
        pieces: the batch of this worker in parts, each a list of Detectron2's mapped dicts.
        ignore_value: id in a dict's ``sem_seg`` that belongs to no class.
    """
    token = _PIECES.set([[_objects(item, ignore_value) for item in piece] for piece in pieces])
    try:
        yield
    finally:
        _PIECES.reset(token)


def average_count(targets: Sequence[Target], device: torch.device) -> float:
    """Targets per piece and worker, averaged over all of them; 1 where there is none."""
    return _average([float(sum(piece)) for piece in _counts(targets)], device) or 1.0


def average_class_weight(targets: Sequence[Target], logits: Tensor, no_object_weight: float) -> float:
    """Summed class weights of a piece, averaged over all pieces and workers.

    Args:
        targets: of the images at hand.
        logits: (N, Q, K + 1) of them.
        no_object_weight: of unmatched queries; that of a matched one is 1.
    """
    queries = logits.shape[1]
    sums = []
    for piece in _counts(targets):
        matched = sum(min(count, queries) for count in piece)
        sums.append(matched + no_object_weight * (len(piece) * queries - matched))
    return _average(sums, logits.device)


def _counts(targets: Sequence[Target]) -> list[list[int]]:
    """Objects of each image of each piece."""
    return _PIECES.get() or [[len(target.labels) for target in targets]]


def _objects(item: Mapping[str, Any], ignore_value: int) -> int:
    if "instances" in item:
        return len(item["instances"])
    if "sem_seg" in item:
        return int((item["sem_seg"].unique() != ignore_value).sum())
    return 0


def _average(values: Sequence[float], device: torch.device) -> float:
    mean = sum(values) / len(values)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mean
    total = torch.tensor(mean, device=device, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()
