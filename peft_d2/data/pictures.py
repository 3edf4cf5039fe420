"""Pictures of images with their masks, PIL and numpy only."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from peft_d2.data.images import image_size


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


def _colour(label: int) -> np.ndarray:
    """Hues a golden angle apart, so that neighbouring classes differ most."""
    return 255 * np.array(colorsys.hsv_to_rgb((0.13 + 0.618034 * label) % 1.0, 0.85, 1.0), dtype=np.float32)


def _rim(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    surrounded = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~surrounded
