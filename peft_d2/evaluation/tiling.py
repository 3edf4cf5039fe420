"""Whole images through a model that was trained on enlarged tiles: cut, predict, put back, merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from peft_d2.data.augmentation import keep_a_pixel
from peft_d2.data.pictures import enlarge, tile_starts
from peft_d2.data.segmentation import mask_box

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in px of the whole image, ends exclusive
_LARGE = 2**29  # bytes of masks that are held at once
_BATCH = 8  # tiles that go through the model together


def inference_model(cfg: Any, model: nn.Module) -> nn.Module:
    """The model as it is evaluated: by tiles where ``TEST.TILES.ENABLED``, else as it is.

    The loader of :func:`peft_d2.data.loader.build_test_loader` gives images of their own size in the first case.
    """
    tiles = cfg.TEST.get("TILES", None)
    if tiles is None or not tiles.ENABLED or isinstance(model, TiledModel):
        return model
    shortest = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST)
    return TiledModel(
        model, size=tiles.SIZE, scale=tiles.SCALE, overlap=tiles.OVERLAP, threshold=tiles.MERGE_THRESH,
        limit=cfg.TEST.DETECTIONS_PER_IMAGE, resize=shortest,
    )  # fmt: skip


class TiledModel(nn.Module):
    """A Detectron2 model for inference on whole images by overlapping tiles.

    Two predictions of one class from different tiles are one object when they agree (by IoU) on what both tiles see;
    the mask with the better score is then extended by the other's where only that one's tile looked. Where they do
    not agree, but the smaller is mostly inside the larger, the one with the lower score goes.

    Args:
        model: takes ``{"image": (3, H, W), "height", "width"}`` and returns ``instances`` with ``pred_masks``.
        size: side of a tile, px of the whole image.
        scale: factor by which tiles are enlarged, as those of the training were.
        overlap: least overlap of neighbouring tiles, px of the whole image; best as large as most objects.
        threshold: IoU, and share of the smaller mask, from which two predictions are one object.
        limit: how many predictions of a whole image are kept, by score.
        resize: what the config does to test images, applied to the enlarged tile.
    """

    def __init__(
        self, model: nn.Module, *, size: int, scale: float, overlap: int, threshold: float = 0.5, limit: int = 100,
        resize: T.Augmentation | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        tile_starts(size + 1, size, overlap)  # refuses an overlap that tiles of this size cannot have
        self.model, self.size, self.scale, self.overlap = model, size, scale, overlap
        self.threshold, self.limit = threshold, limit
        self.resize = T.AugmentationList(keep_a_pixel([resize] if resize is not None else []))

    @torch.no_grad()
    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Detectron2's inference: images in their own size in, ``instances`` of each out (masks on the CPU).

        Masks of more than half a gigabyte are :class:`CroppedMasks`.
        """
        return [{"instances": self._whole(record)} for record in batched_inputs]

    def _whole(self, record: dict[str, Any]) -> Instances:
        """Predictions on a whole image, of all its tiles."""
        image = record["image"].permute(1, 2, 0).to(torch.uint8).cpu().numpy()
        height, width = image.shape[:2]
        if (height, width) != (record.get("height", height), record.get("width", width)):
            raise ValueError(
                f"{record.get('file_name', 'an image')}: tiles are cut from images in their own size, but this one was "
                f"resized to {width} x {height} px. Use peft_d2.data.loader.build_test_loader."
            )
        boxes = [
            (x, y, min(x + self.size, width), min(y + self.size, height))
            for y in tile_starts(height, self.size, self.overlap)
            for x in tile_starts(width, self.size, self.overlap)
        ]
        parts: list[_Object] = []
        for start in range(0, len(boxes), _BATCH):
            chosen = boxes[start : start + _BATCH]
            for box, output in zip(chosen, self.model([self._input(image, b) for b in chosen]), strict=True):
                parts += _parts(output, box)
        # Most objects are seen in four tiles at most; a model that finds nothing must not cost minutes.
        best = sorted(parts, key=lambda p: -p.score)[: 4 * self.limit]
        merged = merge(best, self.threshold)[: self.limit]
        return _instances(merged, height, width)

    def _input(self, image: np.ndarray, box: Box) -> dict[str, Any]:
        """A tile of an image (H, W, C) as the model takes it: enlarged, then resized as test images are."""
        x0, y0, x1, y1 = box
        cut = np.ascontiguousarray(image[y0:y1, x0:x1])
        tile = np.asarray(enlarge(Image.fromarray(cut.squeeze(-1) if cut.shape[-1] == 1 else cut), self.scale))
        picture = T.AugInput(tile.reshape(*tile.shape[:2], -1))
        self.resize(picture)
        pixels = torch.from_numpy(np.ascontiguousarray(picture.image.transpose(2, 0, 1)))
        return {"image": pixels, "height": y1 - y0, "width": x1 - x0}


