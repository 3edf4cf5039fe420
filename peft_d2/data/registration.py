"""COCO-format data sets of one's own, named in the config and registered in Detectron2's catalogs."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from peft_d2.data.coco_json import read_json

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
    names = []
    for entry in cfg.DATASETS.get("REGISTER", []):
        name, json_path, image_root = _entry(entry)
        register_coco(name, json_path, image_root)
        names.append(name)
    from peft_d2.data.builtin import register_builtin  # which registers with this module's function

    register_builtin([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    return names


def register_coco(name: str, json_path: str | Path, image_root: str | Path) -> None:
    """Register one COCO-format set, polygons and run lengths alike; class names come from the json."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    json_path, image_root = os.path.abspath(os.path.expanduser(json_path)), os.path.expanduser(image_root)
    image_root = os.path.abspath(image_root)
    if not os.path.isfile(json_path):
        raise FileNotFoundError(
            f"DATASETS.REGISTER: data set {name!r}: JSON {json_path!r} is no file. Give the path of its json."
        )
    if not os.path.isdir(image_root):
        raise FileNotFoundError(
            f"DATASETS.REGISTER: data set {name!r}: IMAGES {image_root!r} is no folder. "
            "Give the folder that the json's file_name entries are relative to."
        )
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name).as_dict()
        if (known.get("json_file"), known.get("image_root")) == (json_path, image_root):
            return
        raise ValueError(
            f"DATASETS.REGISTER: the name {name!r} is taken by another data set "
            f"(json {known.get('json_file')!r}, images {known.get('image_root')!r}). Choose another NAME."
        )
    categories = read_categories(json_path)
    contiguous = {category: i for i, (category, _) in enumerate(categories)}
    add_coco(name, json_path, image_root, [label for _, label in categories], contiguous)


def add_coco(
    name: str, json_path: str, image_root: str, classes: Sequence[str], contiguous: Mapping[int, int] | None
) -> None:
    """Put a COCO-format set into Detectron2's catalogs, whether or not its files exist.

    Args:
        name: not registered yet.
        json_path, image_root: absolute.
        classes: their names, none where they are not known yet.
        contiguous: index of each category id, None where they are not known yet.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import load_coco_json

    DatasetCatalog.register(name, lambda: load_coco_json(json_path, image_root, name))
    known: dict[str, Any] = {"json_file": json_path, "image_root": image_root, "evaluator_type": "coco"}
    if classes:
        known["thing_classes"] = list(classes)
    if contiguous is not None:
        known["thing_dataset_id_to_contiguous_id"] = dict(contiguous)
    MetadataCatalog.get(name).set(**known)


def class_names(cfg: Any) -> list[str]:
    """Thing class names of the training sets, of the test sets where there are none.

    Raises:
        ValueError: the sets of the config do not agree, or a name is not registered.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    register_from_config(cfg)
    names = list(cfg.DATASETS.TRAIN) or list(cfg.DATASETS.TEST)
    found: dict[str, list[str]] = {}
    for name in names:
        if name not in DatasetCatalog:
            near = difflib.get_close_matches(name, list(DatasetCatalog), n=3)
            raise ValueError(
                f"data set {name!r} is not registered (nearest names: {near}). "
                "Add it to DATASETS.REGISTER as {NAME, JSON, IMAGES}."
            )
        found[name] = list(MetadataCatalog.get(name).get("thing_classes", []))
    for name in names[1:]:
        if found[name] != found[names[0]]:
            raise ValueError(
                f"data sets {names[0]!r} and {name!r} have different classes: {found[names[0]]} and {found[name]}. "
                "Sets that are trained on together need the same categories."
            )
    return found[names[0]] if names else []


def coco_files(name: str) -> tuple[str, str]:
    """The json and the image folder of a registered or built-in COCO-format set.

    Raises:
        ValueError: there is no such set, or it is in another format.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from peft_d2.data.builtin import register_builtin

    register_builtin([name])
    if name not in DatasetCatalog:
        near = difflib.get_close_matches(name, list(DatasetCatalog), n=3)
        raise ValueError(f"data set {name!r} is not registered (nearest names: {near}).")
    meta = MetadataCatalog.get(name).as_dict()
    if meta.get("evaluator_type") != "coco":
        raise ValueError(f"data set {name!r} is not in COCO's format of instances ({meta.get('evaluator_type')}).")
    return meta["json_file"], meta["image_root"]


def read_categories(json_path: str | Path) -> list[tuple[int, str]]:
    """(id, name) of a COCO-format json's categories, by id: the order of the contiguous class indices."""
    stat = os.stat(json_path)
    return list(_read_categories(str(json_path), stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=64)
def _read_categories(json_path: str, mtime_ns: int, size: int) -> tuple[tuple[int, str], ...]:
    try:
        categories = read_json(json_path)["categories"]
        rows = tuple(sorted((int(c["id"]), str(c["name"])) for c in categories))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{json_path}: not a COCO-format json ({type(error).__name__}: {error}). "
            "Expected an object with images, annotations and categories: [{id, name}, ...]."
        ) from error
    if not rows:
        raise ValueError(f"{json_path}: lists no categories. Expected at least one {{id, name}}.")
    if len({category for category, _ in rows}) < len(rows):
        raise ValueError(f"{json_path}: lists a category id twice: {[category for category, _ in rows]}.")
    return rows


def _entry(entry: Any) -> tuple[str, str, str]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"DATASETS.REGISTER: expected {{NAME, JSON, IMAGES}}, got {entry!r}.")
    for key in entry:
        if key not in _KEYS:
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
    return entry["NAME"], entry["JSON"], entry["IMAGES"]
