"""Checks of data sets before training: what would crash it, spoil it without a word, or leave nothing to learn.

An *error* would crash training or evaluation, or train on something else than was meant; a *warning* is worth a look.
Of COCO-format sets the json is read and each image's header, of sets with label images each label.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from peft_d2.data.images import DatasetError, lies_inside, read_header, seems_cut_off
from peft_d2.data.labels import (
    Problem,
    check_cityscapes,
    check_image_ids,
    check_labels,
    check_panoptic,
    check_records,
    repeated,
    unpaired,
)
from peft_d2.data.registration import load_coco, read_json, remedy
from peft_d2.data.segmentation import HUGE, Level, extent, polygon_defect, run_length_defect

_RULES = 6  # raised when the checks change, so that no older verdict is recalled
_NO_ANNOTATIONS = "no annotations"
_MANY = 100_000  # objects, whose check takes so long that a line says so
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rules:
    """What a set is checked for."""

    test: bool = False  # not trained on; its json may lack annotations
    outside: bool = False  # images may lie outside the image folder
    counted: int = 100  # how many predictions of an image and class its evaluation counts
    predicted: int = 0  # how many predictions of an image the model gives; 0: not known
    lvis: bool = False  # in LVIS's form: file names at the end of coco_url, classes from 1 on, frequencies


def check_coco(
    json_path: str | Path, image_root: str | Path, rules: Rules | None = None, *, remember: bool = False
) -> list[Problem]:
    """All problems of a COCO-format set, errors first.

    Args:
        remember: do not check a set without errors again while its json and all its images stay as they are.
    """
    json_path, image_root, rules = str(json_path), str(image_root), rules or Rules()
    if not os.path.isfile(json_path):
        return [Problem("error", "missing json", json_path, "is no file", "Give the path of a COCO-format json.")]
    if not os.path.isdir(image_root):
        what = "is a file, not a folder" if os.path.isfile(image_root) else "is no folder"
        return [Problem("error", "missing folder", image_root, what, "Give the folder of the images, unpacked.")]
    check = partial(_check_json, json_path, image_root, rules)
    key = os.path.abspath(json_path), os.path.abspath(image_root), rules
    return _remembered(key, image_root, check) if remember else check()[0]


def _check_json(json_path: str, image_root: str, rules: Rules) -> tuple[list[Problem], list[str]]:
    """The problems of a COCO-format set, and the names of its files."""
    try:
        data = read_json(json_path, "utf-8")  # as Detectron2 reads it, without a byte order mark
    except DatasetError as error:
        what = str(error).removeprefix(f"{json_path} ").removesuffix(".")
        advice = "Let it be read." if isinstance(error.__cause__, OSError) else "Give a COCO-format json in UTF-8."
        return [Problem("error", "not json", json_path, what, advice)], []
    check = _Check(data, Path(image_root), rules)
    return check.run(), [os.path.abspath(json_path), *(image["file_name"] for image in check.images.values())]


def check_datasets(cfg: Any) -> None:
    """Check every set that the config trains or tests on; warnings are logged.

    COCO-format sets and label images are checked in full. Of others, files and folders have to be there, and what
    Detectron2 needs to read them.

    Raises:
        DatasetError: naming each error (the first of each kind in full) and its remedy.
    """
    if not cfg.DATASETS.get("CHECK", True):
        return
    for name in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
        _judge(name, *check_registered(cfg, name))
    for tested in cfg.DATASETS.TEST:
        for trained in cfg.DATASETS.TRAIN:
            _warn_of_shared(trained, tested)


def _warn_of_shared(trained: str, tested: str) -> None:
    """Say that images are both trained and tested on, as where one json is given twice."""
    from detectron2.data import MetadataCatalog

    metas = [MetadataCatalog.get(name).as_dict() for name in (trained, tested)]
    if not all(meta.get("evaluator_type") == "coco" and meta.get("image_root") for meta in metas):
        return
    if not all(os.path.isfile(meta.get("json_file") or "") for meta in metas):
        return
    roots = [os.path.realpath(meta["image_root"]) for meta in metas]
    if not any(lies_inside(*pair) for pair in (roots, roots[::-1])):
        return  # of large published sets, whose jsons take long to read
    files = [
        {os.path.realpath(os.path.join(root, image["file_name"])) for image in read_json(meta["json_file"])["images"]}
        for root, meta in zip(roots, metas, strict=True)
    ]
    if shared := files[0] & files[1]:
        logger.warning(
            "data set %r: %d of its %d images are those of %r, too, %s first: figures of what was trained on say "
            "little of other images.",
            *(tested, len(shared), len(files[1]), trained, min(shared)),
        )


def check_registered(cfg: Any, name: str) -> tuple[str, list[Problem]]:
    """Where a registered set is, and its problems: of whatever form, as the config trains or tests on it.

    Raises:
        DatasetError: files or folders are missing.
    """
    from detectron2.data import MetadataCatalog

    meta = MetadataCatalog.get(name).as_dict()
    kind = meta.get("evaluator_type", "")
    of_instances = kind in ("coco", "lvis") and "panoptic_json" not in meta
    if of_instances and meta.get("json_file") and meta.get("image_root"):
        counted = cfg.TEST.get("MAX_DETECTIONS", 100) if name in cfg.DATASETS.TEST else 0
        rules = Rules(
            test=name not in cfg.DATASETS.TRAIN,
            outside=cfg.DATASETS.get("ALLOW_FILES_OUTSIDE", False),
            counted=0 if kind == "lvis" else counted,  # LVIS counts the best 300 of an image
            predicted=cfg.TEST.DETECTIONS_PER_IMAGE,
            lvis=kind == "lvis",
        )
        problems = check_coco(meta["json_file"], meta["image_root"], rules, remember=True)
        return meta["json_file"], [*problems, *_check_tasks(cfg, name, meta["json_file"], problems)]
    _check_files(name, meta)
    if kind.startswith("cityscapes"):
        check_cityscapes(name, meta)
    checked = not kind.startswith("cityscapes") and kind != "pascal_voc"
    return meta.get("sem_seg_root") or "its records", _check_loaded(cfg, name, meta) if checked else []


def _check_loaded(cfg: Any, name: str, meta: Mapping[str, Any]) -> list[Problem]:
    """Problems of a set with label images, or of one that a function registers without a json."""
    from detectron2.data import DatasetCatalog

    try:
        truth = read_json(meta["panoptic_json"]) if "panoptic_json" in meta else None
        if truth is not None:
            known = [meta.get(f"{kind}_dataset_id_to_contiguous_id", {}) for kind in ("thing", "stuff")]
            if problems := list(check_panoptic(truth, *known)):
                return problems
        records = DatasetCatalog.get(name)
        if not isinstance(records, Sequence) or not all(isinstance(record, Mapping) for record in records):
            text = f"its function gives a {type(records).__name__}, not a list of dicts"
            return [Problem("error", "not loaded", name, text, "Let it return list(...) of Detectron2's records.")]
        if truth is not None and (problems := list(check_image_ids(records, truth))):
            return problems
    except (AssertionError, OSError, KeyError, ValueError) as error:
        text = f"cannot be loaded ({type(error).__name__}: {error})"
        return [Problem("error", "not loaded", name, text, "Check the set's folders and files.")]
    if not any("sem_seg_file_name" in r or "pan_seg_file_name" in r for r in records):
        count, test = len(meta.get("thing_classes", ())), name in cfg.DATASETS.TEST
        return [] if meta.get("json_file") else list(check_records(records, count, test))
    return _check_labels(cfg, name, meta, [r for r in records if "sem_seg_file_name" in r or "pan_seg_file_name" in r])


def _check_labels(cfg: Any, name: str, meta: Mapping[str, Any], records: Sequence[dict[str, Any]]) -> list[Problem]:
    """Problems of a set with label images."""
    from peft_d2.data.mappers import uses_detectron2_mapper

    classes, count = list(meta.get("stuff_classes", ())), cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if name in cfg.DATASETS.TRAIN and "pan_seg_file_name" not in records[0] and count != (len(classes) or count):
        what = f"has {len(classes)} classes, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is {count}"
        return [Problem("error", "class count", name, what, "Set it.")]
    ignore = meta.get("ignore_label", cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)
    as_grey = uses_detectron2_mapper(cfg)
    files = [str(path) for r in records for key, path in sorted(r.items()) if key.endswith("file_name")]

    def check() -> tuple[list[Problem], list[str]]:
        """The problems of the label images, and the set's files."""
        logger.info("data set %r: reading %d label images, once.", name, len(records))
        return list(check_labels(records, classes, ignore, as_grey)), files

    problems = _remembered((name, classes, ignore, as_grey, files), "", check)
    roots = [str(meta.get(key, "")) for key in ("image_root", "sem_seg_root")]
    if all(os.path.isdir(root) for root in roots) and "panoptic_root" not in meta:
        problems += unpaired(*roots)
    return problems


