#!/usr/bin/env python3
"""NWPU VHR-10, ten classes in aerial images: its masks' json split into train and val.

python tools/prepare_nwpu_vhr10.py                     # $DETECTRON2_DATASETS/NWPU VHR-10 dataset, or datasets/...
python tools/prepare_nwpu_vhr10.py --masks annotations.json
python tools/prepare_nwpu_vhr10.py --masks none        # the boxes of the original release, without masks

NWPU VHR-10 (Cheng et al. 2014): ``positive image set/001.jpg`` to ``650.jpg`` and ``ground truth/001.txt``, lines of
``(x1,y1),(x2,y2),class`` with classes from 1: boxes alone. The masks are a later work (2019), a json of COCO's format
over the same images, mostly found as ``annotations.json``. No split is published with either; ours takes a fifth of the
images, by checksums, as the lists in use do (520 and 130 images). Those who have such a pair of jsons put them at
``annotations/{train,val}.json`` and need no converter.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from converting import CocoJson, converter_main, require_folder, split_names, write_coco

from peft_d2.data.images import image_size
from peft_d2.data.registration import NWPU_VHR10_CLASSES, read_json

_VAL_SHARE = 130 / 650
_BOX = re.compile(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)\s*,\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)\s*,\s*(\d+)")


def convert_nwpu_vhr10(
    source: str | Path, masks: str | Path | None = None, splits: str | Path | None = None
) -> dict[str, int]:
    """Write ``annotations/{train,val}.json`` into the published folder ``NWPU VHR-10 dataset``.

    Args:
        source: the folder with ``positive image set``.
        masks: the json of the masks, ``annotations.json`` in the source when None; "none" takes the published boxes,
            without masks.
        splits: a json of ``{"train": [...], "val": [...]}`` with names like ``001.jpg``, instead of this split.

    Returns:
        The number of objects of each json.

    Raises:
        FileNotFoundError, ValueError: a file that is missing, or that is not as published.
    """
    source = require_folder(source, "'positive image set' and 'ground truth' of NWPU VHR-10")
    images = require_folder(source / "positive image set", "the 650 images of NWPU VHR-10 that have objects")
    if masks == "none":
        data = _read_boxes(source, images)
    else:
        path = source / "annotations.json" if masks is None else Path(masks)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: the json of the masks, which is published apart from the images. Give it with "
                "--masks, or --masks none for the boxes of 'ground truth' alone."
            )
        data = _read_masks(path, images)
    counts = {}
    chosen = split_names([i["file_name"] for i in data["images"]], _VAL_SHARE, splits, "train", "val")
    for split, names in chosen.items():
        wanted = set(names)
        kept = [i for i in data["images"] if i["file_name"] in wanted]
        ids = {i["id"] for i in kept}
        objects = [a for a in data["annotations"] if a["image_id"] in ids]
        target = source / "annotations" / f"{split}.json"
        counts[str(target)] = write_coco(
            target, {"images": kept, "annotations": objects, "categories": data["categories"]}
        )
    return counts


def _read_masks(path: Path, images: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict) or not {"images", "annotations", "categories"} <= data.keys():
        raise ValueError(f"{path}: not a COCO-format json. Expected the json of NWPU VHR-10's masks.")
    names = [category["name"].replace(" ", "_") for category in sorted(data["categories"], key=lambda c: c["id"])]
    if tuple(names) != NWPU_VHR10_CLASSES:
        raise ValueError(f"{path}: lists the classes {names}, expected {list(NWPU_VHR10_CLASSES)}.")
    missing = [i["file_name"] for i in data["images"] if not (images / i["file_name"]).is_file()]
    if missing:
        raise FileNotFoundError(f"{images}: {len(missing)} images of {path} are not there, {missing[0]!r} for one.")
    return data


def _read_boxes(source: Path, images: Path) -> dict[str, Any]:
    texts = require_folder(source / "ground truth", "the text files of NWPU VHR-10")
    coco = CocoJson(enumerate(NWPU_VHR10_CLASSES, 1))
    for path in sorted(images.glob("*.jpg")):
        image_id = coco.add_image(path.name, image_size(path))
        text = texts / f"{path.stem}.txt"
        if not text.is_file():
            raise FileNotFoundError(f"{text} is missing: {path.name} has no boxes.")
        for number, line in enumerate(text.read_text().splitlines(), 1):
            if not line.strip():
                continue
            found = _BOX.match(line.strip())
            if not found or not 1 <= int(found[5]) <= len(NWPU_VHR10_CLASSES):
                raise ValueError(
                    f"{text}, line {number}: {line!r} is not (x1,y1),(x2,y2),class with a class of 1 to 10."
                )
            x1, y1, x2, y2, category = map(int, found.groups())
            coco.add(image_id, category, box=[x1, y1, x2 - x1, y2 - y1])
    return coco.data


if __name__ == "__main__":
    code = converter_main(
        __doc__,
        "NWPU VHR-10 dataset",
        convert_nwpu_vhr10,
        masks=("json of the masks; default annotations.json in the source; none: boxes alone", 0),
        splits=('json of {"train": ["001.jpg", ...], "val": [...]}, instead of the split by checksums', 0),
    )
    sys.exit(code)
