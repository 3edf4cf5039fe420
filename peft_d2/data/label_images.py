"""From label images, as ADE20K, COCO panoptic and Cityscapes are published, to what Detectron2's loaders read.

The results are those of the scripts that Detectron2 and Mask2Former name for it: the same files, names, classes and
pixels. Numbers that carry no meaning differ: the ids of panoptic segments count from 1 in each image.

ADE20K (Zhou et al. 2017) is published as ``ADEChallengeData2016``: ``images/{training,validation}``, ``annotations``
(the 150 classes from 1, 0 is unlabelled) and, apart, ``annotations_instance`` (red: the 100 instance classes from 1,
green: the number of the object in the image, 0 for none).
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from peft_d2.compat import require_cityscapes
from peft_d2.data.builtin import ade20k_instance_categories, panoptic_categories
from peft_d2.data.coco_json import CocoJson, read_json, require_folder
from peft_d2.data.images import image_size
from peft_d2.data.segmentation import mask_box
from peft_d2.storage import atomic

_ADE20K_SPLITS = {"train": "training", "val": "validation"}
_UNLABELLED = 255
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
        with atomic.folder(source / "annotations_detectron2" / long, _IMAGES) as folder:
            _in_parallel(partial(_shift_labels, labels, folder), [image.stem for image in images], workers)
        counts[str(source / "annotations_detectron2" / long)] = len(images)
        if (source / "annotations_instance").is_dir():
            instances = require_folder(source / "annotations_instance" / long, "the instance labels of ADE20K")
            counts |= _ade20k_instances(source, split, images, instances, workers)
            counts |= _ade20k_panoptic(source, split, images, labels, instances, workers)
    return counts


def _shift_labels(labels: Path, target: Path, stem: str) -> None:
    """Unlabelled becomes 255, and the classes begin with 0."""
    shifted = _read_labels(labels / f"{stem}.png") - np.uint8(1)
    Image.fromarray(shifted).save(target / f"{stem}.png")


def _ade20k_instances(
    source: Path, split: str, images: Sequence[Path], instances: Path, workers: int
) -> dict[str, int]:
    classes = ade20k_instance_categories()
    coco = CocoJson(classes)
    for image, objects in zip(images, _in_parallel(partial(_read_objects, instances), images, workers), strict=True):
        image_id = coco.add_image(image.name, image_size(image), image.stem)
        for number, mask in objects:
            coco.add_mask(image_id, classes[number - 1][0], mask)
    path = source / f"ade20k_instance_{split}.json"
    return {str(path): coco.write(path)}


def _read_objects(instances: Path, image: Path) -> list[tuple[int, np.ndarray]]:
    """(instance class from 1, mask) of each object of an image."""
    path = instances / f"{image.stem}.png"
    labels = _read_labels(path, channels=3)
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
    with atomic.folder(source / name, _IMAGES) as folder:
        work = partial(_panoptic_image, labels, instances, folder, stuff, things)
        segments = _in_parallel(work, images, workers)
    data: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    for image, found in zip(images, segments, strict=True):
        width, height = image_size(image)
        data["images"].append({"id": image.stem, "file_name": image.name, "width": width, "height": height})
        entry = {"image_id": image.stem, "file_name": f"{image.stem}.png", "segments_info": found}
        data["annotations"].append(entry)
    atomic.write_bytes(source / f"{name}.json", json.dumps(data).encode())
    return {str(source / f"{name}.json"): len(images)}


def _panoptic_image(
    labels: Path, instances: Path, target: Path, stuff: Sequence[int], things: Sequence[int], image: Path
) -> list[dict[str, Any]]:
    """Stuff of the semantic labels, and the objects over it: what they cover wholly is no segment."""
    semantic = _read_labels(labels / f"{image.stem}.png").astype(int) - 1
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


def convert_coco_panoptic(source: str | Path, workers: int = 1) -> dict[str, int]:
    """Write ``panoptic_semseg_{train,val}2017``, the classes of the panoptic images, into the folder ``coco``.

    Returns:
        How many images each has; splits whose json is not there are left out.

    Raises:
        FileNotFoundError: neither split is there, or its images are not.
    """
    source = require_folder(source, "annotations/panoptic_*2017.json and panoptic_*2017/ of COCO")
    places = {category["id"]: i for i, category in enumerate(panoptic_categories("coco"))}
    counts = {}
    for split in ("train", "val"):
        path = source / "annotations" / f"panoptic_{split}2017.json"
        if not path.is_file():
            continue
        images = require_folder(source / f"panoptic_{split}2017", f"the images of {path.name}, unpacked")
        annotations = read_json(path)["annotations"]
        with atomic.folder(source / f"panoptic_semseg_{split}2017", _IMAGES) as folder:
            _in_parallel(partial(_panoptic_classes, images, folder, places), annotations, workers)
        counts[str(source / f"panoptic_semseg_{split}2017")] = len(annotations)
    if not counts:
        raise FileNotFoundError(f"{source / 'annotations'}: expected panoptic_train2017.json or panoptic_val2017.json.")
    return counts


def _panoptic_classes(images: Path, target: Path, places: dict[int, int], annotation: dict[str, Any]) -> None:
    colours = _read_labels(images / annotation["file_name"], channels=3).astype(np.int64)
    ids = colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
    classes = np.full(ids.shape, _UNLABELLED, dtype=np.uint8)
    for segment in annotation["segments_info"]:
        classes[ids == segment["id"]] = places[segment["category_id"]]
    Image.fromarray(classes).save(target / annotation["file_name"])


def convert_cityscapes(source: str | Path, workers: int = 1) -> dict[str, int]:
    """Write ``*_gtFine_labelTrainIds.png`` and ``cityscapes_panoptic_{train,val}`` into ``gtFine``.

    Both are drawn by cityscapesscripts, the package of the data set's authors.

    Returns:
        How many label images and panoptic annotations each split has.

    Raises:
        ModuleNotFoundError: the package cityscapesscripts is not installed.
        FileNotFoundError: a folder is missing or empty.
    """
    require_cityscapes()
    panoptic = importlib.import_module("cityscapesscripts.preparation.createPanopticImgs")
    source = require_folder(source, "leftImg8bit/ and gtFine/ of Cityscapes")
    truth = require_folder(source / "gtFine", "train/, val/ and test/ of gtFine_trainvaltest.zip")
    counts = {}
    for split in ("train", "val"):
        polygons = sorted(require_folder(truth / split, "a folder for each city").glob("*/*_gtFine_polygons.json"))
        if not polygons:
            raise FileNotFoundError(f"{truth / split}: expected <city>/*_gtFine_polygons.json, found none.")
        _in_parallel(_train_ids, polygons, workers)
        counts[f"{truth / split}/*/*_gtFine_labelTrainIds.png"] = len(polygons)
        name = f"cityscapes_panoptic_{split}"
        with tempfile.TemporaryDirectory(dir=truth, prefix=".panoptic-") as work:
            panoptic.convert2panoptic(str(truth), work, False, [split])
            with atomic.folder(truth / name, _IMAGES) as images:
                for path in Path(work, name).iterdir():
                    os.replace(path, images / path.name)
            with atomic.file(truth / f"{name}.json") as annotations:
                os.replace(Path(work, f"{name}.json"), annotations)
        counts[str(truth / f"{name}.json")] = len(list((truth / name).glob("*.png")))
    return counts


def _train_ids(polygons: Path) -> None:
    drawing = importlib.import_module("cityscapesscripts.preparation.json2labelImg")
    annotation = drawing.Annotation()
    annotation.fromJsonFile(str(polygons))
    with atomic.file(str(polygons).replace("_polygons.json", "_labelTrainIds.png")) as temporary:
        drawing.createLabelImage(annotation, "trainIds").save(temporary, format="PNG")


def _in_parallel(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> list[Any]:
    items = list(items)
    if workers <= 1:
        return [function(item) for item in items]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(function, items, chunksize=16))


def _read_labels(path: Path, channels: int = 1) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 label image.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it has another number of channels or bits.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Unpack the published archive again.")
    with Image.open(path) as opened:
        labels = np.asarray(opened)
    if labels.dtype != np.uint8 or labels.ndim != (2 if channels == 1 else 3):
        raise ValueError(
            f"{path}: a label image of {labels.dtype} {labels.shape}, expected 8 bits, {channels} channel(s)."
        )
    return labels[..., :3] if channels == 3 else labels
