"""Jsons in COCO's and in LVIS's format, and Detectron2's records of them."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_d2.data.images import DatasetError, path_inside
from peft_d2.data.segmentation import mask_box, mask_to_compressed_rle, polygon_area, run_lengths
from peft_d2.storage import atomic, foreign

logger = logging.getLogger(__name__)


class Category(NamedTuple):
    """A class of a json, and how many annotations it has."""

    id: int
    name: str
    objects: int


def read_json(path: str | Path) -> Any:
    """The content of a json.

    Raises:
        FileNotFoundError: no such file.
        DatasetError: it cannot be read, or is not json; an archive, a web page and the like are named as such.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file.")
    try:
        content = Path(path).read_bytes()
        return json.loads(content)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is {json_defect(content, error)}.") from error


def json_defect(content: bytes, error: Exception) -> str:
    """What a file is that is no json, from its bytes and what Python says of them."""
    kind = "an archive (unpack it first)" if content[:2] == b"PK" else foreign.kind_of(content)
    return kind or f"not json ({error})"


def read_categories(json_path: str | Path) -> list[Category]:
    """Categories of a COCO-format json by id: the order of the contiguous class indices.

    Raises:
        ValueError: not a COCO-format json, one without categories, or one that lists an id twice.
    """
    stat = os.stat(json_path)
    return list(_read_categories(str(json_path), stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=64)
def _read_categories(json_path: str, mtime_ns: int, size: int) -> tuple[Category, ...]:
    data = read_json(json_path)
    try:
        objects = Counter(a.get("category_id") for a in data.get("annotations") or () if isinstance(a, dict))
        rows = sorted(Category(int(c["id"]), str(c["name"]), objects[c["id"]]) for c in data["categories"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{json_path}: not a COCO-format json ({type(error).__name__}: {error}). "
            "Expected an object with images, annotations and categories: [{id, name}, ...]."
        ) from error
    ids = [row.id for row in rows]
    if not rows:
        raise ValueError(f"{json_path}: lists no categories. Expected at least one {{id, name}}.")
    if len(set(ids)) < len(ids):
        raise ValueError(f"{json_path}: lists a category id twice: {ids}.")
    return tuple(rows)


class CocoJson:
    """A COCO-format json that grows by images and objects, whose ids count from 1."""

    def __init__(self, categories: Iterable[tuple[int, str]]) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.categories = [{"id": number, "name": name} for number, name in categories]

    def add_image(self, file_name: str, size: tuple[int, int], image_id: int | str | None = None) -> int | str:
        """Add an image of ``size`` (width, height) and return its id."""
        image_id = len(self.images) + 1 if image_id is None else image_id
        self.images.append({"id": image_id, "file_name": file_name, "width": size[0], "height": size[1]})
        return image_id

    def add_polygons(self, image_id: int | str, category_id: int, polygons: Sequence[Sequence[float]]) -> None:
        """Add an object of flat polygons ``[x0, y0, x1, y1, ...]``; its area is the sum of theirs."""
        xs = [x for polygon in polygons for x in polygon[::2]]
        ys = [y for polygon in polygons for y in polygon[1::2]]
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        area = sum(abs(polygon_area(polygon)) for polygon in polygons)
        self._add(image_id, category_id, box, area, segmentation=[list(polygon) for polygon in polygons])

    def add_mask(
        self, image_id: int | str, category_id: int, mask: np.ndarray, segmentation: Any = None, **more: Any
    ) -> None:
        """Add an object of an (H, W) mask, as compressed run lengths unless its ``segmentation`` is given."""
        form = mask_to_compressed_rle(mask) if segmentation is None else segmentation
        self._add(image_id, category_id, mask_box(mask), int(mask.sum()), segmentation=form, **more)

    def add_box(self, image_id: int | str, category_id: int, box: Sequence[float]) -> None:
        """Add an object without a mask; ``box`` is [x, y, width, height]."""
        self._add(image_id, category_id, list(box), box[2] * box[3])

    def _add(self, image_id: int | str, category_id: int, box: list[float], area: float, **more: Any) -> None:
        number = len(self.annotations) + 1
        self.annotations.append({
            "id": number, "image_id": image_id, "category_id": category_id, "bbox": box, "area": area, "iscrowd": 0,
            **more,
        })  # fmt: skip

    def content(self) -> dict[str, Any]:
        """What the json holds."""
        return {"images": self.images, "annotations": self.annotations, "categories": self.categories}

    def write(self, path: str | Path) -> int:
        """Write the json in one step and return the number of objects."""
        return write_coco(path, self.images, self.annotations, self.categories)


def write_coco(path: str | Path, images: list[Any], annotations: list[Any], categories: list[Any]) -> int:
    """Write a json in one step and return the number of annotations."""
    data = {"images": images, "annotations": annotations, "categories": categories}
    atomic.write_bytes(path, json.dumps(data).encode())
    return len(annotations)


def add_coco(
    name: str, json_path: str, image_root: str, classes: Sequence[str], contiguous: Mapping[int, int] | None,
    outside: bool = False,
) -> None:  # fmt: skip
    """Put a COCO-format set into Detectron2's catalogs, whether or not its files exist.

    Args:
        name: not registered yet.
        json_path, image_root: absolute.
        classes: their names, none where they are not known yet.
        contiguous: index of each category id, None where they are not known yet.
        outside: whether images may lie outside ``image_root``.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    DatasetCatalog[name] = partial(load_coco, name, json_path, image_root, outside)
    known: dict[str, Any] = {"thing_classes": list(classes)} if classes else {}
    known |= {"thing_dataset_id_to_contiguous_id": dict(contiguous)} if contiguous is not None else {}
    MetadataCatalog.get(name).set(json_file=json_path, image_root=image_root, evaluator_type="coco", **known)


def load_coco(name: str, json_path: str, image_root: str, outside: bool = False) -> list[dict[str, Any]]:
    """Detectron2's records of a COCO-format set, by image id; those of a json without annotations have none.

    As Detectron2's own loader, but annotation ids are not looked at, and ids may be anything. The set's metadata get
    the classes if they are not known yet.

    Raises:
        DatasetError: an image outside the folder ``image_root``, unless ``outside``; an entry that cannot be used.
    """
    from detectron2.data import MetadataCatalog

    meta = MetadataCatalog.get(name)
    if not meta.get("thing_dataset_id_to_contiguous_id"):
        categories = read_categories(json_path)
        meta.thing_classes = [category.name for category in categories]
        meta.thing_dataset_id_to_contiguous_id = {category.id: i for i, category in enumerate(categories)}
    data = read_json(json_path)
    records: dict[Any, dict[str, Any]] = {}
    try:
        _set_keypoints(meta, data["categories"])
        for image in data["images"]:
            record = {"file_name": path_inside(image_root, image["file_name"], outside), "image_id": image["id"]}
            record |= {"height": image["height"], "width": image["width"]}
            records[image["id"]] = record | ({"annotations": []} if "annotations" in data else {})
        for annotation in data.get("annotations", ()):
            if annotation["image_id"] in records:
                thing = _object(annotation, meta.thing_dataset_id_to_contiguous_id)
                records[annotation["image_id"]]["annotations"].append(thing)
    except (KeyError, TypeError) as error:
        raise DatasetError(
            f"{json_path}: an entry lacks {error} or has another form. tools/check_dataset.py says which."
        ) from error
    logger.info("%d images in %s.", len(records), json_path)
    numbered = all(isinstance(image, int) for image in records)
    return [records[image] for image in sorted(records, key=None if numbered else str)]


def _object(annotation: dict[str, Any], contiguous: Mapping[int, int]) -> dict[str, Any]:
    from detectron2.structures import BoxMode

    found: dict[str, Any] = {key: annotation[key] for key in ("iscrowd", "bbox") if key in annotation}
    found |= {"bbox_mode": BoxMode.XYWH_ABS, "category_id": contiguous[annotation["category_id"]]}
    if segmentation := annotation.get("segmentation"):
        found["segmentation"] = run_lengths(segmentation, 0, 0) if isinstance(segmentation, dict) else segmentation
    if annotation.get("keypoints"):  # pixel indices in the json, coordinates in training
        found["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(annotation["keypoints"])]
    return found


def _set_keypoints(meta: Any, categories: Sequence[Mapping[str, Any]]) -> None:
    """Let Detectron2 mirror keypoints whose names begin or end with left and right, as COCO's do."""
    names = next((list(c["keypoints"]) for c in categories if c.get("keypoints")), [])
    if names and not meta.get("keypoint_names"):
        swapped = {name: name.replace("left", "right") for name in names if "left" in name}
        meta.keypoint_names = names
        meta.keypoint_flip_map = [(left, right) for left, right in swapped.items() if right in names]


def load_lvis(json_file: str, image_root: str) -> list[dict[str, Any]]:
    """Detectron2's records of an LVIS json, with ``neg_category_ids`` and ``not_exhaustive_category_ids``.

    Stands in for Detectron2's loader, which needs the package lvis, which lags behind NumPy and OpenCV.

    Args:
        json_file: of LVIS v0.5 or v1, whose category ids count from 1 without gaps.
        image_root: the folder that holds ``train2017`` and its like, which ``coco_url`` names.

    Raises:
        FileNotFoundError, ValueError: no such file, or not an LVIS json.
    """
    from detectron2.structures import BoxMode

    data = read_json(json_file)
    try:
        records: dict[Any, dict[str, Any]] = {}
        for image in sorted(data["images"], key=lambda entry: entry["id"]):
            record = {"height": image["height"], "width": image["width"], "image_id": image["id"], "annotations": []}
            record |= {key: image.get(key, []) for key in ("neg_category_ids", "not_exhaustive_category_ids")}
            record["file_name"] = path_inside(image_root, "/".join(image["coco_url"].split("/")[-2:]))
            records[image["id"]] = record
        for annotation in data.get("annotations", ()):
            records[annotation["image_id"]]["annotations"].append({
                "bbox": annotation["bbox"], "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": annotation["category_id"] - 1, "segmentation": annotation["segmentation"],
            })  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(f"{json_file}: not an LVIS json ({type(error).__name__}: {error}).") from error
    logger.info("%d images in %s.", len(records), json_file)
    return list(records.values())
