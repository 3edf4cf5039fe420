"""COCO's format: register and load a json, and write one (what the converters share)."""

from __future__ import annotations

import hashlib
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
from peft_d2.data.segmentation import mask_box, mask_to_compressed_rle
from peft_d2.data.shapes import polygon_area
from peft_d2.storage import atomic

logger = logging.getLogger(__name__)


class Category(NamedTuple):
    """A class of a json, and how many annotations it has."""

    id: int
    name: str
    objects: int


def read_categories(json_path: str | Path) -> list[Category]:
    """Categories of a COCO-format json by id: the order of the contiguous class indices.

    Raises:
        ValueError: not a COCO-format json, one without categories, or one that lists an id twice.
    """
    stat = os.stat(json_path)
    return list(_read_categories(str(json_path), stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=64)
def _read_categories(json_path: str, mtime_ns: int, size: int) -> tuple[Category, ...]:
    try:
        data = read_json(json_path)
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
    known: dict[str, Any] = {"json_file": json_path, "image_root": image_root, "evaluator_type": "coco"}
    if classes:
        known["thing_classes"] = list(classes)
    if contiguous is not None:
        known["thing_dataset_id_to_contiguous_id"] = dict(contiguous)
    MetadataCatalog.get(name).set(**known)


def load_coco(name: str, json_path: str, image_root: str, outside: bool = False) -> list[dict[str, Any]]:
    """Detectron2's records of a COCO-format set, by image id; those of a json without annotations have none.

    As Detectron2's own loader, but annotation ids are not looked at, and ids may be anything.

    Args:
        name: of the set, whose metadata get the classes if they are not known yet.
        json_path: of the json.
        image_root: the folder that its file names are relative to.
        outside: whether images may lie outside that folder.

    Raises:
        DatasetError: an image outside the folder, or an entry that cannot be used.
    """
    from detectron2.data import MetadataCatalog

    meta, categories = MetadataCatalog.get(name), read_categories(json_path)
    if not meta.get("thing_dataset_id_to_contiguous_id"):
        meta.thing_classes = [category.name for category in categories]
        meta.thing_dataset_id_to_contiguous_id = {category.id: i for i, category in enumerate(categories)}
    data, contiguous = read_json(json_path), meta.thing_dataset_id_to_contiguous_id
    _set_keypoints(meta, data["categories"])
    records: dict[Any, dict[str, Any]] = {}
    try:
        for image in data["images"]:
            path = path_inside(image_root, image["file_name"], outside)
            record = {"file_name": path, "image_id": image["id"], **{k: image[k] for k in ("height", "width")}}
            records[image["id"]] = record | ({"annotations": []} if "annotations" in data else {})
        for annotation in data.get("annotations", ()):
            if annotation["image_id"] in records:
                records[annotation["image_id"]]["annotations"].append(_object(annotation, contiguous))
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
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
        from pycocotools import mask as coco_mask

        segmentation = coco_mask.frPyObjects(segmentation, *segmentation["size"])
    if segmentation:
        found["segmentation"] = segmentation
    if annotation.get("keypoints"):  # pixel indices in the json, coordinates in training
        found["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(annotation["keypoints"])]
    return found


def _set_keypoints(meta: Any, categories: Sequence[Mapping[str, Any]]) -> None:
    """Let Detectron2 mirror keypoints whose names begin or end with left and right, as COCO's do."""
    names = next((list(c["keypoints"]) for c in categories if c.get("keypoints")), [])
    if not names or meta.get("keypoint_names"):
        return
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
        objects: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in data["images"]}
        for annotation in data.get("annotations", ()):
            objects[annotation["image_id"]].append({
                "bbox": annotation["bbox"], "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": annotation["category_id"] - 1, "segmentation": annotation["segmentation"],
            })  # fmt: skip
        records = []
        for image in sorted(data["images"], key=lambda entry: entry["id"]):
            record = {key: image[key] for key in ("height", "width")}
            record |= {key: image.get(key, []) for key in ("neg_category_ids", "not_exhaustive_category_ids")}
            path = path_inside(image_root, "/".join(image["coco_url"].split("/")[-2:]))
            records.append({**record, "file_name": path, "image_id": image["id"], "annotations": objects[image["id"]]})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{json_file}: not an LVIS json ({type(error).__name__}: {error}).") from error
    logger.info("%d images in %s.", len(records), json_file)
    return records


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

    def write(self, path: str | Path) -> int:
        """Write the json in one step and return the number of objects."""
        return write_coco(path, self.images, self.annotations, self.categories)


def write_coco(path: str | Path, images: list[Any], annotations: list[Any], categories: list[Any]) -> int:
    """Write a json in one step and return the number of annotations."""
    data = {"images": images, "annotations": annotations, "categories": categories}
    atomic.write_bytes(path, json.dumps(data).encode())
    return len(annotations)


def split_names(
    names: Iterable[str], share: float, splits: str | Path | None = None, first: str = "train", second: str = "test"
) -> dict[str, list[str]]:
    """Two splits of file names, by the names' checksums: the same wherever and whenever it is done.

    Args:
        names: of all images.
        share: of them that goes to the ``second`` split.
        splits: a json of ``{split: [name, ...]}`` to follow instead.

    Raises:
        ValueError: the json lists names that there are not, or none at all.
    """
    ordered = sorted(set(names))
    if splits is None:
        drawn = sorted(ordered, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        chosen = set(drawn[: round(share * len(drawn))])
        return {first: [n for n in ordered if n not in chosen], second: [n for n in ordered if n in chosen]}
    found = read_json(splits)
    if not isinstance(found, Mapping) or not all(isinstance(v, list) for v in found.values()):
        raise ValueError(f"{splits}: expected a json of the form {{{first!r}: [file name, ...], {second!r}: [...]}}.")
    missing = sorted({name for listed in found.values() for name in listed} - set(ordered))
    if missing:
        raise ValueError(f"{splits}: lists {len(missing)} images that are not there, {missing[0]!r} for one.")
    return {split: list(listed) for split, listed in found.items()}


def read_json(path: str | Path) -> Any:
    """The content of a json.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not json; an archive is named as such.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file.")
    content = Path(path).read_bytes()
    if content[:2] in (b"PK", b"\x1f\x8b"):
        raise ValueError(f"{path} is an archive. Unpack it first.")
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is not json ({error}).") from error


def require_folder(path: str | Path, holds: str) -> Path:
    """The folder, or an error that says what it has to hold.

    Raises:
        FileNotFoundError: no such folder; an archive of that name, or the one beside it, is named.
    """
    path = Path(path)
    if path.is_dir():
        return path
    beside = [path.with_name(path.name + ending) for ending in (".zip", ".tar", ".tar.gz", ".tgz", ".rar", ".7z")]
    packed = next((p for p in (path, *beside) if p.is_file()), None)
    found = f"{packed} is an archive: unpack it there" if packed else "it does not exist"
    raise FileNotFoundError(f"{path}: expected a folder with {holds}; {found}.")
