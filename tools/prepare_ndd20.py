#!/usr/bin/env python3
"""NDD20, dolphins above and below water: from its VIA jsons to COCO's format, with a split into train and test.

python tools/prepare_ndd20.py                          # $DETECTRON2_DATASETS/NDD20, or datasets/NDD20
python tools/prepare_ndd20.py --source NDD20 --splits mine.json

NDD20 (Trotter et al. 2020, arXiv 2005.13359, the Northumberland Dolphin Dataset) is published as ``ABOVE/`` and
``BELOW/``, images above and below the water, with ``ABOVE_LABELS.json`` and ``BELOW_LABELS.json`` beside them, whose
regions are outlines of dolphins. Some regions have two points: they outline nothing, and are left out.

The paper publishes no split, and which images the comparison of arXiv 2606.01947 tested on is not known but for the
proportion, 300 to 1500. The split here has that proportion and goes by the checksum of the file names.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from converting import CocoJson, converter_main, require_folder, split_names, write_coco

from peft_d2.data.images import image_size
from peft_d2.data.registration import read_json

logger = logging.getLogger(__name__)

_CURVE_POINTS = 64  # corners of the polygon that stands for a circle or an ellipse
_TEST_SHARE = 300 / 1800


def region_polygon(shape: Mapping[str, Any]) -> list[float]:
    """Flat polygon ``[x0, y0, x1, y1, ...]`` of a region's ``shape_attributes``.

    Polylines are closed; circles and ellipses (``theta`` in radians) become polygons of 64 corners.

    Raises:
        ValueError: a shape without an area (point) or an unknown one, or one that lacks a number.
    """
    kind = shape.get("name")
    try:
        if kind in ("polygon", "polyline"):
            xs, ys = shape["all_points_x"], shape["all_points_y"]
            if len(xs) != len(ys):
                raise ValueError(f"a region of shape {kind!r} has {len(xs)} x and {len(ys)} y coordinates.")
            return [float(v) for point in zip(xs, ys, strict=True) for v in point]
        if kind == "rect":
            x, y, w, h = (float(shape[key]) for key in ("x", "y", "width", "height"))
            return [x, y, x + w, y, x + w, y + h, x, y + h]
        if kind == "circle":
            return _curve(shape["cx"], shape["cy"], shape["r"], shape["r"], 0.0)
        if kind == "ellipse":
            return _curve(shape["cx"], shape["cy"], shape["rx"], shape["ry"], shape.get("theta", 0.0))
    except KeyError as error:
        raise ValueError(f"a region of shape {kind!r} lacks {error}.") from error
    raise ValueError(
        f"a region has the shape {kind!r}, which is no area. Expected polygon, polyline, rect, circle or ellipse."
    )


def _curve(cx: float, cy: float, rx: float, ry: float, theta: float) -> list[float]:
    flat = []
    for step in range(_CURVE_POINTS):
        angle = 2 * math.pi * step / _CURVE_POINTS
        u, v = rx * math.cos(angle), ry * math.sin(angle)
        flat += [cx + u * math.cos(theta) - v * math.sin(theta), cy + u * math.sin(theta) + v * math.cos(theta)]
    return flat


def read_via(path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Regions by file name of a VIA json: annotations or a whole project; lists (VIA 2) and dicts (VIA 1) of regions.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a VIA json, or lists a file twice.
    """
    data = read_json(path)
    entries = data.get("_via_img_metadata", data) if isinstance(data, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path}: not a VIA json. Expected an object of {{filename, size, regions}}.")
    found: dict[str, list[dict[str, Any]]] = {}
    for key, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
            raise ValueError(f"{path}: entry {key!r} has no filename. Is this a VIA json?")
        if entry["filename"] in found:
            raise ValueError(f"{path}: lists {entry['filename']!r} twice. Merge the two entries.")
        regions = entry.get("regions") or []
        found[entry["filename"]] = list(regions.values()) if isinstance(regions, dict) else list(regions)
    return found


def via_to_coco(
    coco: CocoJson, regions: Mapping[str, Sequence[Mapping[str, Any]]], images: Path, names: Sequence[str],
    prefix: str = "", category: Callable[[Mapping[str, Any]], int] = lambda region: 1,
) -> list[str]:  # fmt: skip
    """Add images and their regions to a COCO json.

    Args:
        coco: grows.
        regions: as :func:`read_via` gives them.
        images: the folder that the file names are relative to; the images' sizes are read.
        names: which images, in this order.
        category: category id of a region.

    Returns:
        One line for each region that is left out because it has fewer than three points.

    Raises:
        FileNotFoundError, ValueError: an image that is missing or broken; a region that is no area.
    """
    left_out = []
    for name in names:
        if not (images / name).is_file():
            raise FileNotFoundError(f"{images / name} is missing: the json has regions for it.")
        image_id = coco.add_image(name, image_size(images / name))
        for number, region in enumerate(regions[name]):
            try:
                polygon = region_polygon(region.get("shape_attributes") or {})
            except ValueError as error:
                raise ValueError(f"{images / name}, region {number}: {error}") from error
            if len(polygon) < 6:
                left_out.append(f"{name}: region {number} has {len(polygon) // 2} point(s) and is left out")
            else:
                coco.add(image_id, category(region), polygons=[polygon])
    return left_out


def convert_ndd20(source: str | Path, splits: str | Path | None = None) -> dict[str, int]:
    """Write ``annotations/{,above_,below_}{train,test}.json`` into the published folder.

    Args:
        source: the unpacked ``NDD20`` folder.
        splits: a json of ``{"train": [...], "test": [...]}`` with names like ``ABOVE/1.jpg``, instead of this split.

    Returns:
        The number of objects of each json.
    """
    source = require_folder(source, "ABOVE/, BELOW/, ABOVE_LABELS.json and BELOW_LABELS.json of NDD20")
    regions: dict[str, list[dict[str, Any]]] = {}
    chosen: dict[str, list[str]] = {"train": [], "test": []}
    for kind in ("ABOVE", "BELOW"):
        require_folder(source / kind, f"the images of {kind}_LABELS.json")
        found = {f"{kind}/{name}": r for name, r in read_via(source / f"{kind}_LABELS.json").items()}
        regions |= found
        for split, names in split_names(found, _TEST_SHARE).items():
            chosen[split] += names
    if splits is not None:
        chosen = split_names(regions, _TEST_SHARE, splits)
    counts: dict[str, int] = {}
    for split, names in chosen.items():
        for water in ("", "ABOVE", "BELOW"):
            coco = CocoJson([(1, "dolphin")])
            left_out = via_to_coco(coco, regions, source, [name for name in names if name.startswith(water)])
            for line in [] if water else left_out:
                logger.warning("%s", line)
            path = source / "annotations" / f"{water.lower()}{'_' if water else ''}{split}.json"
            counts[str(path)] = write_coco(path, coco.data)
    return counts


if __name__ == "__main__":
    text = 'json of {"train": ["ABOVE/1.jpg", ...], "test": [...]}, instead of the split by checksums'
    sys.exit(converter_main(__doc__, "NDD20", convert_ndd20, splits=(text, 0)))
