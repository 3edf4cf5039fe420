#!/usr/bin/env python3
"""ADE20K's scene parsing challenge: semantic labels, instances and panoptic labels as Mask2Former's configs read them.

python tools/prepare_ade20k.py --workers 8             # $DETECTRON2_DATASETS/ADEChallengeData2016, or datasets/...

Instances and panoptic labels need annotations_instance, which is published apart (ChallengeData2017).

The results are those of the scripts that Detectron2 and Mask2Former name for it: the same files, names, classes and
pixels. Numbers that carry no meaning differ: the ids of panoptic segments count from 1 in each image.

ADE20K (Zhou et al. 2017) is published as ``ADEChallengeData2016``: ``images/{training,validation}``, ``annotations``
(the 150 classes from 1, 0 is unlabelled) and, apart, ``annotations_instance`` (red: the 100 instance classes from 1,
green: the number of the object in the image, 0 for none).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from converting import CocoJson, converter_main, in_parallel, read_label_image, require_folder, write_coco
from PIL import Image

from peft_d2.data.images import image_size
from peft_d2.data.registration import ade20k_instance_categories, panoptic_categories
from peft_d2.data.segmentation import mask_box
from peft_d2.storage import disk

_ADE20K_SPLITS = {"train": "training", "val": "validation"}
_IMAGES = ("*.png",)  # what a converted folder consists of, and may therefore be replaced with


def convert_ade20k(source: str | Path, workers: int = 1) -> dict[str, int]:
    """Write ``annotations_detectron2``, ``ade20k_instance_*.json`` and ``ade20k_panoptic_*`` into the published folder.

    Args:
        source: the folder ``ADEChallengeData2016``. Without ``annotations_instance`` only the first is written.
        workers: processes.

    Returns:
        How many images or objects each of them has.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: a label image of another kind or size.
    """
    source = require_folder(source, "images/ and annotations/ of ADE20K's scene parsing challenge (2016)")
    counts = {}
    for split, long in _ADE20K_SPLITS.items():
        images = sorted(require_folder(source / "images" / long, "the images of ADE20K").glob("*.jpg"))
        if not images:
            raise FileNotFoundError(f"{source / 'images' / long}: expected *.jpg files, found none.")
        labels = require_folder(source / "annotations" / long, "the semantic labels of ADE20K")
        with disk.folder(source / "annotations_detectron2" / long, _IMAGES) as folder:
            in_parallel(partial(_shift_labels, labels, folder), [image.stem for image in images], workers)
        counts[str(source / "annotations_detectron2" / long)] = len(images)
        if (source / "annotations_instance").is_dir():
            instances = require_folder(source / "annotations_instance" / long, "the instance labels of ADE20K")
            counts |= _ade20k_instances(source, split, images, instances, workers)
            counts |= _ade20k_panoptic(source, split, images, labels, instances, workers)
    return counts


def _shift_labels(labels: Path, target: Path, stem: str) -> None:
    """Unlabelled becomes 255, and the classes begin with 0."""
    shifted = read_label_image(labels / f"{stem}.png") - np.uint8(1)
    Image.fromarray(shifted).save(target / f"{stem}.png")


def _ade20k_instances(
    source: Path, split: str, images: Sequence[Path], instances: Path, workers: int
) -> dict[str, int]:
    classes = ade20k_instance_categories()
    coco = CocoJson(classes)
    for image, objects in zip(images, in_parallel(partial(_read_objects, instances), images, workers), strict=True):
        image_id = coco.add_image(image.name, image_size(image), image.stem)
        for number, mask in objects:
            coco.add(image_id, classes[number - 1][0], mask=mask)
    path = source / f"ade20k_instance_{split}.json"
    return {str(path): write_coco(path, coco.data)}


def _read_objects(instances: Path, image: Path) -> list[tuple[int, np.ndarray]]:
    """(instance class from 1, mask) of each object of an image."""
    path = instances / f"{image.stem}.png"
    labels = read_label_image(path, channels=3)
    width, height = image_size(image)
    if labels.shape[:2] != (height, width):
        raise ValueError(f"{path}: {labels.shape[1]} x {labels.shape[0]} px, but the image is {width} x {height}.")
    found = []
    for number in np.unique(labels[..., 1][labels[..., 1] > 0]).tolist():
        mask = labels[..., 1] == number
        classes = np.unique(labels[..., 0][mask]).tolist()
        if len(classes) != 1 or not 1 <= classes[0] <= 100:
            raise ValueError(f"{path}: object {number} is of the classes {classes}, expected one of 1 to 100.")
        found.append((classes[0], mask))
    return found


def _ade20k_panoptic(
    source: Path, split: str, images: Sequence[Path], labels: Path, instances: Path, workers: int
) -> dict[str, int]:
    name = f"ade20k_panoptic_{split}"
    categories = panoptic_categories(name)
    stuff = [category["id"] for category in categories if not category["isthing"]]
    things = [number for number, _ in ade20k_instance_categories()]
    with disk.folder(source / name, _IMAGES) as folder:
        work = partial(_panoptic_image, labels, instances, folder, stuff, things)
        segments = in_parallel(work, images, workers)
    data: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    for image, found in zip(images, segments, strict=True):
        width, height = image_size(image)
        data["images"].append({"id": image.stem, "file_name": image.name, "width": width, "height": height})
        entry = {"image_id": image.stem, "file_name": f"{image.stem}.png", "segments_info": found}
        data["annotations"].append(entry)
    disk.write_bytes(source / f"{name}.json", json.dumps(data).encode())
    return {str(source / f"{name}.json"): len(images)}


def _panoptic_image(
    labels: Path, instances: Path, target: Path, stuff: Sequence[int], things: Sequence[int], image: Path
) -> list[dict[str, Any]]:
    """Stuff of the semantic labels, and the objects over it: what they cover wholly is no segment."""
    semantic = read_label_image(labels / f"{image.stem}.png").astype(int) - 1
    ids = np.zeros(semantic.shape, dtype=np.int64)
    classes: list[int] = []
    for category in np.unique(semantic).tolist():
        if category in stuff:
            classes.append(category)
            ids[semantic == category] = len(classes)
    for number, mask in _read_objects(instances, image):
        classes.append(things[number - 1])
        ids[mask] = len(classes)
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    Image.fromarray(colours).save(target / f"{image.stem}.png")
    segments = []
    for number in np.unique(ids[ids > 0]).tolist():
        mask = ids == number
        segments.append({
            "id": number, "category_id": classes[number - 1], "area": int(mask.sum()),
            "bbox": [int(v) for v in mask_box(mask)], "iscrowd": 0,
        })  # fmt: skip
    return segments


if __name__ == "__main__":
    sys.exit(converter_main(__doc__, "ADEChallengeData2016", convert_ade20k, workers=("processes", 1)))
