"""Data sets as annotation tools export them, read as they are: the format is recognised by what a folder holds.

Own code, as no library serves: supervision reads two of these formats and brings ffmpeg, datumaro reads most and brings
pandas, pyarrow and an older OpenCV.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from peft_d2.data.formats.export import Export, Images, common_folder, jsons
from peft_d2.data.formats.masks import read_masks, read_voc
from peft_d2.data.formats.shapes import read_cvat, read_label_studio, read_labelme, read_yolo
from peft_d2.data.images import DatasetError
from peft_d2.peft.errors import shortened
from peft_d2.storage import disk


def read_folder(folder: str | Path, split: str = "train") -> tuple[str, dict[str, Any], Path]:
    """Recognise and read a folder.

    Args:
        folder: of an export: images and what describes them.
        split: which part, where the export has several: "train" or "val".

    Returns:
        What it was understood as, for a log; the set in COCO's format; the folder that its file names are relative to.

    Raises:
        FileNotFoundError: no such folder, or an image that is named is not there.
        DatasetError: nothing that is known, or a file of it that cannot be used.
    """
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder. Give the unpacked folder of an export.")
    for name, reader in READERS.items():
        try:
            export = reader(folder, split)
            if export is None:
                continue
            data, root = export.to_coco()
        except (KeyError, TypeError, IndexError, AttributeError, yaml.YAMLError, ArithmeticError) as error:
            fault = f"{type(error).__name__}: {_one_line(error)}"
            raise DatasetError(f"{folder}: looks like {name}, but an entry has another form ({fault}).") from error
        if not data["images"]:
            raise DatasetError(f"{folder}: looks like {name}, but has no images for {split!r}.")
        classes = shortened([category["name"] for category in data["categories"]], 10)
        counts = f"{len(data['images'])} images, {len(data.get('annotations', ()))} objects"
        left_out = "".join(f"; left out: {count} x {kind}" for kind, count in export.skipped.items() if count)
        return f"{export.format}: {counts}, {len(data['categories'])} class(es): {classes}{left_out}", data, root
    raise DatasetError(
        f"{folder}: no data set that is known. Expected one of {', '.join(READERS)} (docs/own-data.md). Other tools, "
        "VIA and Supervisely among them, can export COCO: choose that there."
    )


def store(data: dict[str, Any], folder: Path, name: str) -> Path:
    """Write a COCO-format set; its file is named by its content, so that a run that reads it never sees another."""
    content = json.dumps(data).encode()
    path = folder / f"{name}_{disk.sha256(content)[:8]}.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        disk.write_bytes(path, content)
    return path


def read_class_map(text: str) -> dict[str, str]:
    """Class names to their new ones, "" to leave a class out: ``"car=vehicle,tree="``, or a json or yaml file of a map.

    Raises:
        DatasetError: it is neither.
    """
    if Path(text).suffix in (".json", ".yaml", ".yml"):
        try:
            found = yaml.safe_load(Path(text).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise DatasetError(f"class map {text}: cannot be read ({_one_line(error)}).") from error
    else:
        found = dict(pair.split("=", 1) for pair in text.split(",") if "=" in pair)
        found = found if len(found) == len(text.split(",")) else None
    if not isinstance(found, Mapping):
        raise DatasetError(f"class map {text!r}: expected old=new,old=new, or a json or yaml file of {{old: new}}.")
    return {str(old).strip(): str(new or "").strip() for old, new in found.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def map_classes(names: Mapping[str, str], *sets: dict[str, Any]) -> list[dict[str, Any]]:
    """COCO-format sets with classes renamed, merged where two get one name, and left out where the new name is "".

    Raises:
        DatasetError: a class that none of the sets has.
    """
    known = dict.fromkeys(category["name"] for data in sets for category in data["categories"])
    if unknown := names.keys() - known.keys():
        raise DatasetError(f"class map: {min(unknown)!r} is no class of this data. It has {shortened(list(known))}.")
    return [_mapped(data, names) for data in sets]


def _mapped(data: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """One set with its classes renamed, numbered anew from 1 in their order."""
    renamed = {category["id"]: names.get(category["name"], category["name"]) for category in data["categories"]}
    ids = {name: number for number, name in enumerate(dict.fromkeys(filter(None, renamed.values())), 1)}
    kept = [a for a in data.get("annotations", ()) if renamed[a["category_id"]]]
    return {
        **data,
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
        "annotations": [{**a, "category_id": ids[renamed[a["category_id"]]]} for a in kept],
    }


def read_coco(folder: Path, split: str) -> Export | None:
    """A json of COCO's format, with the images wherever its names lead below the folder."""
    found: dict[Path, Any] = {}
    for path, data in jsons(folder):
        if isinstance(data, dict) and "shapes" in data:
            return None
        if isinstance(data, dict) and {"images", "categories"} <= data.keys():
            found[path] = data
    below = {path: path.relative_to(folder).as_posix() for path in found}
    words = ("val", "test") if split == "val" else ("train",)
    matching = ([path for path in found if word in below[path].lower()] for word in words)
    chosen = next(filter(None, matching), list(found))
    if not chosen:
        return None
    if len(chosen) > 1:
        names = shortened([below[path] for path in chosen])
        raise DatasetError(f"{folder}: several COCO jsons, {names}. Name one with --{split}-json.")
    data, images = found[chosen[0]], Images(folder)
    paths = {image["id"]: images.find(image["file_name"], chosen[0]) for image in data["images"]}
    root = common_folder(paths.values())
    renamed = [{**image, "file_name": paths[image["id"]].relative_to(root).as_posix()} for image in data["images"]]
    return Export("COCO", coco=({**data, "images": renamed}, root))


# The order matters: jsons and XML say what they are, folders of PNGs say least.
READERS: dict[str, Callable[[Path, str], Export | None]] = {
    "COCO": read_coco,
    "CVAT for images": read_cvat,
    "Label Studio": read_label_studio,
    "labelme": read_labelme,
    "Pascal VOC masks": read_voc,
    "YOLO segmentation": read_yolo,
    "instance masks": read_masks,
}
