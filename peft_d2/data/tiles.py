"""Where the tiles of an image lie, and how they are enlarged: the same for cutting a set and for evaluation."""

from __future__ import annotations

import math

from PIL import Image


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