def _judge(name: str, where: str, problems: Sequence[Problem]) -> None:
    """Log warnings and raise errors, of which the tool lists all."""
    for line in summary([p for p in problems if p.level == "warning"]):
        logger.warning("data set %r: %s", name, line)
    if errors := [p for p in problems if p.level == "error"]:
        lines = "\n  ".join(summary(errors))
        hint = remedy(name) if errors[0].kind in ("missing json", "missing folder") else ""
        raise DatasetError(
            f"data set {name!r} ({where}) has {len(errors)} error(s):\n  {lines}\n"
            f"{hint or 'tools/check_dataset.py lists them all. DATASETS.CHECK False trains all the same.'}"
        )


def _check_tasks(cfg: Any, name: str, json_path: str, problems: Sequence[Problem]) -> Iterator[Problem]:
    """Find masks or keypoints that the config's model needs and the set lacks."""
    from detectron2.data import MetadataCatalog

    from peft_d2.data.mappers import trains_on_masks

    train, test = (name in cfg.DATASETS[key] for key in ("TRAIN", "TEST"))
    if train and any(p.kind == "no masks" for p in problems) and trains_on_masks(cfg):
        advice = "Use a box detector (Detectron2's: MODEL.MASK_ON False), or add masks."
        what = "has boxes alone, but the model is trained on masks"
        yield Problem("error", "masks needed", json_path, what, advice)
    if not cfg.MODEL.KEYPOINT_ON or any(p.level == "error" for p in problems):
        return
    if train and not MetadataCatalog.get(name).get("keypoint_names"):
        load_coco(name, json_path, "/", outside=True)  # which reads the names of the keypoints
    names, pairs = (MetadataCatalog.get(name).get(key, ()) for key in ("keypoint_names", "keypoint_flip_map"))
    count, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or 17
    for wrong, what, advice in (
        (train and not names, "the json's categories do not name their keypoints",
         'Give the category "keypoints": [name, ...], or the set\'s metadata keypoint_names and keypoint_flip_map.'),
        (train and names and not pairs and cfg.INPUT.RANDOM_FLIP != "none",
         "no keypoint has left or right in its name, so that mirrored images would be learnt wrong",
         "Set INPUT.RANDOM_FLIP none, or the set's metadata keypoint_flip_map."),
        (names and len(names) != count, f"has {len(names)} keypoints, but MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is "
         f"{count}", "Set it."),
        (test and sigmas != count, f"the model has {count} keypoints, and there are {sigmas} "
         "TEST.KEYPOINT_OKS_SIGMAS (COCO's own are 17)", "Give one for each keypoint."),
    ):  # fmt: skip
        if wrong:
            yield Problem("error", "keypoints", json_path, what, advice)


