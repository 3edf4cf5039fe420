"""Masks and the two forms of COCO segmentations, polygons and run lengths: conversions, and what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

Level = Literal["error", "warning"]

HUGE = 1e6  # px: drawing allocates by coordinates


def mask_to_compressed_rle(mask: np.ndarray) -> dict[str, Any]:
    """Compressed COCO run lengths of an (H, W) mask, counts as a str: ready for json."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def panoptic_ids(colours: np.ndarray) -> np.ndarray:
    """Segment ids (H, W) of a panoptic image (H, W, 3) uint8 in RGB, as COCO has them: red + 256 green + 65536 blue."""
    packed = np.zeros((*colours.shape[:2], 4), dtype=np.uint8)  # the bytes of numbers: faster than sums of products
    for channel in range(3):  # which is faster than all at once
        packed[..., channel] = colours[..., channel]
    return packed.view("<i4")[..., 0]


def run_lengths(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Polygons or run lengths of either form as the functions of pycocotools take them."""
    if isinstance(segmentation, dict):
        plain = isinstance(segmentation["counts"], list)
        return coco_mask.frPyObjects(segmentation, *segmentation["size"]) if plain else segmentation
    if not len(segmentation):
        return mask_to_compressed_rle(np.zeros((height, width)))
    polygons = [np.asarray(p, dtype=np.float64).ravel().tolist() for p in segmentation]
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))


def segmentation_to_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(height, width) bool mask of a COCO segmentation: polygons, run lengths, or compressed run lengths."""
    return coco_mask.decode(run_lengths(segmentation, height, width)).astype(bool)


def mask_box(mask: np.ndarray) -> list[float]:
    """COCO box [x, y, w, h] of an (H, W) mask, zeros when it is empty."""
    return coco_mask.toBbox(mask_to_compressed_rle(mask)).tolist()


def polygon_defect(polygons: Sequence[Any], height: int, width: int) -> list[tuple[Level, str]]:
    """(level, defect) pairs of COCO polygons ``[[x0, y0, x1, y1, ...], ...]`` on an image of (height, width)."""
    if not polygons:
        return [("error", "has an empty list of polygons")]
    if isinstance(polygons[0], int | float):
        return [("error", f"is one flat list ({polygons[0]}, ...), expected a list of such lists, one a polygon")]
    faults = [_one_polygon(polygon, height, width) for polygon in polygons]
    if any(faults):
        return [(fault[0], f"polygon {i}: {fault[1]}") for i, fault in enumerate(faults) if fault]
    area = sum(abs(polygon_area(polygon)) for polygon in polygons)
    return [("warning", f"its polygons have an area of {area:.3g} px: the object is dropped")] if area < 1e-3 else []


def _one_polygon(polygon: Any, height: int, width: int) -> tuple[Level, str] | None:
    """Level and defect of one polygon, None where there is none."""
    if not isinstance(polygon, (list, tuple)):
        return "error", f"is {polygon!r}, expected a flat list of coordinates"
    if polygon and isinstance(polygon[0], list | tuple | dict):
        return "error", f"is a list of points ({polygon[0]}, ...), expected a flat list of coordinates"
    if len(polygon) % 2:
        return "error", f"has {len(polygon)} numbers, an odd length"
    if len(polygon) < 6:
        return "error", f"has {len(polygon) // 2} points, at least 3 are needed"
    try:
        total, low, high = math.fsum(polygon), min(polygon), max(polygon)
    except (TypeError, OverflowError, ValueError):
        total = low = high = math.nan
    if not all(map(math.isfinite, (total, low, high))):
        return "error", "has a coordinate that is no finite number"
    if high > HUGE or low < -HUGE:
        return "error", f"has a coordinate of {high if high > HUGE else low:.3g} px"
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
    if not isinstance(size, (list, tuple)) or list(size) != [height, width] or float in map(type, size):
        return f"run lengths are of size {size}, the image is [{height}, {width}] (height, width)"
    if isinstance(counts, (str, bytes)) and (counts := decode_counts(counts)) is None:
        return "compressed run lengths cannot be decoded"
    if not isinstance(counts, list) or not all(isinstance(c, int) for c in counts):
        return f"counts are {type(counts).__name__}, expected a string or a list of integers"
    if min(counts, default=0) < 0:
        return "counts has a negative run"
    if sum(counts) != height * width:
        return f"counts add up to {sum(counts)}, the image has {height * width} px"
    return "" if sum(counts[1::2]) else "the mask is empty"


def decode_counts(text: str | bytes) -> list[int] | None:
    """The run lengths in a text of COCO's compressed form; None where it is not of that form.

    pycocotools would read beyond the end of such a text. A character holds 5 bits and one that says whether more
    follow, from 48 on; from the fourth run on, numbers are differences to the last run but one.
    """
    data = text.encode("ascii", "replace") if isinstance(text, str) else text
    counts: list[int] = []
    value = shift = 0
    for chunk in (byte - 48 for byte in data):
        if not 0 <= chunk < 64 or shift > 60:
            return None
        value |= (chunk & 0x1F) << shift
        shift += 5
        if not chunk & 0x20:
            value -= (1 << shift) if chunk & 0x10 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return None if shift else counts


def extent(segmentation: Any) -> tuple[tuple[float, float, float, float], float]:
    """The box x0, y0, x1, y1 and the area in px of polygons or run lengths that have no defect."""
    if isinstance(segmentation, dict):
        coded = run_lengths(segmentation, 0, 0)
        x, y, width, height = coco_mask.toBbox(coded).tolist()
        return (x, y, x + width, y + height), float(coco_mask.area(coded))
    xs = [x for polygon in segmentation for x in polygon[::2]]
    ys = [y for polygon in segmentation for y in polygon[1::2]]
    return (min(xs), min(ys), max(xs), max(ys)), sum(abs(polygon_area(polygon)) for polygon in segmentation)
