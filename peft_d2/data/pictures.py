"""Pictures of images with their masks, PIL and numpy only."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from peft_d2.data.images import as_rgb, image_size
from peft_d2.data.segmentation import segmentation_to_mask


def overlay(
    image: np.ndarray, masks: Sequence[np.ndarray] | np.ndarray, classes: Sequence[int], names: Sequence[str] = ()
) -> np.ndarray:
    """(H, W, 3) uint8 RGB image with (N, H, W) bool masks: tinted, outlined, named where ``names`` are given."""
    canvas = image.astype(np.float32)
    for mask, label in zip(masks, classes, strict=True):
        colour = _colour(int(label))
        inner = mask & ~_rim(mask)
        canvas[inner] = 0.65 * canvas[inner] + 0.35 * colour
        canvas[mask & ~inner] = colour
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    painter = ImageDraw.Draw(picture)
    for mask, label in zip(masks, classes, strict=True):
        if len(names) and mask.any():
            ys, xs = np.nonzero(mask)
            painter.text((int(xs.min()), int(ys.min())), str(names[int(label)]), fill=(255, 255, 255))
    return np.asarray(picture)


def contact_sheet(data: dict[str, Any], image_root: str | Path, images: int = 24, cell: int = 192) -> Image.Image:
    """The first images of a COCO-format set with their masks in cells of ``cell`` px, six in a row."""
    order = {c["id"]: i for i, c in enumerate(sorted(data["categories"], key=lambda c: c["id"]))}
    chosen = data["images"][:images]
    objects: dict[Any, list[dict[str, Any]]] = {record["id"]: [] for record in chosen}
    for annotation in data["annotations"]:
        if annotation["image_id"] in objects and annotation.get("segmentation"):
            objects[annotation["image_id"]].append(annotation)
    pictures = []
    for record in chosen:
        image = read_rgb(Path(image_root) / record["file_name"])
        masks = [segmentation_to_mask(a["segmentation"], *image.shape[:2]) for a in objects[record["id"]]]
        labels = [order[a["category_id"]] for a in objects[record["id"]]]
        pictures.append(Image.fromarray(overlay(image, masks, labels)))
    return sheet(pictures, cell)


def pixel_statistics(paths: Sequence[str | Path], limit: int = 1000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of red, green and blue over all pixels, 0 to 255.

    Of more than ``limit`` images, as many are taken, evenly spaced. Each is reduced to about 256 px a side first, as
    training reduces them: the deviation of single pixels would count their noise.
    """
    step = max(1, math.ceil(len(paths) / limit))
    count, total, squares = 0, np.zeros(3), np.zeros(3)
    for path in paths[::step]:
        picture = Image.fromarray(read_rgb(path))
        picture.thumbnail((256, 256), Image.Resampling.BOX)
        pixels = np.asarray(picture, dtype=np.float64).reshape(-1, 3)
        count += len(pixels)
        total += pixels.sum(axis=0)
        squares += (pixels**2).sum(axis=0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return [round(float(v), 3) for v in mean], [round(float(v), 3) for v in deviation]


def read_rgb(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8 image, turned as its EXIF says.

    Raises:
        DatasetError: the file is no image, or would not be read right.
    """
    image_size(path)
    with Image.open(path) as opened:
        return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))


def sheet(pictures: Sequence[Image.Image], cell: int = 0, columns: int = 6) -> Image.Image:
    """Pictures side by side in square cells of ``cell`` px, 0: as large as the largest picture."""
    cell = cell or max(max(p.size) for p in pictures)
    columns = min(columns, max(1, len(pictures)))
    canvas = Image.new("RGB", (columns * cell, max(1, -(-len(pictures) // columns)) * cell))
    for position, picture in enumerate(pictures):
        thumbnail = picture.copy()
        thumbnail.thumbnail((cell, cell))
        canvas.paste(thumbnail, (position % columns * cell, position // columns * cell))
    return canvas


def picture_of_sample(sample: dict[str, Any], image_format: str, names: Sequence[str] = ()) -> np.ndarray:
    """(H, W, 3) uint8 RGB picture of what a mapper made: image and ``instances`` with masks of any kind."""
    image = sample["image"].permute(1, 2, 0).numpy()
    image = as_rgb(image, image_format)
    instances = sample["instances"]
    height, width = image.shape[:2]
    masks: list[np.ndarray] = []
    if instances.has("gt_masks"):
        kept = instances.gt_masks
        if hasattr(kept, "polygons"):
            masks = [segmentation_to_mask(polygons, height, width) for polygons in kept.polygons]
        else:
            masks = list(getattr(kept, "tensor", kept).numpy().astype(bool))
    labels = instances.gt_classes.tolist()[: len(masks)]
    return overlay(image, masks, labels, names)


def _colour(label: int) -> np.ndarray:
    """Hues a golden angle apart, so that neighbouring classes differ most."""
    return 255 * np.array(colorsys.hsv_to_rgb((0.13 + 0.618034 * label) % 1.0, 0.85, 1.0), dtype=np.float32)


def _rim(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    surrounded = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~surrounded
