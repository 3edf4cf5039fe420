"""From class and mask logits to instance, panoptic and semantic results at the requested size.

Masks are brought to full size a few queries at a time: :data:`CHUNK_VALUES` bounds the memory, however many there are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor

CHUNK_VALUES = 2**24  # float32 values that are held at full size at once: 64 MiB
CACHE_VALUES = 2**19  # and in inference on a CPU: 2 MiB, which its cache holds


@dataclass(frozen=True)
class Canvas:
    """The sizes (height, width) that an image's masks pass through.

    The decoder's masks cover ``padded``, the size of the batch; ``image`` is the part without padding; ``output`` is
    the wanted size. The last step, from ``image`` to ``output``, is bilinear, or bicubic with antialiasing.
    """

    padded: tuple[int, int]
    image: tuple[int, int]
    output: tuple[int, int]
    bicubic: bool = False

    def upsample(self, masks: Tensor) -> Tensor:
        """(M, h, w) logits -> (M, *output) float32."""
        return self.crop_and_resize(self.to_padded(masks))

    def to_padded(self, masks: Tensor) -> Tensor:
        """(M, h, w) -> (M, *padded) float32."""
        return F.interpolate(masks[None].float(), size=self.padded, mode="bilinear", align_corners=False)[0]

    def crop_and_resize(self, maps: Tensor) -> Tensor:
        """(M, *padded) -> (M, *output)."""
        inside, mode = maps[:, : self.image[0], : self.image[1]], "bicubic" if self.bicubic else "bilinear"
        if self.image == self.output and not self.bicubic:
            return inside
        return F.interpolate(inside[None], size=self.output, mode=mode, align_corners=False, antialias=self.bicubic)[0]

    def chunks(self, count: int, full_size: bool = True, device: str = "") -> Iterator[slice]:
        """Slices of ``count`` masks: :data:`CHUNK_VALUES` each, on a ``device`` "cpu" :data:`CACHE_VALUES`."""
        height, width = self.padded
        if full_size:
            height, width = max(height, self.output[0]), max(width, self.output[1])
        values = min(CHUNK_VALUES, CACHE_VALUES) if device == "cpu" else CHUNK_VALUES
        step = max(1, values // (height * width))
        return (slice(start, min(start + step, count)) for start in range(0, count, step))


def instance_inference(
    probability: Tensor,
    mask_logits: Tensor,
    canvas: Canvas,
    top_k: int,
    keep_classes: Collection[int] | None = None,
    mask_quality: bool = True,
) -> tuple[Instances, Tensor]:
    """The best (query, class) pairs, sorted by score; a query may appear with several classes.

    Of the ``top_k`` pairs of ``probability`` (Q, K), only ``keep_classes`` stay, or all. With ``mask_quality`` the
    mask's mean probability inside itself is a factor of the score. ``mask_logits`` are (Q, h, w).

    Returns:
        ``pred_masks`` (M, H, W) bool, ``scores`` and ``pred_classes``, and the query (M,) of each.
    """
    n_classes = probability.shape[1]
    scores, pairs = probability.flatten().topk(min(top_k, probability.numel()))
    classes, queries = pairs % n_classes, pairs // n_classes
    if keep_classes is not None:
        keep = torch.isin(classes, torch.tensor(sorted(keep_classes), dtype=classes.dtype, device=classes.device))
        scores, classes, queries = scores[keep], classes[keep], queries[keep]
    used, slot = queries.unique(return_inverse=True)
    masks = torch.zeros(len(used), *canvas.output, dtype=torch.bool, device=mask_logits.device)
    quality = torch.zeros(len(used), device=mask_logits.device)
    for part in canvas.chunks(len(used), device=masks.device.type):
        logits = canvas.upsample(mask_logits[used[part]])
        inside = torch.gt(logits, 0, out=masks[part])
        area = inside.view(torch.uint8).flatten(1).sum(1, dtype=torch.int32)
        quality[part] = logits.sigmoid_().mul_(inside).flatten(1).sum(1) / (area + 1e-6)
    scores, order = (scores * quality[slot] if mask_quality else scores).sort(descending=True, stable=True)
    result = Instances(canvas.output)
    result.pred_masks = masks[slot[order]]
    result.scores = scores
    result.pred_classes = classes[order]
    return result, queries[order]


def semantic_inference(probability: Tensor, mask_logits: Tensor, canvas: Canvas, resize_last: bool = False) -> Tensor:
    """Per-class maps (K, H, W): the sum over queries of class probability times mask probability, not normalised.

    ``resize_last`` sums at the padded size and resizes the class maps, which needs less memory for large outputs with
    many queries; otherwise the mask logits are resized first.
    """
    resize = canvas.to_padded if resize_last else canvas.upsample
    size = canvas.padded if resize_last else canvas.output
    total = torch.zeros(probability.shape[1], *size, device=mask_logits.device)
    for part in canvas.chunks(len(mask_logits), full_size=not resize_last, device=mask_logits.device.type):
        masks = resize(mask_logits[part]).sigmoid_()
        total += torch.einsum("qc,qhw->chw", probability[part], masks)
    return canvas.crop_and_resize(total) if resize_last else total


def panoptic_inference(
    scores: Tensor,
    classes: Tensor,
    mask_logits: Tensor,
    canvas: Canvas,
    thing_classes: Collection[int],
    overlap_threshold: float,
) -> tuple[Tensor, list[dict]]:
    """Segment ids (H, W) int32, 0 where there is none, and the segments (MaskFormer, NeurIPS 2021, section 3.4).

    The queries given, with scores (M,), classes (M,) and logits (M, h, w), compete for each pixel with score times mask
    probability. A query is kept if it wins at least ``overlap_threshold`` times as many pixels as have a probability of
    0.5 or more, and paints those that it wins with such a probability. Stuff of one class is one segment.
    """
    if not len(scores):
        return torch.zeros(canvas.output, dtype=torch.int32, device=mask_logits.device), []
    winner, painted, areas = _compete(scores, mask_logits, canvas)
    won = winner.flatten().bincount(minlength=len(scores))
    visible = winner[painted].bincount(minlength=len(scores))
    segments: list[dict] = []
    segment_of_query = torch.zeros(len(scores), dtype=torch.int32)
    stuff: dict[int, int] = {}
    rows = zip(classes.tolist(), won.tolist(), areas.tolist(), visible.tolist(), strict=True)
    for query, (category, won_area, area, visible_area) in enumerate(rows):
        if not (area and visible_area) or won_area / area < overlap_threshold:
            continue
        is_thing = category in thing_classes
        if is_thing or category not in stuff:
            stuff[category] = len(segments) + 1
            segments.append({"id": len(segments) + 1, "isthing": is_thing, "category_id": category})
        segment_of_query[query] = len(segments) if is_thing else stuff[category]
    return segment_of_query.to(winner.device)[winner] * painted, segments


def _compete(scores: Tensor, mask_logits: Tensor, canvas: Canvas) -> tuple[Tensor, Tensor, Tensor]:
    """Each pixel's winner (H, W), whether it has a probability of 0.5 or more there (H, W), each query's area (M,)."""
    device = mask_logits.device
    best = torch.full(canvas.output, -1.0, device=device)
    winner = torch.zeros(canvas.output, dtype=torch.int64, device=device)
    painted = torch.zeros(canvas.output, dtype=torch.bool, device=device)
    areas = torch.zeros(len(scores), dtype=torch.int64, device=device)
    for part in canvas.chunks(len(scores), device=device.type):
        masks = canvas.upsample(mask_logits[part]).sigmoid_()
        areas[part] = (masks >= 0.5).flatten(1).sum(1)
        value, index = (scores[part, None, None] * masks).max(0)
        better = value > best
        best = torch.where(better, value, best)
        winner = torch.where(better, index + part.start, winner)
        painted = torch.where(better, masks.gather(0, index[None])[0] >= 0.5, painted)
    return winner, painted, areas
