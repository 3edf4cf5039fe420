"""Checks of a COCO-format set, so that training refuses what would crash it or spoil it before it starts.

An *error* would crash training or evaluation, or train on something else than was meant; a *warning* is worth a look.
The json alone is read, and of each image its header.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from peft_d2.data.builtin import remedy
from peft_d2.data.images import DatasetError, image_size, seems_cut_off
from peft_d2.data.label_images import require_cityscapes
from peft_d2.data.shapes import polygon_defect, run_length_defect

_HUGE = 1e6  # px
_RULES = 2  # raised when the checks change, so that no older verdict is recalled
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """One defect of a data set."""

    level: Literal["error", "warning"]
    kind: str
    where: str  # "images[id 3 a.png]", "annotations[id 7, image 3]", "categories", ...
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.level}: {self.where}: {self.what}. {self.remedy}"


def check_coco(json_path: str | Path, image_root: str | Path, *, open_images: bool = True) -> list[Problem]:
    """All problems of a COCO-format set, errors first.

    That a set has no errors is remembered in ``~/.cache/peft_d2`` for as long as the json and the image folder stay as
    they are (by size and time of change); a set with errors is checked anew each time.

    Args:
        json_path: the set's json.
        image_root: the folder that its file names are relative to.
        open_images: also compare the sizes in the images' headers with the json's.
    """
    json_path, image_root = str(json_path), str(image_root)
    if not os.path.isfile(json_path):
        return [Problem("error", "missing json", json_path, "is no file", "Give the path of a COCO-format json.")]
    if not os.path.isdir(image_root):
        what = "is a file, not a folder" if os.path.isfile(image_root) else "is no folder"
        return [Problem("error", "missing folder", image_root, what, "Give the folder of the images, unpacked.")]
    memory = _memory(json_path, image_root, open_images)
    problems = _recall(memory)
    if problems is None:
        problems = _check(json_path, image_root, open_images)
        if all(p.level == "warning" for p in problems):
            _remember(memory, problems)
    return problems


def check_datasets(cfg: Any) -> None:
    """Check every set that the config trains or tests on; warnings are logged.

    COCO-format sets are checked in full. Of others, files and folders have to be there, and what Detectron2 needs to
    read them.

    Raises:
        DatasetError: naming each error (the first of each kind in full) and its remedy.
    """
    from detectron2.data import MetadataCatalog

    if not cfg.DATASETS.get("CHECK", True):
        return
    for name in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
        meta = MetadataCatalog.get(name).as_dict()
        if meta.get("evaluator_type") != "coco" or "panoptic_json" in meta or not meta.get("json_file"):
            _check_files(name, meta)
            continue
        problems = check_coco(meta["json_file"], meta["image_root"])
        for line in summary([p for p in problems if p.level == "warning"]):
            logger.warning("data set %r: %s", name, line)
        errors = [p for p in problems if p.level == "error"]
        if errors:
            lines = "\n  ".join(summary(errors))
            hint = remedy(name) if errors[0].kind in ("missing json", "missing folder") else ""
            raise DatasetError(
                f"data set {name!r} ({meta['json_file']}) has {len(errors)} error(s):\n  {lines}\n"
                f"{hint or 'tools/check_dataset.py lists them all. DATASETS.CHECK False trains all the same.'}"
            )


def _check_files(name: str, meta: dict[str, Any]) -> None:
    """Refuse a set whose files or folders are not there, or that a package is missing for."""
    kind = meta.get("evaluator_type", "")
    if kind.startswith("cityscapes"):
        try:
            require_cityscapes(polygons=kind == "cityscapes_instance")
        except ModuleNotFoundError as error:
            raise DatasetError(f"data set {name!r}: {error}") from error
    keys = ["image_root", "image_dir", "gt_dir", "panoptic_root", "panoptic_json", "sem_seg_root"]
    for key in [*keys, "json_file"] if kind == "lvis" else keys:
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


def _check(json_path: str, image_root: str, open_images: bool) -> list[Problem]:
    content = Path(json_path).read_bytes()
    if content[:2] in (b"PK", b"\x1f\x8b"):
        return [Problem("error", "not json", json_path, "is an archive", "Unpack it.")]
    try:
        data = json.loads(content.decode("utf-8"))  # which Detectron2 reads, without a byte order mark
    except ValueError as error:
        return [Problem("error", "not json", json_path, f"is not json in UTF-8 ({error})", "Write it again.")]
    return _Check(data, Path(image_root), open_images).run()


def _memory(json_path: str, image_root: str, open_images: bool) -> Path:
    """File that remembers the warnings of a set without errors, named by the set's state."""
    stat, folder = os.stat(json_path), os.stat(image_root)
    state = [os.path.abspath(json_path), os.path.abspath(image_root), open_images, _RULES]
    state += [stat.st_mtime_ns, stat.st_size, folder.st_mtime_ns]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "peft_d2" / "checks" / f"{hashlib.sha256(repr(state).encode()).hexdigest()}.json"