def _check_files(name: str, meta: Mapping[str, Any]) -> None:
    """Refuse a set whose files or folders are not there."""
    for key in ("image_root", "image_dir", "gt_dir", "panoptic_root", "panoptic_json", "sem_seg_root"):
        path = meta.get(key)
        if isinstance(path, str) and "://" not in path and not os.path.exists(path):
            hint = remedy(name) or (
                "Detectron2 looks for it below DETECTRON2_DATASETS, as it was when Detectron2 was imported; "
                "tools/prepare_cityscapes.py and its like write what is not published."
            )
            raise DatasetError(f"data set {name!r}: {key} {path!r} does not exist. {hint}")


def summary(problems: Iterable[Problem], per_kind: int = 3) -> list[str]:
    """One line per problem, the first ``per_kind`` of each kind, and how many more there are."""
    counts: Counter[str] = Counter()
    lines = []
    for problem in problems:
        counts[problem.kind] += 1
        if counts[problem.kind] <= per_kind:
            lines.append(str(problem))
    lines += [f"... and {n - per_kind} more of the kind {kind!r}" for kind, n in counts.items() if n > per_kind]
    return lines


def _remembered(key: Any, folder: str, check: Callable[[], tuple[Sequence[Problem], Sequence[str]]]) -> list[Problem]:
    """The problems that ``check`` finds. Of a set without errors they are kept, and it is not checked again.

    They are kept in ``~/.cache/peft_d2``, and hold as long as the files are the same by size and time of change.

    Args:
        key: what tells this check from others.
        folder: the folder that the files' names are relative to.
        check: gives the problems, and the names of the files that it has looked at.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # "~" where there is no home
    name = hashlib.sha256(repr((key, _RULES)).encode()).hexdigest()
    path = cache / "peft_d2" / "checks" / f"{name}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(path.read_text())
        if kept["state"] == _state(folder, kept["names"]):
            return [Problem(*entry) for entry in kept["problems"]]
    problems, names = check()
    if path.is_absolute() and all(p.level == "warning" for p in problems):
        try:
            content = json.dumps({"problems": problems, "names": names, "state": _state(folder, names)})
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        except OSError as error:
            logger.debug("the result of the check is not kept: %s", error)
    return list(problems)


def _state(folder: str, names: Sequence[str]) -> str:
    """Checksum of each file's size and time of change."""
    with ThreadPoolExecutor(max_workers=8) as pool:  # on network drives each answer takes its time
        found = pool.map(os.stat, (os.path.join(folder, name) for name in names), chunksize=256)
        lines = [f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}" for stat in found]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Check:
    """One check of the content of a COCO-format json and of its images' headers."""

    def __init__(self, data: Any, image_root: Path, rules: Rules) -> None:
        self.data, self.image_root, self.rules = data, image_root, rules
        self.problems: list[Problem] = []
        self.images: dict[Any, dict[str, Any]] = {}
        self.listed: dict[str, set[Any]] = defaultdict(set)  # ids of entries, usable or not
        self.objects = _Objects()

    def error(self, kind: str, where: str, what: str, advice: str) -> None:
        """Note an error."""
        self.problems.append(Problem("error", kind, where, what, advice))

    def warn(self, kind: str, where: str, what: str, advice: str) -> None:
        """Note a warning."""
        self.problems.append(Problem("warning", kind, where, what, advice))

    def run(self) -> list[Problem]:
        """All problems, errors first; where a list is missing nothing else is looked at."""
        for key in ("images", "annotations", "categories"):
            if key == "annotations" and self.rules.test and isinstance(self.data, dict) and key not in self.data:
                self.warn(_NO_ANNOTATIONS, key, "is missing", "Predictions are written, nothing is measured.")
                self.data["annotations"] = []
            if not isinstance(self.data, dict) or not isinstance(self.data.get(key), list):
                has = f"an object with {list(self.data)[:6]}" if isinstance(self.data, dict) else "a list"
                what = f"is missing or no list: the json is {has}"
                self.error("layout", key, what, "A COCO-format json has three lists: images, annotations, categories.")
                return self.problems
        if any(isinstance(a, dict) and "segments_info" in a for a in self.data["annotations"]):
            what = "have segments_info: this is a panoptic json"
            self.error("layout", "annotations", what, "Register it as a panoptic set, or give one of single objects.")
            return self.problems
        categories = self._entries("categories", {"id": int, "name": str})
        self.category_names = {c["id"]: c["name"] for c in categories}
        for name, count in repeated(c["name"] for c in categories):
            what, advice = f"{count} categories have this name", "Classes go by their names: merge them or rename one."
            self.error("duplicate name", f"categories[{name}]", what, advice)
        if self.rules.lvis:
            self._lvis(categories)
        if len(self.data["annotations"]) > _MANY:
            logger.info("Checking %d objects, which takes about a minute a million.", len(self.data["annotations"]))
        self._images()
        self._annotations()
        self.problems += [Problem(*row) for row in self.objects.problems(self.rules)]
        return sorted(self.problems, key=lambda p: p.level != "error")

    def _entries(self, key: str, needed: dict[str, Any]) -> list[dict[str, Any]]:
        """The entries of a list that have what is needed; ids that are used twice are noted."""
        found = []
        for position, item in enumerate(self.data[key]):
            entry = item if isinstance(item, dict) else {}
            lacking = [k for k, t in needed.items() if not isinstance(entry.get(k), t)]
            if isinstance(number := entry.get("id"), int | float | str):
                self.listed[key].add(number)
            if lacking:
                named = [f"{k} ({entry[k]!r:.40})" if k in entry else k for k in lacking]
                other = any(k in entry for k in lacking)
                advice = "Expected whole numbers for ids and sizes, texts for names." if other else "Add it."
                self.error("incomplete entry", f"{key}[{position}]", f"lacks a usable {', '.join(named)}", advice)
            else:
                found.append(entry)
        for value, count in repeated(entry["id"] for entry in found):
            where, what = f"{key}[id {value}]", f"the id is used {count} times"
            self.error(f"duplicate id in {key}", where, what, "Every id must be unique in its list.")
        if not self.data[key] and key != "annotations":
            self.error(f"no {key}", key, "is empty", "List at least one.")
        return found

    def _lvis(self, categories: Sequence[dict[str, Any]]) -> None:
        """Look at what LVIS has besides, and give each image the file name that its ``coco_url`` ends with."""
        for image in (image for image in self.data["images"] if isinstance(image, dict)):
            if isinstance(url := image.get("coco_url"), str):
                image["file_name"] = "/".join(url.split("/")[-2:])
        if sorted(self.category_names) != list(range(1, len(categories) + 1)):
            what = f"the ids, from {min(self.category_names, default=0)} on, are not 1 to {len(categories)}"
            self.error("category ids", "categories", what, "A class's index is its id - 1: number them from 1.")
        if lacking := [c for c in categories if c.get("frequency") not in ("r", "c", "f")]:
            what = f"{len(lacking)} of {len(categories)} have no frequency"
            note = self.error if self.rules.test else self.warn
            note("frequency", "categories", what, 'APr, APc and APf need it: give each "r", "c" or "f".')
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            if count := sum(isinstance(image, dict) and key not in image for image in self.data["images"]):
                what = f"{count} of {len(self.data['images'])} have no {key}"
                self.warn("federation", "images", what, "They are taken to have none, which changes figures: add them.")

    def _images(self) -> None:
        name = "coco_url" if self.rules.lvis else "file_name"
        entries = self._entries("images", {"id": (int, str), name: str, "height": int, "width": int})
        self.images = {i["id"]: i for i in entries}
        self.by_text = {str(i): i for i in self.images}
        for name, count in repeated(i["file_name"] for i in entries):
            self.warn("duplicate file", f"images[{name}]", f"{count} images are this file", "Merge their annotations.")
        with ThreadPoolExecutor(max_workers=8) as pool:
            for image, defect in zip(entries, pool.map(self._file_defect, entries, chunksize=64), strict=True):
                if defect:
                    where = f"images[id {image['id']} {image['file_name']}]"
                    (self.warn if defect[0] == "cut off" else self.error)(defect[0], where, *defect[1:])

    @cached_property
    def _listed_files(self) -> dict[str, str]:
        """Names of the folder's files by what is left of them in any spelling, with and without their ending."""
        names = [entry.name for entry in os.scandir(self.image_root) if entry.is_file()]
        return {_plain(os.path.splitext(name)[0]): name for name in names} | {_plain(name): name for name in names}

    def _file_defect(self, image: dict[str, Any]) -> tuple[str, str, str] | None:
        """(kind, what is wrong, remedy) of an image's file, None when nothing is."""
        given, name = (image["width"], image["height"]), image["file_name"]
        path = self.image_root / name
        if min(given) < 1:
            return "image size", f"the json gives {given[0]} x {given[1]} px", "Correct the json."
        if not self.rules.outside and not lies_inside(self.image_root, str(path)):
            advice = "Put it there, or, if that is meant, set DATASETS.ALLOW_FILES_OUTSIDE True."
            return "outside the folder", f"the file lies outside {self.image_root}", advice
        if not os.access(path.parent, os.X_OK) and path.parent.is_dir():
            return "unreadable file", f"{path}: its folder cannot be entered", "Let it be read."
        if not os.path.isfile(path):  # Path.is_file raises where the name is too long
            return self._missing(path, name)
        found, defect, advice = read_header(path)
        if defect:
            return "unreadable file", f"{path}: {defect}", advice
        if found != given:
            what = f"the file is {found[0]} x {found[1]} px, the json says {given[0]} x {given[1]}"
            turned = "Width and height are exchanged: correct the json. If its annotations do not follow the camera's "
            turned += "EXIF tag, by which images are turned, write the file again without the tag."
            return "sizes disagree", what, turned if found == given[::-1] else "Correct the json or the file."
        if seems_cut_off(path):
            return "cut off", f"{path} has no end: it may have been copied in part", "Copy it again."
        return None

    def _missing(self, path: Path, name: str) -> tuple[str, str, str]:
        """(kind, what is wrong, remedy) of an image that is not there, with what is there in its place."""
        if "\\" in name:
            what = f"{path} is no file: its name has backslashes, as on Windows"
            return "backslashes", what, "Write / in place of them in the json."
        plain = _plain(path.name)
        if other := self._listed_files.get(plain) or self._listed_files.get(os.path.splitext(plain)[0]):
            advice = "Correct file_name in the json, or the folder that is given."
            return "missing file", f"{path} is no file, but {self.image_root / other} is", advice
        return "missing file", f"{path} is no file", "Correct the json or put the file there."

    def _annotations(self) -> None:
        needed: dict[str, Any] = {"id": (int, str), "image_id": (int, str), "category_id": int}
        needed |= {"segmentation": (list, dict)} if self.rules.lvis else {}
        entries = self._entries("annotations", needed)
        self.known = self.category_names.keys() | self.listed["categories"]
        masked = any(a.get("segmentation") for a in entries)
        for annotation in entries:
            self._annotation(annotation, masked)
        if any(p.kind == _NO_ANNOTATIONS for p in self.problems) or len(entries) < len(self.data["annotations"]):
            return
        if entries and not masked:
            self.warn("no masks", "annotations", "none has a segmentation", "Only boxes can be trained on.")
        for category in sorted(self.category_names.keys() - {a["category_id"] for a in entries}):
            where = f"categories[id {category} {self.category_names[category]}]"
            self.warn("empty class", where, "no object is of this class", "It is never learnt, and its AP is nan.")
        if not entries:
            self.warn(_NO_ANNOTATIONS, "annotations", "is empty", "There is nothing to learn or to measure.")

    def _annotation(self, annotation: dict[str, Any], masked: bool) -> None:
        where, before = f"annotations[id {annotation['id']}, image {annotation['image_id']}]", len(self.problems)
        if self.category_names and annotation["category_id"] not in self.known:
            known = ", ".join(map(str, sorted(self.category_names)[:12]))
            what = f"category_id {annotation['category_id']} is not listed"
            self.error("unknown category", where, what, f"Expected one of {known}.")
        image = self.images.get(annotation["image_id"])
        if image is None and annotation["image_id"] in self.listed["images"]:
            return  # an image that cannot be used
        if image is None:
            what = f"image_id {annotation['image_id']!r} is not listed"
            if (twin := self.by_text.get(str(annotation["image_id"]))) is None:
                self.error("unknown image", where, what, "Add the image or remove the annotation.")
            else:
                advice = "Write both as numbers, or both as texts."
                self.error("unknown image", where, f"{what}, but {twin!r} is", advice)
            return
        height, width = image["height"], image["width"]
        self._box(annotation.get("bbox"), where, height, width)
        area = annotation.get("area", 0)
        for wrong, kind, what, advice in (
            *((annotation.get(key, 0) not in (0, 1), "flag", f"{key} is {annotation.get(key)!r}",
               "Expected 0 or 1, as numbers.") for key in ("iscrowd", "ignore")),
            (annotation.get("ignore", 0) == 1, "flag", "ignore is 1, which Detectron2 does not support",
             "Set iscrowd instead, or remove the annotation."),
            (not isinstance(area, (int, float)) or not 0 <= area < float("inf"), "area", f"area is {area!r}",
             "Give it in px, or leave it out."),
        ):  # fmt: skip
            if wrong:
                self.error(kind, where, what, advice)
        self._segmentation(annotation.get("segmentation"), masked, where, height, width)
        if all(p.level == "warning" for p in self.problems[before:]):
            self.objects.add(annotation, height, width)

    def _segmentation(self, segmentation: Any, masked: bool, where: str, height: int, width: int) -> None:
        if isinstance(segmentation, dict):
            if defect := run_length_defect(segmentation, height, width):
                self.error("run lengths", where, defect, "Encode the mask again from the image's own size.")
        elif isinstance(segmentation, list) and (segmentation or masked):
            for level, defect in polygon_defect(segmentation, height, width):
                note = self.error if level == "error" else self.warn
                note("polygon", where, defect, "Correct the polygon or remove the annotation.")
        elif segmentation:
            advice = "Expected polygons (lists of coordinates) or run lengths (size and counts)."
            self.error("segmentation", where, f"is a {type(segmentation).__name__}", advice)
        elif masked:
            what = "has no segmentation, others have one"
            self.error("mask missing", where, what, "Give every object a mask or none.")

    def _box(self, box: Any, where: str, height: int, width: int) -> None:
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
            self.error("box", where, f"bbox is {box!r}", "Expected four numbers [x, y, width, height].")
            return
        x, y, w, h = box
        if not all(abs(value) <= HUGE for value in box):  # of NaN, too
            self.error("box", where, f"bbox {box} is not finite or huge", "Correct the box.")
        elif w <= 0 or h <= 0:
            self.warn("degenerate box", where, f"bbox {box} has no area", "Correct the box.")
        elif x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            self.warn("box outside", where, f"bbox {box} leaves the image of {width} x {height} px", "Clip it.")


