"""COCO-format data sets of one's own, named in the config and registered in Detectron2's catalogs."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from peft_d2.data.builtin import register_builtin
from peft_d2.data.images import check_input
from peft_d2.data.records import add_coco, load_coco, read_categories

_KEYS = ("NAME", "JSON", "IMAGES")
_NAME = re.compile(r"[^\s/\\.\-][^\s/\\]*")


def register_from_config(cfg: Any) -> list[str]:
    """Register every entry of ``DATASETS.REGISTER``, and what the config uses of :mod:`peft_d2.data.builtin`.

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


def coco_files(name: str) -> tuple[str, str]:
    """The json and the image folder of a registered or built-in COCO-format set.

    Raises:
        ValueError: there is no such set, or it is in another format.
    """
    from detectron2.data import MetadataCatalog

    register_builtin([name])
    require_registered(name)
    meta = MetadataCatalog.get(name).as_dict()
    if meta.get("evaluator_type") != "coco":
        raise ValueError(f"data set {name!r} is not in COCO's format of instances ({meta.get('evaluator_type')}).")
    return meta["json_file"], meta["image_root"]


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