def _remember(memory: Path, problems: list[Problem]) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps([asdict(p) for p in problems]))
    except OSError as error:
        logger.debug("the result of the check is not kept: %s", error)


def _recall(memory: Path) -> list[Problem] | None:
    try:
        return [Problem(**entry) for entry in json.loads(memory.read_text())]
    except (OSError, ValueError, TypeError):
        return None


class _Check:
    """One pass over a json."""

    def __init__(self, data: Any, image_root: Path, open_images: bool) -> None:
        self.data, self.image_root, self.open_images = data, image_root, open_images
        self.problems: list[Problem] = []
        self.images: dict[Any, dict[str, Any]] = {}

    def add(self, level: Literal["error", "warning"], kind: str, where: str, what: str, remedy: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(level, kind, where, what, remedy))

    def run(self) -> list[Problem]:
        """All problems, errors first; where a list is missing nothing else is looked at."""
        for key in ("images", "annotations", "categories"):
            if not isinstance(self.data, dict) or not isinstance(self.data.get(key), list):
                self.add("error", "layout", key, "is missing or no list", "A COCO-format json has three lists.")
                return self.problems
        self._categories()
        self._images()
        self._annotations()
        return sorted(self.problems, key=lambda p: p.level != "error")

    def _entries(self, key: str, needed: dict[str, type | tuple[type, ...]]) -> Iterable[dict[str, Any]]:
        """The entries of a list that have what is needed."""
        for position, entry in enumerate(self.data[key]):
            lacking = [k for k, t in needed.items() if not isinstance(entry, dict) or not isinstance(entry.get(k), t)]
            if lacking:
                where = f"{key}[{position}]"
                self.add("error", "incomplete entry", where, f"lacks a usable {', '.join(lacking)}", "Add it.")
            else:
                yield entry

    def _duplicates(self, key: str, ids: list[Any]) -> None:
        for value, count in Counter(ids).items():
            if count > 1:
                self.add("error", f"duplicate id in {key}", f"{key}[id {value}]", f"the id is used {count} times",
                         "Every id must be unique in its list.")  # fmt: skip

    def _categories(self) -> None:
        entries = list(self._entries("categories", {"id": int, "name": str}))
        self.category_ids = {c["id"] for c in entries}
        self._duplicates("categories", [c["id"] for c in entries])
        for name, count in Counter(c["name"] for c in entries).items():
            if count > 1:
                self.add("warning", "duplicate name", f"categories[{name}]", f"{count} categories have this name",
                         "Merge them or rename one.")  # fmt: skip
        if not entries:
            self.add("error", "no categories", "categories", "is empty", "List at least one {id, name}.")
        self.category_names = {c["id"]: c["name"] for c in entries}

    def _images(self) -> None:
        needed: dict[str, Any] = {"id": (int, str), "file_name": str, "height": int, "width": int}
        entries = list(self._entries("images", needed))
        self.images = {i["id"]: i for i in entries}
        self._duplicates("images", [i["id"] for i in entries])
        for name, count in Counter(i["file_name"] for i in entries).items():
            if count > 1:
                self.add("warning", "duplicate file", f"images[{name}]", f"{count} images are this file",
                         "Merge their annotations.")  # fmt: skip
        if not entries:
            self.add("error", "no images", "images", "is empty", "List at least one image.")
        with ThreadPoolExecutor(max_workers=8) as pool:
            for image, defect in zip(entries, pool.map(self._file_defect, entries, chunksize=64), strict=True):
                if defect:
                    self.add(defect[0], defect[1], _image(image), defect[2], "Correct the json or the file.")

    def _file_defect(self, image: dict[str, Any]) -> tuple[Literal["error", "warning"], str, str] | None:
        """(level, kind, what is wrong) of an image's file, None when nothing is."""
        given = (image["width"], image["height"])
        if min(given) < 1:
            return "error", "image size", f"the json gives {given[0]} x {given[1]} px"
        path = self.image_root / image["file_name"]
        if not path.is_file():
            return "error", "missing file", f"{path} is no file"
        if self.open_images:
            try:
                found = image_size(path)
            except DatasetError as error:
                return "error", "unreadable file", str(error)
            if found != given:
                what = f"the file is {found[0]} x {found[1]} px, the json says {given[0]} x {given[1]}"
                return "error", "sizes disagree", what
            if seems_cut_off(path):
                return "warning", "cut off", f"{path} has no end: it may have been copied in part"
        name = os.path.normpath(image["file_name"])
        if os.path.isabs(name) or name.startswith(".."):
            return "warning", "outside the folder", f"the file lies outside {self.image_root}"
        return None

    def _annotations(self) -> None:
        needed: dict[str, Any] = {"id": int, "image_id": (int, str), "category_id": int}
        entries = list(self._entries("annotations", needed))
        self._duplicates("annotations", [a["id"] for a in entries])
        per_category: Counter[int] = Counter()
        masked = 0
        unmasked: list[dict[str, Any]] = []
        for annotation in entries:
            per_category[annotation["category_id"]] += 1
            self._annotation(annotation)
            if annotation.get("segmentation") is None:
                unmasked.append(annotation)
            else:
                masked += 1
        if masked:
            for annotation in unmasked:
                self.add("error", "mask missing", _annotation(annotation), "has no segmentation, others have one",
                         "Give every object a mask or none.")  # fmt: skip
        elif unmasked:
            self.add("warning", "no masks", "annotations", "none has a segmentation", "Only boxes can be trained on.")
        for category, name in self.category_names.items():
            if not per_category[category]:
                self.add("warning", "empty class", f"categories[id {category} {name}]", "no object is of this class",
                         "It is never learnt, and its AP is nan.")  # fmt: skip
        if not entries:
            self.add("warning", "no annotations", "annotations", "is empty", "There is nothing to learn.")

    def _annotation(self, annotation: dict[str, Any]) -> None:
        where = _annotation(annotation)
        if annotation["category_id"] not in self.category_ids:
            self.add("error", "unknown category", where, f"category_id {annotation['category_id']} is not listed",
                     f"Expected one of {_few(self.category_ids)}.")  # fmt: skip
        image = self.images.get(annotation["image_id"])
        if image is None:
            self.add("error", "unknown image", where, f"image_id {annotation['image_id']!r} is not listed",
                     "Add the image or remove the annotation.")  # fmt: skip
            return
        size = image["height"], image["width"]
        self._box(annotation, where, *size)
        self._flags(annotation, where)
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, dict):
            defect = run_length_defect(segmentation, *size)
            if defect:
                self.add("error", "run lengths", where, defect, "Encode the mask again from the image's own size.")
        elif isinstance(segmentation, list):
            for level, defect in polygon_defect(segmentation, *size):
                self.add(level, "polygon", where, defect, "Correct the polygon or remove the annotation.")
        elif segmentation is not None:
            self.add("error", "segmentation", where, f"is a {type(segmentation).__name__}",
                     "Expected polygons (lists of coordinates) or run lengths (size and counts).")  # fmt: skip

    def _flags(self, annotation: dict[str, Any], where: str) -> None:
        for key in ("iscrowd", "ignore"):
            if annotation.get(key, 0) not in (0, 1):
                self.add("error", "flag", where, f"{key} is {annotation[key]!r}", "Expected 0 or 1, as numbers.")
        if annotation.get("ignore", 0) == 1:
            self.add("error", "flag", where, "ignore is 1, which Detectron2 does not support",
                     "Set iscrowd instead, or remove the annotation.")  # fmt: skip
        area = annotation.get("area", 0)
        if not isinstance(area, (int, float)) or not 0 <= area < float("inf"):
            self.add("error", "area", where, f"area is {area!r}", "Give it in px, or leave it out.")

    def _box(self, annotation: dict[str, Any], where: str, height: int, width: int) -> None:
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
            self.add("error", "box", where, f"bbox is {box!r}", "Expected four numbers [x, y, width, height].")
            return
        x, y, w, h = box
        if not np.isfinite(box).all() or max(map(abs, box)) > _HUGE:
            self.add("error", "box", where, f"bbox {box} is not finite or huge", "Correct the box.")
        elif w <= 0 or h <= 0:
            self.add("warning", "degenerate box", where, f"bbox {box} has no area", "Correct the box.")
        elif x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            self.add("warning", "box outside", where, f"bbox {box} leaves the image of {width} x {height} px",
                     "Clip it.")  # fmt: skip


def _image(image: dict[str, Any]) -> str:
    return f"images[id {image['id']} {image['file_name']}]"


def _annotation(annotation: dict[str, Any]) -> str:
    return f"annotations[id {annotation['id']}, image {annotation['image_id']}]"


def _few(values: Iterable[Any], limit: int = 12) -> str:
    rows = sorted(values)
    return ", ".join(map(str, rows[:limit])) + (", ..." if len(rows) > limit else "")
