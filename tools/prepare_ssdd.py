#!/usr/bin/env python3
"""SSDD, ships in radar images: from the outlines of its PSeg version to COCO's format, in the published split.

python tools/prepare_ssdd.py                           # $DETECTRON2_DATASETS/Official-SSDD-OPEN, or datasets/...
python tools/prepare_ssdd.py --source Official-SSDD-OPEN

SSDD (Zhang et al. 2021, Remote Sensing 13(18)): ``Official-SSDD-OPEN/PSeg_SSDD/voc_style`` holds
``JPEGImages_{train,test}`` and ``Annotations_{train,test}``, VOC's xml with an outline ``<segm><point>x,y</point>...``
in each object. The split is the published one.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from converting import CocoJson, converter_main, require_folder, write_coco

from peft_d2.data.images import image_size


def convert_ssdd(source: str | Path) -> dict[str, int]:
    """Write ``annotations/{train,test}.json`` into the published folder ``Official-SSDD-OPEN``.

    Returns:
        The number of objects of each json.

    Raises:
        FileNotFoundError: a folder or an image is missing.
        ValueError: an xml that cannot be read, or an object without an outline.
    """
    source = require_folder(source, "PSeg_SSDD/voc_style of the official release of SSDD")
    folder = require_folder(source / "PSeg_SSDD" / "voc_style", "JPEGImages_* and Annotations_* of SSDD")
    counts = {}
    for split in ("train", "test"):
        images = require_folder(folder / f"JPEGImages_{split}", f"the {split} images of SSDD")
        annotations = require_folder(folder / f"Annotations_{split}", f"the {split} annotations of SSDD")
        coco = CocoJson([(1, "ship")])
        for path in sorted(annotations.glob("*.xml")):
            image = images / f"{path.stem}.jpg"
            if not image.is_file():
                raise FileNotFoundError(f"{image} is missing: {path} describes it.")
            image_id = coco.add_image(str(image.relative_to(source)), image_size(image))
            for polygon in _voc_polygons(path):
                coco.add(image_id, 1, polygons=[polygon])
        if not coco.data["images"]:
            raise FileNotFoundError(f"{annotations}: expected *.xml files, found none. Is this the official release?")
        target = source / "annotations" / f"{split}.json"
        counts[str(target)] = write_coco(target, coco.data)
    return counts


def _voc_polygons(path: Path) -> list[list[float]]:
    try:
        tree = ElementTree.parse(path)
        found = []
        for number, entry in enumerate(tree.getroot().iter("object")):
            points = [(point.text or "").split(",") for point in entry.findall("segm/point")]
            if len(points) < 3 or any(len(point) != 2 for point in points):
                raise ValueError(f"object {number} has no outline (<segm> of 3 or more <point>x,y</point>)")
            found.append([float(v) for point in points for v in point])
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path}: {error}. Expected PSeg_SSDD's xml.") from error
    return found


if __name__ == "__main__":
    sys.exit(converter_main(__doc__, "Official-SSDD-OPEN", convert_ssdd))
