"""What can be wrong with one segmentation, without drawing it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

Level = Literal["error", "warning"]

_HUGE = 1e6  # px: drawing allocates by coordinates


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