@dataclass
class _Object:
    """A prediction: its mask on ``box``, and the tiles that it was seen in."""

    mask: np.ndarray
    box: Box
    label: int
    score: float
    tiles: list[Box] = field(default_factory=list)

    def on(self, box: Box) -> np.ndarray:
        """The mask on another box, empty where it is not known."""
        canvas = np.zeros((box[3] - box[1], box[2] - box[0]), dtype=bool)
        canvas[_window(self.box, box)] = self.mask[_window(box, self.box)]
        return canvas

    def tight(self) -> _Object | None:
        """The same object on the box of its pixels; None where it has none."""
        x, y, width, height = map(int, mask_box(self.mask))
        x0, y0 = self.box[:2]
        box = (x0 + x, y0 + y, x0 + x + width, y0 + y + height)
        return replace(self, mask=self.mask[y : y + height, x : x + width], box=box) if width else None

    def join(self, other: _Object) -> None:
        """Add the pixels of ``other`` outside the tiles of this object: inside them, this one has the better score."""
        box = (
            min(self.box[0], other.box[0]), min(self.box[1], other.box[1]),
            max(self.box[2], other.box[2]), max(self.box[3], other.box[3]),
        )  # fmt: skip
        self.mask, self.box = self.on(box) | (other.on(box) & ~_seen(self.tiles, box)), box
        self.tiles += other.tiles


def merge(parts: Sequence[_Object], threshold: float) -> list[_Object]:
    """Objects from the predictions of all tiles, best first."""
    kept: list[_Object] = []
    for part in sorted(parts, key=lambda p: -p.score):
        same, covered = _compare(part, kept, threshold)
        if same:
            # One part may connect objects of tiles that do not touch each other.
            for other in [*same[1:], part]:
                same[0].join(other)
            gone = {id(other) for other in same[1:]}
            kept = [known for known in kept if id(known) not in gone]
        elif not covered:
            kept.append(part)
    return kept


def _compare(part: _Object, kept: Sequence[_Object], threshold: float) -> tuple[list[_Object], bool]:
    """The objects that ``part`` is one with, and whether it mostly lies inside another."""
    same, covered, tile = [], False, part.tiles[0]
    mine, area = part.on(tile), np.count_nonzero(part.mask)
    seen_by: dict[tuple[Box, ...], np.ndarray] = {}
    for known in kept:
        if known.label != part.label or tile in known.tiles or not _touch(known.box, part.box):
            continue
        tiles = tuple(known.tiles)
        if tiles not in seen_by:
            seen_by[tiles] = _seen(tiles, tile)
        theirs = known.on(tile)
        common = np.count_nonzero(mine & theirs)  # seen by both tiles, or it could not be there
        if not common:
            continue
        either = np.count_nonzero((mine | theirs) & seen_by[tiles])
        if common >= threshold * either:
            same.append(known)
        covered = covered or bool(common >= threshold * min(area, np.count_nonzero(known.mask)))
    return same, covered


def _seen(tiles: Sequence[Box], tile: Box) -> np.ndarray:
    """A mask on the box ``tile`` of what the ``tiles`` cover of it."""
    canvas = np.zeros((tile[3] - tile[1], tile[2] - tile[0]), dtype=bool)
    for other in tiles:
        canvas[_window(other, tile)] = True
    return canvas


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _window(part: Box, whole: Box) -> tuple[slice, slice]:
    """Slices for the rows and columns of an array on the box ``whole`` that lie in the box ``part``; maybe empty."""
    left, top = whole[:2]
    columns = slice(max(part[0] - left, 0), max(min(part[2], whole[2]) - left, 0))
    return slice(max(part[1] - top, 0), max(min(part[3], whole[3]) - top, 0)), columns


def _parts(output: dict[str, Any], tile: Box) -> list[_Object]:
    """What was found in a tile, as objects of the whole image."""
    if "instances" not in output:
        raise ValueError("TEST.TILES merges instances, but the model puts out none. Set TEST.TILES.ENABLED False.")
    instances = output["instances"]
    masks = instances.pred_masks.cpu().numpy().astype(bool)
    rows = zip(masks, instances.pred_classes.tolist(), instances.scores.tolist(), strict=True)
    parts = (_Object(mask, tile, label, score, [tile]).tight() for mask, label, score in rows)
    return [part for part in parts if part is not None]


class CroppedMasks:
    """Masks of a large image, each kept on its box: whole ones, all at once, would not fit into memory."""

    def __init__(self, objects: Sequence[_Object], height: int, width: int) -> None:
        self.objects, self.shape = list(objects), (len(objects), height, width)

    def __len__(self) -> int:
        return len(self.objects)

    def __iter__(self) -> Iterator[torch.Tensor]:
        _, height, width = self.shape
        return (torch.from_numpy(known.on((0, 0, width, height))) for known in self.objects)

    def __getitem__(self, chosen: Any) -> CroppedMasks:
        return CroppedMasks([self.objects[i] for i in torch.arange(len(self))[chosen].tolist()], *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array([mask.numpy() for mask in self], dtype=dtype or bool).reshape(self.shape)

    def split(self, count: int) -> Iterator[torch.Tensor]:
        """Whole masks (n, H, W), at most ``count`` and half a gigabyte at once."""
        count = max(1, min(count, _LARGE // (self.shape[1] * self.shape[2])))
        for first in range(0, len(self), count):
            yield torch.stack(list(self[first : first + count]))


def _instances(objects: Sequence[_Object], height: int, width: int) -> Instances:
    instances, masks = Instances((height, width)), CroppedMasks(objects, height, width)
    large = len(objects) * height * width > _LARGE
    instances.pred_masks = masks if large else torch.from_numpy(np.asarray(masks))
    boxes = [part.box if (part := known.tight()) else (0, 0, 0, 0) for known in objects]
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.tensor([o.score for o in objects], dtype=torch.float32)
    instances.pred_classes = torch.tensor([o.label for o in objects], dtype=torch.int64)
    return instances
