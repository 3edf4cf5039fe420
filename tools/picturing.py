"""Pictures as several tools make them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image


def as_rgb(image: np.ndarray, image_format: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an (H, W, C) image in ``INPUT.FORMAT``."""
    if image_format == "BGR":
        return np.ascontiguousarray(image[..., ::-1])
    return image.repeat(3, axis=-1) if image.shape[-1] == 1 else image


def sheet(pictures: Sequence[Image.Image], cell: int = 0) -> Image.Image:
    """Pictures side by side in square cells of ``cell`` px, 0: as large as the largest picture."""
    cell = cell or max(max(p.size) for p in pictures)
    columns = min(6, max(1, len(pictures)))
    canvas = Image.new("RGB", (columns * cell, max(1, -(-len(pictures) // columns)) * cell))
    for position, picture in enumerate(pictures):
        thumbnail = picture.copy()
        thumbnail.thumbnail((cell, cell))
        canvas.paste(thumbnail, (position % columns * cell, position // columns * cell))
    return canvas
