"""Published data sets under their names, below the folder that ``DETECTRON2_DATASETS`` names (else ``./datasets``).

A name is registered when a config first uses it, in the layout in which its authors publish the set:

| names | folder | prepared by |
|---|---|---|
| ``ndd20_{train,test}``, ``ndd20_{above,below}_{train,test}`` | ``NDD20`` | ``tools/prepare_ndd20.py`` |
| ``zerowaste_{train,val,test}`` | ``zerowaste-f/splits_final_deblurred`` | (COCO's format) |
| ``wixray_{train,val}`` | ``WIXray-master`` | (COCO's format) |
| ``trashcan_{instance,material}_{train,val}`` | ``trashcan/{instance,material}_version`` | (COCO's format) |
| ``ssdd_{train,test}`` | ``Official-SSDD-OPEN`` | ``tools/prepare_ssdd.py`` |
| ``nwpu_vhr10_{train,val}`` | ``NWPU VHR-10 dataset`` | ``tools/prepare_nwpu_vhr10.py`` |
| ``ade20k_{instance,panoptic}_{train,val}`` | ``ADEChallengeData2016`` | ``tools/prepare_ade20k.py`` |
| ``coco_2017_{train,val}_panoptic_with_sem_seg`` | ``coco`` | ``tools/prepare_coco_panoptic.py`` |

COCO, LVIS, Cityscapes (``tools/prepare_cityscapes.py``), Pascal VOC and ``ade20k_sem_seg_{train,val}`` are registered
by Detectron2. Names that Mask2Former's package has as well mean the same there, and stay as they are if it came first.

What could not be verified: WIXray's class names, so they are read from its json (the paper gives their number, 12); and
which images of NDD20 the papers tested on, so the split is one of this project, see ``tools/prepare_ndd20.py``.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peft_d2.compat import lend_cityscapesscripts
from peft_d2.data.images import path_inside
from peft_d2.data.records import add_coco, load_lvis, read_categories

logger = logging.getLogger(__name__)

# The names of ADE20K's 100 instance classes are the first of each semantic class's names, but for these.
_ADE20K_RENAMED = {
    8: "windowpane", 37: "bathtub", 38: "railing", 87: "streetlight", 89: "television receiver", 90: "airplane",
    92: "apparel", 138: "ashcan",
}  # fmt: skip
# Of the 150 semantic classes (from 0), those without instances; the others' order is that of the 100 instance classes.
_ADE20K_STUFF = {
    0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60, 61, 63, 68, 77, 79,
    84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131, 140, 141, 145,
}  # fmt: skip
_ANIMALS = ("fish", "starfish", "shells", "crab", "eel", "etc")
_TRASH = {
    "instance": ("clothing", "pipe", "bottle", "bag", "snack_wrapper", "can", "cup", "container", "unknown_instance",
                 "branch", "wreckage", "tarp", "rope", "net"),
    "material": ("etc", "fabric", "fishing_gear", "metal", "paper", "plastic", "rubber", "wood"),
}  # fmt: skip


@dataclass(frozen=True)
class CocoSet:
    """A set of instances in COCO's format.

    Attributes:
        json, images: paths below the folder of all data sets.
        classes: their names in the order of the ids; none where only the json knows them.
        tool: what writes the json, "" where it is published.
    """

    json: str
    images: str
    classes: tuple[str, ...] = ()
    tool: str = ""


NWPU_VHR10_CLASSES = (
    "airplane", "ship", "storage_tank", "baseball_diamond", "tennis_court", "basketball_court", "ground_track_field",
    "harbor", "bridge", "vehicle",
)  # fmt: skip


def _coco_sets() -> dict[str, CocoSet]:
    found = {}
    for split in ("train", "test"):
        for water in ("", "above_", "below_"):
            found[f"ndd20_{water}{split}"] = CocoSet(
                f"NDD20/annotations/{water}{split}.json", "NDD20", ("dolphin",), "tools/prepare_ndd20.py"
            )
        found[f"ssdd_{split}"] = CocoSet(
            f"Official-SSDD-OPEN/annotations/{split}.json", "Official-SSDD-OPEN", ("ship",), "tools/prepare_ssdd.py"
        )
    for split in ("train", "val", "test"):
        folder = f"zerowaste-f/splits_final_deblurred/{split}"
        found[f"zerowaste_{split}"] = CocoSet(
            f"{folder}/labels.json", f"{folder}/data", ("rigid_plastic", "cardboard", "metal", "soft_plastic")
        )
    for split, ade in (("train", "training"), ("val", "validation")):
        found[f"wixray_{split}"] = CocoSet(
            f"WIXray-master/annotations/instances_{split}2017.json", f"WIXray-master/images/{split}2017"
        )
        for kind, trash in _TRASH.items():
            classes = ("rov", "plant", *(f"animal_{a}" for a in _ANIMALS), *(f"trash_{t}" for t in trash))
            folder = f"trashcan/{kind}_version"
            found[f"trashcan_{kind}_{split}"] = CocoSet(
                f"{folder}/instances_{split}_trashcan.json", f"{folder}/{split}", classes
            )
        found[f"nwpu_vhr10_{split}"] = CocoSet(
            f"NWPU VHR-10 dataset/annotations/{split}.json",
            "NWPU VHR-10 dataset/positive image set",
            NWPU_VHR10_CLASSES,
            "tools/prepare_nwpu_vhr10.py",
        )
        found[f"ade20k_instance_{split}"] = CocoSet(
            f"ADEChallengeData2016/ade20k_instance_{split}.json",
            f"ADEChallengeData2016/images/{ade}",
            tool="tools/prepare_ade20k.py",
        )
    return found


COCO_SETS = _coco_sets()
_PANOPTIC = {
    **{f"ade20k_panoptic_{split}": split for split in ("train", "val")},
    **{f"coco_2017_{split}_panoptic_with_sem_seg": split for split in ("train", "val")},
}
_LVIS = tuple(f"lvis_{version}_{split}" for version in ("v0.5", "v1") for split in ("train", "val"))
NAMES = (*COCO_SETS, *_PANOPTIC)


def data_root() -> Path:
    """The folder of all published data sets, as Detectron2 finds it."""
    return Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def register_builtin(names: Iterable[str] | None = None) -> list[str]:
    """Register those of ``names`` that are built in and not registered yet; None: all that are not registered yet.

    No data has to be there: what is missing is told when the set is loaded, or checked.

    Returns:
        The names that were registered now.
    """
    from detectron2.data import DatasetCatalog

    names = NAMES if names is None else tuple(names)
    for name in names:
        if name in _LVIS and name in DatasetCatalog and importlib.util.find_spec("lvis") is None:
            DatasetCatalog[name] = partial(_load_lvis, name)
        elif name.startswith("cityscapes_"):
            lend_cityscapesscripts()
    wanted = [name for name in names if name in NAMES and name not in DatasetCatalog]
    for name in dict.fromkeys(wanted):
        if name in COCO_SETS:
            _register_instances(name, COCO_SETS[name])
        else:
            _register_panoptic(name)
    return list(dict.fromkeys(wanted))


def remedy(name: str) -> str:
    """Where the files of a built-in set have to lie and what writes them; "" for other sets."""
    if name not in NAMES:
        return ""
    if name in _PANOPTIC:
        tool = "tools/prepare_ade20k.py" if name.startswith("ade20k") else "tools/prepare_coco_panoptic.py"
    else:
        tool = COCO_SETS[name].tool
    where = f"below DETECTRON2_DATASETS, which is {str(data_root())!r}"
    if tool:
        return f"{tool} writes it from the published files {where}."
    return f"Unpack the published files {where}, so that {COCO_SETS[name].json!r} is there."


def _register_instances(name: str, entry: CocoSet) -> None:
    json_path, images = os.path.abspath(data_root() / entry.json), os.path.abspath(data_root() / entry.images)
    if os.path.isfile(json_path):
        categories = read_categories(json_path)
        found = tuple(category.name for category in categories)
        if entry.classes and found != entry.classes:
            logger.warning("data set %r: %s lists the classes %s, expected %s. The json's are used.",
                           name, json_path, list(found), list(entry.classes))  # fmt: skip
        add_coco(name, json_path, images, found, {category.id: i for i, category in enumerate(categories)})
    else:
        add_coco(name, json_path, images, entry.classes or tuple(_ade20k_instance_classes(name)), None)


def _load_lvis(name: str) -> list[dict[str, Any]]:
    from detectron2.data import MetadataCatalog

    meta = MetadataCatalog.get(name)
    return load_lvis(meta.json_file, meta.image_root)


def _ade20k_instance_classes(name: str) -> list[str]:
    return [label for _, label in ade20k_instance_categories()] if name.startswith("ade20k") else []


def ade20k_instance_categories() -> list[tuple[int, str]]:
    """(semantic class from 0, name) of the 100 instance classes, in their order: the instance class k is the k-th."""
    from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES

    return [
        (number, _ADE20K_RENAMED.get(number, names.split(",")[0].strip()))
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

    split = _PANOPTIC[name]
    if name.startswith("ade20k"):
        folder, long = data_root() / "ADEChallengeData2016", {"train": "training", "val": "validation"}[split]
        paths = {
            "image_root": folder / "images" / long,
            "panoptic_root": folder / f"ade20k_panoptic_{split}",
            "panoptic_json": folder / f"ade20k_panoptic_{split}.json",
            "sem_seg_root": folder / "annotations_detectron2" / long,
            "json_file": folder / f"ade20k_instance_{split}.json",
        }
    else:
        folder = data_root() / "coco"
        paths = {
            "image_root": folder / f"{split}2017",
            "panoptic_root": folder / f"panoptic_{split}2017",
            "panoptic_json": folder / "annotations" / f"panoptic_{split}2017.json",
            "sem_seg_root": folder / f"panoptic_semseg_{split}2017",
            "json_file": folder / "annotations" / f"instances_{split}2017.json",
        }
    categories = panoptic_categories(name)
    things = {category["id"]: i for i, category in enumerate(categories) if category["isthing"]}
    everything = {category["id"]: i for i, category in enumerate(categories)}
    found = {key: str(path) for key, path in paths.items()}
    DatasetCatalog.register(name, lambda: _load_panoptic(name, found, things, everything))
    MetadataCatalog.get(name).set(
        **found,
        evaluator_type="ade20k_panoptic_seg" if name.startswith("ade20k") else "coco_panoptic_seg",
        ignore_label=255,
        label_divisor=1000,
        thing_classes=[category["name"] for category in categories if category["isthing"]],
        stuff_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id=things,
        stuff_dataset_id_to_contiguous_id=everything,
    )


def _load_panoptic(
    name: str, paths: dict[str, str], things: dict[int, int], everything: dict[int, int]
) -> list[dict[str, Any]]:
    """Records with panoptic and semantic label images; a segment's class is its place among all classes."""
    for key in ("panoptic_json", "image_root", "panoptic_root", "sem_seg_root"):
        if not os.path.exists(paths[key]):
            raise FileNotFoundError(f"data set {name!r}: {paths[key]} does not exist. {remedy(name)}")
    records = []
    for annotation in json.loads(Path(paths["panoptic_json"]).read_bytes())["annotations"]:
        stem = os.path.splitext(annotation["file_name"])[0]
        segments = [
            {**s, "category_id": everything[s["category_id"]], "isthing": s["category_id"] in things}
            for s in annotation["segments_info"]
        ]
        records.append(
            {
                "file_name": path_inside(paths["image_root"], f"{stem}.jpg"),
                "image_id": annotation["image_id"],
                "pan_seg_file_name": path_inside(paths["panoptic_root"], annotation["file_name"]),
                "sem_seg_file_name": path_inside(paths["sem_seg_root"], annotation["file_name"]),
                "segments_info": segments,
            }
        )
    return records
