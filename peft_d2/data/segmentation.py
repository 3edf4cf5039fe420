"""Between bit masks and the two COCO segmentation forms: polygons and run lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def mask_to_rle(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed COCO run lengths ``{"size": [h, w], "counts": [...]}`` of an (H, W) mask."""
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    bounds = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(bounds).tolist()
    if flat.size and flat[0]:
        counts.insert(0, 0)  # runs begin with background
    return {"size": [int(mask.shape[0]), int(mask.shape[1])], "counts": counts}


def mask_to_compressed_rle(mask: np.ndarray) -> dict[str, Any]:
    """Compressed COCO run lengths of an (H, W) mask, counts as a str: ready for json."""
    from pycocotools import mask as coco_mask

    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def segmentation_to_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(height, width) bool mask of a COCO segmentation: polygons, run lengths, or compressed run lengths."""
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            segmentation = coco_mask.frPyObjects(segmentation, *segmentation["size"])
        return coco_mask.decode(segmentation).astype(bool)
    if not len(segmentation):
        return np.zeros((height, width), dtype=bool)
    polygons = [np.asarray(p, dtype=np.float64).ravel().tolist() for p in segmentation]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)


def mask_box(mask: np.ndarray) -> list[float]:
    """COCO box [x, y, w, h] of an (H, W) mask, zeros when it is empty."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(ys):
        return [0.0, 0.0, 0.0, 0.0]
    return [float(xs[0]), float(ys[0]), float(xs[-1] - xs[0] + 1), float(ys[-1] - ys[0] + 1)]


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Polygons along the pixel edges that cover an (H, W) mask exactly, flat ``[x0, y0, x1, y1, ...]``.

    COCO polygons have no holes: a mask with a hole is cut in two at a column through the hole.
    """
    loops = _boundary_loops(np.asarray(mask, dtype=bool))
    for loop in loops:
        if _signed_area(loop) < 0:
            cut = (min(x for x, _ in loop) + max(x for x, _ in loop)) // 2
            left, right = np.array(mask, dtype=bool), np.array(mask, dtype=bool)
            left[:, cut:] = False
            right[:, :cut] = False
            return mask_to_polygons(left) + mask_to_polygons(right)
    return [[float(v) for point in loop for v in point] for loop in loops]


def _boundary_loops(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Closed loops of corner points with the mask on their right-hand side (y points down)."""
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    sides = (  # neighbour that must be empty, start and end of the edge relative to the pixel
        (padded[:-2, 1:-1], (0, 0), (1, 0)),
        (padded[1:-1, 2:], (1, 0), (1, 1)),
        (padded[2:, 1:-1], (1, 1), (0, 1)),
        (padded[1:-1, :-2], (0, 1), (0, 0)),
    )
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for neighbour, (sx, sy), (ex, ey) in sides:
        for y, x in np.argwhere(inside & ~neighbour).tolist():
            following.setdefault((x + sx, y + sy), []).append((x + ex, y + ey))
    loops = []
    while following:
        loops.append(_walk(following))
    return loops


def _walk(following: dict[tuple[int, int], list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """Take one closed loop out of the edges; only points where it turns are kept."""
    start = point = next(iter(following))
    first = heading = (0, 0)
    loop: list[tuple[int, int]] = []
    while True:
        # Two ways out where pixels touch at a corner: the right turn stays with the same pixel.
        right = (point[0] - heading[1], point[1] + heading[0])
        ends = following.get(point, [])
        if loop and point == start and right not in ends:
            break
        end = right if right in ends else ends[0]
        ends.remove(end)
        if not ends:
            del following[point]
        step = (end[0] - point[0], end[1] - point[1])
        if step != heading:
            loop.append(point)
        first = first if first != (0, 0) else step
        point, heading = end, step
    return loop[1:] if heading == first else loop


def _signed_area(loop: Sequence[tuple[int, int]]) -> float:
    points = np.asarray(loop, dtype=np.float64)
    following = np.roll(points, -1, axis=0)
    return float((points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]).sum() / 2)
