"""Data sets in Detectron2's catalogs: one's own in COCO's format, which the config names, and published ones.

Published ones lie below the folder that ``DETECTRON2_DATASETS`` names (else ``./datasets``), in the layout in which
their authors publish them. A name is registered when a config first uses it: ``builtin.json`` lists names, files,
classes, and the tool that prepares what is not published (``tools/prepare_*.py``). COCO, LVIS, Cityscapes
(``tools/prepare_cityscapes.py``), Pascal VOC and ``ade20k_sem_seg_{train,val}`` are registered by Detectron2. Names
that Mask2Former's package has as well mean the same there, and stay as they are if it came first.

What could not be verified: WIXray's class names, so they are read from its json (the paper gives their number, 12); and
which images of NDD20 the papers tested on, so the split is one of this project, see ``tools/prepare_ndd20.py``.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from peft_d2.compat import lend_cityscapesscripts
from peft_d2.data.images import check_input, path_inside
from peft_d2.data.records import add_coco, load_coco, load_lvis, read_categories, read_json

logger = logging.getLogger(__name__)


class CocoSet(NamedTuple):
    """A set of instances in COCO's format: paths below the folder of all data sets, classes in the order of their ids.

    ``classes`` is empty where only the json knows them; ``tool`` writes the json, "" where it is published.
    """

    json: str
    images: str
    classes: tuple[str, ...]
    tool: str


class PanopticSet(NamedTuple):
    """A set with panoptic labels: paths by their keys in Detectron2's metadata, its ``evaluator_type``, the tool."""

    paths: Mapping[str, str]
    kind: str
    tool: str


_TABLE = json.loads(Path(__file__).with_name("builtin.json").read_text(encoding="utf-8"))
_ADE20K_STUFF = frozenset(_TABLE["ade20k"]["stuff"])
_LONG = {"train": "training", "val": "validation", "test": "testing"}
COCO_SETS: dict[str, CocoSet] = {}
_PANOPTIC: dict[str, PanopticSet] = {}
for _row in _TABLE["instances"] + _TABLE["panoptic"]:
    for _split in _row["splits"]:
        _fill = partial(str.format, split=_split, long=_LONG[_split])
        if "paths" in _row:
            _paths = {key: _fill(path) for key, path in _row["paths"].items()}
            _PANOPTIC[_fill(_row["name"])] = PanopticSet(_paths, _row["kind"], _row["tool"])
        else:
            COCO_SETS[_fill(_row["name"])] = CocoSet(
                _fill(_row["json"]), _fill(_row["images"]), tuple(_row["classes"]), _row.get("tool", "")
            )
NWPU_VHR10_CLASSES = COCO_SETS["nwpu_vhr10_train"].classes
NAMES = (*COCO_SETS, *_PANOPTIC)
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
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name).as_dict()
        if (known.get("json_file"), known.get("image_root")) != (json_path, image_root):
            raise ValueError(
                f"DATASETS.REGISTER: the name {name!r} is taken by another data set "
                f"(json {known.get('json_file')!r}, images {known.get('image_root')!r}). Choose another NAME."
            )
        DatasetCatalog[name] = partial(load_coco, name, json_path, image_root, outside)
        return
    categories = read_categories(json_path)
    contiguous = {category.id: i for i, category in enumerate(categories)}
    add_coco(name, json_path, image_root, [category.name for category in categories], contiguous, outside)


def require_registered(name: str) -> None:
    """Raise a ValueError with the nearest names where Detectron2 has no set of that name."""
    from detectron2.data import DatasetCatalog

    if name not in DatasetCatalog:
        near = difflib.get_close_matches(name, list(DatasetCatalog), n=3)
        raise ValueError(
            f"data set {name!r} is not registered (nearest names: {near}). "
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
    if tool := (COCO_SETS.get(name) or _PANOPTIC[name]).tool:
        return f"{tool} writes it from the published files {where}."
    return f"Unpack the published files {where}, so that {COCO_SETS[name].json!r} is there."


def _register_instances(name: str) -> None:
    entry = COCO_SETS[name]
    json_path, images = os.path.abspath(data_root() / entry.json), os.path.abspath(data_root() / entry.images)
    if not os.path.isfile(json_path):
        ade20k = ade20k_instance_categories() if name.startswith("ade20k") else []
        add_coco(name, json_path, images, entry.classes or [label for _, label in ade20k], None)
        return
    categories = read_categories(json_path)
    found = [category.name for category in categories]
    if entry.classes and found != list(entry.classes):
        logger.warning("data set %r: %s lists the classes %s, expected %s. The json's are used.",
                       name, json_path, found, list(entry.classes))  # fmt: skip
    add_coco(name, json_path, images, found, {category.id: i for i, category in enumerate(categories)})


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
    from detectron2.data import DatasetCatalog, MetadataCatalog

    categories = panoptic_categories(name)
    everything = {category["id"]: i for i, category in enumerate(categories)}
    paths = {key: str(data_root() / path) for key, path in _PANOPTIC[name].paths.items()}
    DatasetCatalog.register(name, partial(_load_panoptic, name))
    MetadataCatalog.get(name).set(
        **paths,
        evaluator_type=_PANOPTIC[name].kind,
        ignore_label=255,
        label_divisor=1000,
        thing_classes=[category["name"] for category in categories if category["isthing"]],
        stuff_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(categories) if c["isthing"]},
        stuff_dataset_id_to_contiguous_id=everything,
    )


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
