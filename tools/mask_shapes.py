"""Masks in the forms of COCO that the package reads and the tools write: polygons and uncompressed run lengths."""

from __future__ import annotations

from typing import Any

import numpy as np

from peft_d2.data.segmentation import decode_counts, mask_to_compressed_rle


def mask_to_rle(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed COCO run lengths ``{"size": [h, w], "counts": [...]}`` of an (H, W) mask."""
    compressed = mask_to_compressed_rle(mask)
    return {**compressed, "counts": decode_counts(compressed["counts"])}


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Polygons along the pixel edges that cover an (H, W) mask exactly, flat ``[x0, y0, x1, y1, ...]``.

    COCO polygons have no holes: a mask with a hole is cut in two at a column through the hole.
    """
    mask = np.asarray(mask, dtype=bool)
    parts = mask_outlines(mask)
    for _, *holes in parts:
        if holes:
            cut = int(holes[0][:, 0].min() + holes[0][:, 0].max()) // 2
            left = np.arange(mask.shape[1]) < cut
            return mask_to_polygons(mask & left) + mask_to_polygons(mask & ~left)
    return [ring.ravel().tolist() for (ring,) in parts]


def mask_outlines(mask: np.ndarray) -> list[list[np.ndarray]]:
    """Outlines of an (H, W) mask along pixel edges: of each part the outer ring, then its holes, each (N, 2) x, y."""
    import cv2

    # OpenCV's contours go through the centres of pixels. Those of twice the size lie on both sides of each edge.
    doubled = cv2.resize(np.asarray(mask, dtype=np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    rings, tree = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parts: dict[int, list[np.ndarray]] = {}
    for index, ring in enumerate(rings):
        points = (ring[:, 0] + 1) // 2
        points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)].astype(float)
        parent = int(tree[0, index, 3])
        parts.setdefault(index if parent < 0 else parent, []).insert(0 if parent < 0 else 10**9, points)
    return list(parts.values())
