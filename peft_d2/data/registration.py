"""Data sets in Detectron2's catalogs, and their records: one's own in COCO's format, and published ones.

Published ones lie below the folder that ``DETECTRON2_DATASETS`` names (else ``./datasets``), in the layout in which
their authors publish them. A name is registered when a config first uses it: ``builtin.json`` lists names, files,
classes, and the tool that prepares what is not published (``tools/prepare_*.py``). COCO, LVIS, Cityscapes
(``tools/prepare_cityscapes.py``), Pascal VOC and ``ade20k_sem_seg_{train,val}`` are registered by Detectron2. Names
that Mask2Former's package has as well mean the same there, and stay as they are if it came first.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from peft_d2.compat import lend_cityscapesscripts
from peft_d2.data.images import DatasetError, check_input, path_inside
from peft_d2.data.segmentation import run_lengths
from peft_d2.peft.errors import alike
from peft_d2.storage import foreign

logger = logging.getLogger(__name__)


class Category(NamedTuple):
    """A class of a json, and how many annotations it has."""

    id: int
    name: str
    objects: int


def read_json(path: str | Path, encoding: str | None = None) -> Any:
    """The content of a json; without an ``encoding`` it is recognised.

    Raises:
        FileNotFoundError: no such file.
        DatasetError: it cannot be read, or is not json; an archive, a web page and the like are named as such.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file.")
    try:
        content = Path(path).read_bytes()
        return json.loads(content.decode(encoding) if encoding else content)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        kind = "an archive (unpack it first)" if content[:2] == b"PK" else foreign.kind_of(content)
        raise DatasetError(f"{path} is {kind or f'not json ({error})'}.") from error


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


class PublishedSet(NamedTuple):
    """A published set: of instances in COCO's format, or with panoptic labels.

    ``paths``, below the folder of all data sets, by their keys in Detectron2's metadata; ``classes`` in the order of
    their ids, none where only the json knows them; ``tool`` writes what is not published, "" where all is.
    """

    paths: Mapping[str, str]
    classes: tuple[str, ...] = ()
    kind: str = "coco"  # Detectron2's evaluator_type
    tool: str = ""


_TABLE = json.loads(Path(__file__).with_name("builtin.json").read_text(encoding="utf-8"))
_ADE20K_STUFF = frozenset(_TABLE["ade20k"]["stuff"])
_LONG = {"train": "training", "val": "validation", "test": "testing"}
_PUBLISHED: dict[str, PublishedSet] = {}
for _row in _TABLE["sets"]:
    for _split in _row["splits"]:
        _fill = partial(str.format, split=_split, long=_LONG[_split])
        _paths = {key: _fill(path) for key, path in _row["paths"].items()}
        _PUBLISHED[_fill(_row["name"])] = PublishedSet(
            _paths, tuple(_row.get("classes", ())), _row.get("kind", "coco"), _row.get("tool", "")
        )
COCO_SETS = {name: entry for name, entry in _PUBLISHED.items() if entry.kind == "coco"}
NWPU_VHR10_CLASSES = COCO_SETS["nwpu_vhr10_train"].classes
NAMES = tuple(_PUBLISHED)
_LVIS = tuple(f"lvis_{version}_{split}" for version in ("v0.5", "v1") for split in ("train", "val"))
_KEYS = ("NAME", "JSON", "IMAGES")
_NAME = re.compile(r"[^\s/\\.\-][^\s/\\]*")


