"""Bit masks and the two COCO segmentation forms, polygons and run lengths: from one to another, and their defects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

Level = Literal["error", "warning"]

_HUGE = 1e6  # px: drawing allocates by coordinates


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
        if polygon_area([float(v) for point in loop for v in point]) < 0:
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


def polygon_defect(polygons: Sequence[Any], height: int, width: int) -> list[tuple[Level, str]]:
    """(level, defect) pairs of COCO polygons ``[[x0, y0, x1, y1, ...], ...]`` on an image of (height, width)."""
    if not polygons:
        return [("error", "has an empty list of polygons")]
    defects: list[tuple[Level, str]] = []
    area = 0.0
    for number, polygon in enumerate(polygons):
        fault = _one_polygon(polygon, height, width)
        if fault:
            defects.append((fault[0], f"polygon {number}: {fault[1]}"))
        if not fault or fault[0] == "warning":
            area += abs(polygon_area(polygon))
    if not defects and area < 1e-3:
        defects.append(("warning", f"its polygons have an area of {area:.3g} px: the object is dropped"))
    return defects


def _one_polygon(polygon: Any, height: int, width: int) -> tuple[Level, str] | None:
    if not isinstance(polygon, (list, tuple)):
        return "error", f"is {polygon!r}, expected a flat list of coordinates"
    if len(polygon) % 2:
        return "error", f"has {len(polygon)} numbers, an odd length"
    if len(polygon) < 6:
        return "error", f"has {len(polygon) // 2} points, at least 3 are needed"
    try:
        total, low, high = math.fsum(polygon), min(polygon), max(polygon)
    except (TypeError, OverflowError, ValueError):
        total, low, high = math.nan, math.nan, math.nan
    if not (math.isfinite(total) and math.isfinite(low) and math.isfinite(high)):
        return "error", "has a coordinate that is no finite number"
    if high > _HUGE or low < -_HUGE:
        return "error", f"has a coordinate of {high if high > _HUGE else low:.3g} px"
    xs, ys = polygon[::2], polygon[1::2]
    if max(xs) < 0 or min(xs) > width or max(ys) < 0 or min(ys) > height:
        return "warning", f"lies outside the image of {width} x {height} px"
    if low < -1 or max(xs) > width + 1 or max(ys) > height + 1:
        return "warning", f"leaves the image of {width} x {height} px"
    return None


def polygon_area(polygon: Sequence[float]) -> float:
    """Signed area in px of a flat polygon ``[x0, y0, x1, y1, ...]``, by the shoelace formula."""
    xs, ys = polygon[::2], polygon[1::2]
    return 0.5 * math.fsum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))


def run_length_defect(segmentation: Any, height: int, width: int) -> str:
    """What is wrong with COCO run lengths, compressed or not, of an image of (height, width); "" if nothing."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        return f"run lengths are of size {size}, the image is [{height}, {width}] (height, width)"
    if isinstance(counts, (str, bytes)):
        decoded = decode_counts(counts)
        if decoded is None:
            return "compressed run lengths cannot be decoded"
        counts = decoded
    if not isinstance(counts, list) or not all(isinstance(c, int) for c in counts):
        return f"counts are {type(counts).__name__}, expected a string or a list of integers"
    if min(counts, default=0) < 0:
        return "counts has a negative run"
    if sum(counts) != height * width:
        return f"counts add up to {sum(counts)}, the image has {height * width} px"
    if sum(counts[1::2]) == 0:
        return "the mask is empty"
    return ""


def decode_counts(text: str | bytes) -> list[int] | None:
    """Run lengths of COCO's compressed form: 5 bits a character from 48 on, a continuation bit, and from the
    fourth run on the difference to the run before the last. None when the text is not of that form."""
    data = text.encode("ascii", "replace") if isinstance(text, str) else text
    counts: list[int] = []
    value = shift = 0
    for byte in data:
        chunk = byte - 48
        if not 0 <= chunk < 64 or shift > 60:
            return None
        value |= (chunk & 0x1F) << shift
        shift += 5
        if not chunk & 0x20:
            if chunk & 0x10:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return None if shift else counts


def extent(segmentation: Any) -> tuple[tuple[float, float, float, float], float]:
    """The box x0, y0, x1, y1 and the area in px of polygons or run lengths that have no defect."""
    if isinstance(segmentation, dict):
        from pycocotools import mask as coco_mask

        coded = segmentation
        if isinstance(coded["counts"], list):
            coded = coco_mask.frPyObjects(coded, *coded["size"])
        x, y, width, height = coco_mask.toBbox(coded).tolist()
        return (x, y, x + width, y + height), float(coco_mask.area(coded))
    xs = [x for polygon in segmentation for x in polygon[::2]]
    ys = [y for polygon in segmentation for y in polygon[1::2]]
    return (min(xs), min(ys), max(xs), max(ys)), sum(abs(polygon_area(polygon)) for polygon in segmentation)
