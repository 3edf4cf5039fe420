"""What losses are divided by: figures of the whole batch, also where workers or pieces hold a part of it each.

A worker's share divided by its own counts would weigh every part alike, however many objects it holds. Divided by the
counts' averages, the mean over workers (DistributedDataParallel) and over pieces (gradient accumulation) is the loss
of the joined batch. The training step tells a model's inputs these counts (``batch_objects`` of the first one); other
trainers do not, and the workers ask each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from peft_d2.models.layers.targets import Target


def count_objects(item: Mapping[str, Any], ignore_value: int = 255) -> int:
    """How many targets a mapped dict becomes: instances, or classes in ``sem_seg`` other than ``ignore_value``."""
    if "instances" in item:
        return len(item["instances"])
    if "sem_seg" in item:
        return int((item["sem_seg"].unique() != ignore_value).sum())
    return 0


def objects_of_all(targets: Sequence[Target]) -> list[list[int]]:
    """The objects of each image, by worker: those of ``targets``, and of the other workers where there are any."""
    own = [len(target.labels) for target in targets]
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def average_count(objects: Sequence[Sequence[int]]) -> float:
    """Objects of the average part of a batch; 1 where there is none."""
    return sum(map(sum, objects)) / len(objects) or 1.0


def average_class_weight(objects: Sequence[Sequence[int]], queries: int, no_object_weight: float) -> float:
    """Summed class weights of the average part of a batch.

    Args:
        objects: of each image, by part.
        queries: of each image, of which as many as it has objects, if there are enough, are matched.
        no_object_weight: of unmatched queries; that of a matched one is 1.
    """
    images = [min(count, queries) for part in objects for count in part]
    return (sum(images) + no_object_weight * (len(images) * queries - sum(images))) / len(objects)