def register_from_config(cfg: Any) -> list[str]:
    """Register every entry of ``DATASETS.REGISTER``, and what the config uses of the published sets.

    What is registered already is left alone.

    Returns:
        The names of ``DATASETS.REGISTER``, in the order of the config.

    Raises:
        ValueError: an entry with a missing, empty or unknown key, a name that cannot name a folder or stands for
            something else already, or a json that is not in COCO format.
        FileNotFoundError: the json or the image folder does not exist.
    """
    check_input(cfg)
    names = []
    for entry in cfg.DATASETS.get("REGISTER", []):
        _check_entry(entry)
        outside = cfg.DATASETS.get("ALLOW_FILES_OUTSIDE", False)
        register_coco(entry["NAME"], entry["JSON"], entry["IMAGES"], outside)
        names.append(entry["NAME"])
    register_builtin([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    return names


def register_coco(name: str, json_path: str | Path, image_root: str | Path, outside: bool = False) -> None:
    """Register one COCO-format set, polygons and run lengths alike; class names come from the json.

    ``outside``: whether its images may lie outside ``image_root``.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    json_path, image_root = (os.path.abspath(os.path.expanduser(path)) for path in (json_path, image_root))
    for there, what in (
        (os.path.isfile(json_path), f"JSON {json_path!r} is no file. Give the path of its json."),
        (os.path.isdir(image_root), f"IMAGES {image_root!r} is no folder. Give the folder that the json's file_name "
                                    "entries are relative to."),
    ):  # fmt: skip
        if not there:
            raise FileNotFoundError(f"DATASETS.REGISTER: data set {name!r}: {what}")
    classes = _class_metadata(json_path)
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name).as_dict()
        if (known.get("json_file"), known.get("image_root")) != (json_path, image_root):
            raise ValueError(
                f"DATASETS.REGISTER: the name {name!r} is taken by another data set "
                f"(json {known.get('json_file')!r}, images {known.get('image_root')!r}). Choose another NAME."
            )
        loader = DatasetCatalog[name]
        is_ours = isinstance(loader, partial) and loader.func is load_coco
        if is_ours and any(known.get(key) != value for key, value in classes.items()):
            MetadataCatalog.remove(name)  # the json was edited since then, between two cells of a notebook say
        elif known.get("thing_classes"):
            DatasetCatalog[name] = partial(load_coco, name, json_path, image_root, outside)
            return
    _add_coco(name, json_path, image_root, classes, outside)


def _add_coco(name: str, json_path: str, image_root: str, classes: Mapping[str, Any], outside: bool = False) -> None:
    """Put a COCO-format set into Detectron2's catalogs; its files need not exist. ``classes``: metadata, if known."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    DatasetCatalog[name] = partial(load_coco, name, json_path, image_root, outside)
    try:
        MetadataCatalog.get(name).set(json_file=json_path, image_root=image_root, evaluator_type="coco", **classes)
    except AssertionError as error:  # somebody has set another value
        raise DatasetError(f"data set {name!r}: {' '.join(str(error).split())} Choose another name.") from error


def _class_metadata(json_path: str) -> dict[str, Any]:
    """The classes of a COCO-format json as Detectron2's metadata has them."""
    categories = read_categories(json_path)
    return {
        "thing_classes": [category.name for category in categories],
        "thing_dataset_id_to_contiguous_id": {category.id: i for i, category in enumerate(categories)},
    }


def require_registered(name: str) -> None:
    """Raise a ValueError with the nearest names where Detectron2 has no set of that name."""
    from detectron2.data import DatasetCatalog

    if name not in DatasetCatalog:
        raise ValueError(
            f"data set {name!r} is not registered (nearest names: {alike(name, DatasetCatalog)}). "
            "Add it to DATASETS.REGISTER as {NAME, JSON, IMAGES}."
        )


def _check_entry(entry: Any) -> None:
    """Refuse an entry of ``DATASETS.REGISTER`` that is not ``{NAME, JSON, IMAGES}``."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"DATASETS.REGISTER: expected {{NAME, JSON, IMAGES}}, got {entry!r}.")
    for key in entry.keys() - set(_KEYS):
        near = difflib.get_close_matches(str(key).upper(), _KEYS, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"DATASETS.REGISTER: unknown key {key!r}{hint}. Expected NAME, JSON and IMAGES.")
    for key in _KEYS:
        if not isinstance(entry.get(key), str) or not entry[key]:
            raise ValueError(f"DATASETS.REGISTER: {dict(entry)!r} lacks {key}. Expected NAME, JSON and IMAGES.")
    if not _NAME.fullmatch(entry["NAME"]):
        raise ValueError(
            f"DATASETS.REGISTER: NAME {entry['NAME']!r} would name a folder of results, too: expected no white space "
            "and no slash in it, and no dot or - at its beginning."
        )


def data_root() -> Path:
    """The folder of all published data sets, as Detectron2 finds it."""
    return Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def register_builtin(names: Iterable[str] | None = None) -> list[str]:
    """Register those of ``names`` that are built in and not registered yet; None: all that are not registered yet.

    No data has to be there: what is missing is told when the set is loaded, or checked.

    Returns:
        The names that were registered now.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    registered = []
    for name in NAMES if names is None else names:
        if name in _LVIS and name in DatasetCatalog and importlib.util.find_spec("lvis") is None:
            meta = MetadataCatalog.get(name)
            DatasetCatalog[name] = partial(load_lvis, meta.json_file, meta.image_root)
        elif name.startswith("cityscapes_"):
            lend_cityscapesscripts()
        elif name in NAMES and name not in DatasetCatalog:
            (_register_instances if name in COCO_SETS else _register_panoptic)(name)
            registered.append(name)
    return registered


def remedy(name: str) -> str:
    """Where the files of a built-in set have to lie and what writes them; "" for other sets."""
    if name not in NAMES:
        return ""
    where = f"below DETECTRON2_DATASETS, which is {str(data_root())!r}"
    if tool := _PUBLISHED[name].tool:
        return f"{tool} writes it from the published files {where}."
    return f"Unpack the published files {where}, so that {_PUBLISHED[name].paths['json_file']!r} is there."


def _register_instances(name: str) -> None:
    """Register a published set of instances; its classes are those of the json, or the expected ones without it."""
    entry = _PUBLISHED[name]
    json_path, images = (os.path.abspath(data_root() / entry.paths[key]) for key in ("json_file", "image_root"))
    expected = list(entry.classes)
    if os.path.isfile(json_path):
        classes = _class_metadata(json_path)
        if expected and classes["thing_classes"] != expected:
            logger.warning("data set %r: %s lists the classes %s, expected %s. The json's are used.",
                           name, json_path, classes["thing_classes"], expected)  # fmt: skip
    else:
        if name.startswith("ade20k"):
            expected = [label for _, label in ade20k_instance_categories()]
        classes = {"thing_classes": expected} if expected else {}
    _add_coco(name, json_path, images, classes)


def ade20k_instance_categories() -> list[tuple[int, str]]:
    """(semantic class from 0, name) of the 100 instance classes, in their order: the instance class k is the k-th."""
    from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES

    renamed = _TABLE["ade20k"]["renamed"]
    return [
        (number, renamed.get(str(number), names.split(",")[0].strip()))
        for number, names in enumerate(ADE20K_SEM_SEG_CATEGORIES)
        if number not in _ADE20K_STUFF
    ]


def panoptic_categories(name: str) -> list[dict[str, Any]]:
    """``{id, name, isthing}`` of a panoptic set, in the order of the classes."""
    from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES, COCO_CATEGORIES

    if name.startswith("ade20k"):
        return [
            {"id": number, "name": label, "isthing": int(number not in _ADE20K_STUFF)}
            for number, label in enumerate(ADE20K_SEM_SEG_CATEGORIES)
        ]
    return [{key: category[key] for key in ("id", "name", "isthing")} for category in COCO_CATEGORIES]


def _register_panoptic(name: str) -> None:
    """Register a published set with panoptic labels."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    categories, entry = panoptic_categories(name), _PUBLISHED[name]
    DatasetCatalog.register(name, partial(_load_panoptic, name))
    MetadataCatalog.get(name).set(
        **{key: str(data_root() / path) for key, path in entry.paths.items()},
        evaluator_type=entry.kind,
        ignore_label=255,
        label_divisor=1000,
        thing_classes=[category["name"] for category in categories if category["isthing"]],
        stuff_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(categories) if c["isthing"]},
        stuff_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(categories)},
    )


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
        meta.set(**_class_metadata(json_path))
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
    """The annotation of a record in Detectron2's form, made of one of a json."""
    from detectron2.structures import BoxMode

    found: dict[str, Any] = {key: annotation[key] for key in ("iscrowd", "bbox") if key in annotation}
    found |= {"bbox_mode": BoxMode.XYWH_ABS, "category_id": contiguous[annotation["category_id"]]}
    if segmentation := annotation.get("segmentation"):
        found["segmentation"] = run_lengths(segmentation, 0, 0) if isinstance(segmentation, dict) else segmentation
    if annotation.get("keypoints"):  # pixel indices in the json, coordinates in training
        found["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(annotation["keypoints"])]
    return found


def _set_keypoints(meta: Any, categories: Sequence[Mapping[str, Any]]) -> None:
    """Set the names of the keypoints, and which are exchanged by a flip: those with left and right in their names."""
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


def _load_panoptic(name: str) -> list[dict[str, Any]]:
    """Records with panoptic and semantic label images; a segment's class is its place among all classes."""
    from detectron2.data import MetadataCatalog

    meta = MetadataCatalog.get(name)
    for path in (meta.panoptic_json, meta.image_root, meta.panoptic_root, meta.sem_seg_root):
        if not os.path.exists(path):
            raise FileNotFoundError(f"data set {name!r}: {path} does not exist. {remedy(name)}")
    classes, things = meta.stuff_dataset_id_to_contiguous_id, meta.thing_dataset_id_to_contiguous_id
    records = []
    for annotation in read_json(meta.panoptic_json)["annotations"]:
        records.append({
            "file_name": path_inside(meta.image_root, os.path.splitext(annotation["file_name"])[0] + ".jpg"),
            "image_id": annotation["image_id"],
            "pan_seg_file_name": path_inside(meta.panoptic_root, annotation["file_name"]),
            "sem_seg_file_name": path_inside(meta.sem_seg_root, annotation["file_name"]),
            "segments_info": [
                {**s, "category_id": classes[s["category_id"]], "isthing": s["category_id"] in things}
                for s in annotation["segments_info"]
            ],
        })  # fmt: skip
    return records