class _Objects:
    """Counts over all objects of a set, which show mistakes that no single annotation does: swapped axes, say."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.per_image: Counter[Any] = Counter()
        self.per_class: Counter[tuple[Any, int]] = Counter()
        self.keys: set[int] = set()

    def add(self, annotation: Mapping[str, Any], height: int, width: int) -> None:
        """Count an annotation whose box and segmentation are well-formed, of an image of (height, width)."""
        box, crowd = annotation["bbox"], bool(annotation.get("iscrowd", 0))
        corners = (box[0], box[1], box[0] + box[2], box[1] + box[3])
        masked, small = bool(annotation.get("segmentation")), min(height, width) <= 4
        shape, mask_area = extent(annotation["segmentation"]) if masked else (corners, box[2] * box[3])
        within = min(width, shape[2]) - max(0, shape[0]), min(height, shape[3]) - max(0, shape[1])
        area = annotation.get("area", mask_area)
        seen = {
            "all": True,
            "crowds": crowd,
            "boxes in 0..1": 0 <= min(box) and max(box) <= 1 and not small,
            "polygons in 0..1": masked and 0 <= min(shape) and max(shape) <= 1 and not small,
            "learnable": not crowd and min(within) >= 1,
            "corners": not masked and box[0] < box[2] <= width + 1 and box[1] < box[3] <= height + 1,
            "leaves": not masked and (corners[2] > width + 1 or corners[3] > height + 1),
            "areas disagree": mask_area >= 4 and not mask_area / 4 <= area <= 4 * mask_area,
        }
        if not crowd:
            place = annotation["image_id"], annotation["category_id"]
            self.per_image[place[0]] += 1
            self.per_class[place] += 1
            key = hash((*place, *box, *shape))
            seen["copies"] = key in self.keys
            self.keys.add(key)
        seen["areas are 0"] = seen["areas disagree"] and area == 0
        if masked and not seen["boxes in 0..1"] and not seen["polygons in 0..1"] and _iou(corners, shape) < 0.5:
            seen["masks disagree"] = True
            seen["masks agree as corners"] = _iou(box, shape) > 0.7
            seen["masks agree if swapped"] = _iou(corners, (shape[1], shape[0], shape[3], shape[2])) > 0.7
        self.counts.update(key for key, value in seen.items() if value)

    def problems(self, rules: Rules) -> Iterator[tuple[Level, str, str, str, str]]:
        """Yield (level, kind, where, what, remedy) of each mistake that many objects share."""
        n, total = self.counts, self.counts["all"]
        of = f"of {total} objects have"
        if total and not n["learnable"]:
            causes = [f"{n[key]} {key}" for key in ("crowds", "polygons in 0..1", "boxes in 0..1") if n[key]]
            what = f"none of {total} objects can be learnt: {', '.join(causes) or 'none lies in its image'}"
            advice = "Coordinates are px of the image, and iscrowd 1 marks groups that are not trained on."
            yield "error", "nothing to learn", "annotations", what, advice
        as_corners, swapped = n["masks agree as corners"], n["masks agree if swapped"]
        if not n["masks disagree"] and n["corners"] == total and 10 * n["leaves"] >= total:
            as_corners = total
        apart = n["masks disagree"] if n["masks disagree"] > as_corners >= swapped else 0
        zero = f" ({n['areas are 0']} an area of 0)" if n["areas are 0"] else ""
        normalised = "Multiply them by its width and height: COCO's format counts px."
        for count, kind, what, advice in (
            (n["copies"], "copies", "the image, class and box of another one",
             "Remove the copies: they are learnt twice, and evaluation counts all but one as missed."),
            (n["crowds"] if 2 * n["crowds"] > total else 0, "crowds",
             "iscrowd 1, and are neither trained on nor counted", "Set iscrowd 0 for single objects."),
            *((n[key], key, f"{key}, as if normalised by the image's size", normalised)
              for key in ("polygons in 0..1", "boxes in 0..1")),
            (as_corners, "boxes as corners", "a bbox that seems to be x0, y0, x1, y1",
             "COCO's format has x, y, width, height."),
            (swapped if swapped > as_corners else 0, "swapped axes",
             "masks that fit their boxes if x and y are swapped", "COCO's format has x before y in both."),
            (apart, "boxes and masks", "a bbox and a segmentation that disagree",
             "Scale both to px of the image, or compute bbox anew."),
            (n["areas disagree"], "areas", f"an area that is not that of their shape{zero}",
             "Small, medium and large objects go by it, and LVIS drops objects of area 0: leave it out."),
        ):  # fmt: skip
            if count:
                yield "warning", kind, "annotations", f"{count} {of} {what}", advice
        for kind, what, advice in self._limits(rules) if rules.counted else ():
            yield "warning", kind, "annotations", what, advice

    def _limits(self, rules: Rules) -> Iterator[tuple[str, str, str]]:
        """Yield (kind, what, remedy) where images have more objects than are predicted or counted."""
        most = max(self.per_class.values(), default=0)
        if most > rules.counted:
            many = len({image for (image, _), count in self.per_class.items() if count > rules.counted})
            what = f"{many} image(s) have more than {rules.counted} objects of a class (up to {most}), and COCO's "
            what += f"figures count the best {rules.counted} predictions of each image and class"
            yield "many objects", what, f"Set TEST.MAX_DETECTIONS {most} to count all."
        most = max(self.per_image.values(), default=0)
        if 0 < rules.predicted < most:
            many = sum(count > rules.predicted for count in self.per_image.values())
            what = f"{many} image(s) have more than {rules.predicted} objects (up to {most}), and the model gives "
            yield "few predictions", f"{what}{rules.predicted} predictions", f"Set TEST.DETECTIONS_PER_IMAGE {most}."


def _iou(one: Sequence[float], other: Sequence[float]) -> float:
    """The intersection over union of two boxes x0, y0, x1, y1."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    union = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)) - shared
    return shared / union if union > 0 else 1.0


def _plain(name: str) -> str:
    """A file's name without what differs between systems: case, the form of accents, %20 for a space."""
    return unicodedata.normalize("NFC", unquote(name)).lower()
