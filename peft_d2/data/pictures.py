"""Pictures with masks drawn on them, and cut into tiles, the same for a set and for evaluation."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw


def overlay(
    image: np.ndarray, masks: Sequence[np.ndarray] | np.ndarray, classes: Sequence[int], names: Sequence[str] = ()
) -> np.ndarray:
    """(H, W, 3) uint8 RGB image with (N, H, W) bool masks: tinted, outlined, named where ``names`` are given."""
    canvas, labels = image.astype(np.float32), []
    for mask, label in zip(masks, classes, strict=True):
        # Hues a golden angle apart, so that neighbouring classes differ most.
        colour = 255 * np.array(colorsys.hsv_to_rgb((0.13 + 0.618034 * int(label)) % 1.0, 0.85, 1.0), dtype=np.float32)
        padded = np.pad(mask, 1)
        inner = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        canvas[inner] = 0.65 * canvas[inner] + 0.35 * colour
        canvas[mask & ~inner] = colour
        if len(names) and mask.any():
            labels.append((mask.any(axis=0).argmax(), mask.any(axis=1).argmax(), str(names[int(label)])))
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    for x, y, text in labels:
        ImageDraw.Draw(picture).text((int(x), int(y)), text, fill=(255, 255, 255))
    return np.asarray(picture)


def tile_starts(length: int, tile: int, overlap: int = 0) -> list[int]:
    """Starts of the fewest evenly spaced tiles that cover ``length`` px and overlap by at least ``overlap`` px.

    Raises:
        ValueError: the overlap is not smaller than the tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tile overlap {overlap}: expected 0 to {tile - 1}, as the tiles are {tile} px.")
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def enlarge(picture: Image.Image, scale: float) -> Image.Image:
    """The picture resized by ``scale``, as tiles are for training and for evaluation."""
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BILINEAR)
