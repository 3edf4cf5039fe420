"""Checks of sets without a COCO json: records, label images, panoptic jsons, Cityscapes; and reading label images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from peft_d2.compat import require_cityscapes
from peft_d2.data.images import DatasetError, read_header
from peft_d2.data.segmentation import Level, panoptic_ids

_WHOLE: tuple[type, ...] = (int, np.integer)
_AGAIN = "Write label images with one channel, whose values are class numbers from 0."
_MOST_READ = 5000  # panoptic images of a set of which each pixel is looked at, evenly spread
_TRUTHS = {  # what Detectron2's loaders and the evaluations of Cityscapes read, by evaluator_type
    "cityscapes_instance": ("instanceIds.png", "labelIds.png", "polygons.json"),
    "cityscapes_sem_seg": ("labelIds.png", "labelTrainIds.png", "polygons.json"),
    "cityscapes_panoptic_seg": ("instanceIds.png", "labelIds.png", "labelTrainIds.png"),
}


class Problem(NamedTuple):
    """One defect of a data set."""

    level: Level
    kind: str
    where: str  # "images[id 3 a.png]", "annotations[id 7, image 3]", "categories", ...
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.level}: {self.where}: {self.what}. {self.remedy}"


def repeated(values: Iterable[Any]) -> list[tuple[Any, int]]:
    """Each value that is there more than once, and how often."""
    return [(value, count) for value, count in Counter(values).items() if count > 1]


class _Fault(Exception):
    """A defect of one file; its arguments are those of :class:`Problem` after the level."""


def read_labels(path: str) -> np.ndarray:
    """(H, W) label image; 16-bit labels become float, which Detectron2's transforms can resize.

    Raises:
        DatasetError: it has several channels.
    """
    from detectron2.data import detection_utils

    labels = detection_utils.read_image(path)
    if labels.ndim != 2:
        raise DatasetError(f"{path}: a semantic label image of {labels.shape}; expected one channel of class numbers.")
    return labels if labels.dtype == np.uint8 else labels.astype(np.float64)


def check_labels(
    records: Sequence[Mapping[str, Any]], classes: Sequence[str], ignore: int, as_grey: bool = False
) -> Iterator[Problem]:
    """What is wrong with the images and label images of a set's records.

    Args:
        records: Detectron2's, with ``sem_seg_file_name``, ``pan_seg_file_name`` or both. Of panoptic sets of more than
            5,000 images, so many are read, of the others the headers.
        classes: names of the classes, none if they are not known.
        ignore: the value that means "no label".
        as_grey: the model reads them with Detectron2's mapper, which turns palettes into brightness.
    """
    step = -(-len(records) // _MOST_READ) or 1
    read = {id(record) for record in records[::step] if "pan_seg_file_name" in record}

    def look(record: Mapping[str, Any]) -> tuple[dict[int, int], dict[str, int], _Fault | None]:
        """How many pixels have each value, how many segments are apart, and the fault of a record's files."""
        found: dict[int, int] = {}
        apart: dict[str, int] = {}
        try:
            found = _label_values(record, as_grey)
            apart = _segments_apart(record) if id(record) in read else {}
            if unknown := sorted(v for v in found if v != ignore and not 0 <= v < (len(classes) or v + 1)):
                what = f"has the value(s) {', '.join(map(str, unknown[:5]))}, but there are {len(classes)} classes "
                what += f"(0 to {len(classes) - 1}), and {ignore} means no label"
                raise _Fault("label values", record["sem_seg_file_name"], what, _AGAIN)
        except _Fault as fault:
            return found, apart, fault
        return found, apart, None

    values, apart, faults = Counter[int](), Counter[str](), list[Problem]()
    with ThreadPoolExecutor(max_workers=8) as pool:
        for found, segments, fault in pool.map(look, records):
            values.update(found)
            apart.update(segments)
            faults += [Problem("error", *fault.args)] if fault else []
    if set(values) == {0, 255} and len(classes) >= 2:
        what = f"the labels hold 0 and 255 alone, but there are {len(classes)} classes"
        what += ", and 255 means no label: nothing but the class 0 would be learnt" if ignore == 255 else ""
        faults = [Problem("error", "label values", records[0]["sem_seg_file_name"], what, "Write 1 in place of 255.")]
    yield from faults
    for what in +apart:
        advice = "Write segments_info and the image from the same source."
        yield Problem("warning", "segments", "panoptic images", f"{apart[what]} {what}", advice)
    for number, name in enumerate(classes if values and not faults else ()):
        if not values[number]:
            where, advice = f"class {number} {name!r}", "It is never learnt, and its IoU is nan."
            yield Problem("warning", "empty class", where, "is in no label image", advice)


def _label_values(record: Mapping[str, Any], as_grey: bool) -> dict[int, int]:
    """Check the sizes of a record's files, and return how many pixels of its label image have each value.

    Of panoptic records no pixel is looked at here. A defect is raised as :class:`_Fault`.
    """
    sizes = {}
    for key in [key for key in ("file_name", "sem_seg_file_name", "pan_seg_file_name") if key in record]:
        path = record[key]
        if "://" in path:
            return {}
        if not os.path.isfile(path):
            raise _Fault("missing file", path, "is no file", "Put it there or take the image out of the set.")
        sizes[key], defect, advice = read_header(path)
        if defect and not (key == "sem_seg_file_name" and sizes[key] != (0, 0)):  # labels may have more than 8 bits
            raise _Fault("unreadable file", path, defect, advice)
        if sizes[key] != sizes["file_name"]:
            one, other = ("{} x {}".format(*sizes[k]) for k in (key, "file_name"))
            what = f"is {one} px, its image {record['file_name']} {other}"
            raise _Fault("sizes disagree", path, what, "They have to agree.")
    if "sem_seg_file_name" not in record or "pan_seg_file_name" in record:
        return {}
    path = record["sem_seg_file_name"]
    try:
        with Image.open(path) as opened:
            labels, mode = np.asarray(opened), opened.mode
            same = not as_grey or np.array_equal(labels, np.asarray(opened.convert("L")))
    except (OSError, SyntaxError, ValueError) as error:
        raise _Fault("unreadable file", path, f"cannot be read ({error})", "Replace the file.") from error
    if labels.ndim != 2:
        raise _Fault("label channels", path, f"is a colour image ({mode}), no class numbers", _AGAIN)
    if not same:
        what = f"has the mode {mode}, of which Detectron2's own models would read the brightness, not the number"
        raise _Fault("label mode", path, what, "Write it as 8-bit grey (mode L).")
    if not np.issubdtype(labels.dtype, np.integer) and labels.dtype != bool:
        raise _Fault("label values", path, f"holds {labels.dtype}, no whole numbers", _AGAIN)
    return dict(zip(*(part.tolist() for part in np.unique(labels.astype(np.int64), return_counts=True)), strict=True))


def _segments_apart(record: Mapping[str, Any]) -> dict[str, int]:
    """How many segments of a panoptic record are in its list alone, and how many in its image alone.

    Raises:
        _Fault: an id is listed twice, the image cannot be read, or none of its colours is a listed id.
    """
    path, listed = record["pan_seg_file_name"], {s["id"] for s in record["segments_info"]}
    for number, count in repeated(s["id"] for s in record["segments_info"]):
        what = f"the segment id {number} is listed {count} times in its segments_info"
        raise _Fault("segments", path, what, "Each segment needs its own.")
    try:
        with Image.open(path) as opened:
            form, ids = f"{opened.format}, {opened.mode}", panoptic_ids(np.asarray(opened.convert("RGB"))).ravel()
    except (OSError, SyntaxError, ValueError) as error:
        raise _Fault("unreadable file", path, f"cannot be read ({error})", "Replace the file.") from error
    firsts = ids[np.append(True, ids[1:] != ids[:-1])]  # of equal ones in a row: few are left to be put in order
    seen = set(np.unique(firsts).tolist()) - {0}
    if listed and not seen & listed:
        known, given = (", ".join(map(str, sorted(ids)[:3])) or "none" for ids in (seen, listed))
        what = f"its colours ({known}; {form}) are none of the ids of its segments_info ({given})"
        raise _Fault("segments", path, what, "Write an RGB PNG of red + 256 green + 65536 blue = id.")
    return {
        "segment(s) of segments_info have no pixel, and are never learnt": len(listed - seen),
        "colour(s) of images are in no segments_info, and count as not annotated": len(seen - listed),
    }


def image_key(number: Any) -> Any:
    """An image's id as Detectron2's loader of panoptic jsons gives it: "0012" is 12."""
    return int(number) if isinstance(number, str) and number.isdecimal() else number


def check_panoptic(data: Any, things: Collection[int], stuff: Collection[int]) -> Iterator[Problem]:
    """What is wrong with the lists of a panoptic json.

    Args:
        data: the json.
        things, stuff: category ids by the set's metadata; ``stuff`` may hold all.
    """
    lists = [data.get(key) if isinstance(data, dict) else None for key in ("annotations", "categories")]
    rows = [[row if isinstance(row, dict) else {} for row in part or ()] for part in lists]
    if not all(rows) or not all("segments_info" in row and "file_name" in row for row in rows[0]):
        what = "is no panoptic json: it lists no categories, or annotations without file_name or segments_info"
        yield Problem("error", "layout", "annotations", what, "Give the panoptic json, not that of single objects.")
        return
    kinds = {row.get("id"): row.get("isthing") for row in rows[1]}
    if lacking := [number for number, kind in kinds.items() if kind not in (0, 1)]:
        what, advice = "does not say whether it is a thing", 'Add "isthing": 1 for things, 0 for stuff.'
        yield Problem("error", "isthing", f"categories[id {lacking[0]}]", what, advice)
    elif apart := [number for number, kind in kinds.items() if bool(kind) != (number in things)]:
        what = f"{len(apart)} of {len(kinds)} categories are things in the json and stuff in the set, or the reverse"
        yield Problem("error", "isthing", f"categories[id {apart[0]}]", what, "Correct isthing.")
    used = {segment.get("category_id") for row in rows[0] for segment in row["segments_info"]}
    for unknown in sorted(used - (kinds.keys() & {*things, *stuff}), key=str)[:3]:
        what = f"category_id {unknown!r} is not " + ("listed" if unknown not in kinds else "a class of the set")
        yield Problem("error", "unknown category", "segments_info", what, "Correct it, or the categories.")
    crowds = [bool(segment.get("iscrowd", 0)) for row in rows[0] for segment in row["segments_info"]]
    if crowds and all(crowds):
        what, advice = f"all {len(crowds)} are crowds, of which nothing is learnt or judged", "Set iscrowd 0."
        yield Problem("error", "crowds", "segments_info", what, advice)
    for number, count in repeated(image_key(row.get("image_id")) for row in rows[0]):
        what, advice = f"is there {count} times", "A panoptic json has one annotation an image."
        yield Problem("error", "duplicate id", f"annotations[image_id {number}]", what, advice)


def check_image_ids(records: Sequence[Mapping[str, Any]], data: Any) -> Iterator[Problem]:
    """Records of a panoptic set whose ``image_id`` the json ``data`` does not have, and the evaluation would miss."""
    known = {image_key(row["image_id"]) for row in data["annotations"] if "image_id" in row}
    if strange := [record for record in records if image_key(record.get("image_id")) not in known]:
        where = f"records[{strange[0].get('file_name')}]"
        what = f"image_id {strange[0].get('image_id')!r} is not in the panoptic json ({len(strange)} such)"
        yield Problem("error", "image_id", where, what, "Give both the same ids.")


def check_records(records: Sequence[Any], count: int, test: bool) -> Iterator[Problem]:
    """What is wrong with records that somebody's function registers, of which there is no json to look at.

    Args:
        records: Detectron2's.
        count: how many classes the set has; 0 where that is not known.
        test: the set is evaluated on, which needs more than training does.
    """
    needed: dict[str, tuple[type, ...]] = {"file_name": (str, os.PathLike)}
    needed |= {"image_id": (*_WHOLE, str), "height": _WHOLE, "width": _WHOLE} if test else {}
    if not records:
        advice = "Let the registered function return at least one."
        yield Problem("error", "no images", "records", "there are none", advice)
    for number, record in enumerate(records):
        where = f"records[{number} {record.get('file_name')}]"
        for key in (key for key, kinds in needed.items() if not isinstance(record.get(key), kinds)):
            what = f"lacks a usable {key} ({record.get(key)!r})"
            advice = "Detectron2's format of data sets says what it has to be."
            yield Problem("error", "incomplete record", where, what, advice)
        path = str(record.get("file_name", ""))
        if path and "://" not in path and not os.path.isfile(path):
            yield Problem("error", "missing file", where, "is no file", "Correct the name or put the file there.")
        if not isinstance(things := record.get("annotations", []), Sequence):
            yield Problem("error", "annotation", where, f"annotations is {things!r}", "Expected a list.")
            continue
        for position, thing in enumerate(things):
            for what, advice in _defects(thing, count, test):
                yield Problem("error", "annotation", f"{where}: annotations[{position}]", what, advice)
    ids = (record["image_id"] for record in records if test and record.get("image_id") is not None)
    for value, times in repeated(ids):
        what = f"the image_id {value!r} is that of {times} records"
        yield Problem("error", "duplicate id", "records", what, "Every image needs its own.")


def _defects(thing: Mapping[str, Any], count: int, test: bool) -> Iterator[tuple[str, str]]:
    """What is wrong with an annotation of a record, and the remedy."""
    from detectron2.structures import BoxMode

    category, box, masks = (thing.get(key) for key in ("category_id", "bbox", "segmentation"))
    if not isinstance(category, int | np.integer) or not 0 <= category < (count or category + 1):
        known = f"from 0 to {count - 1}, by the order of thing_classes" if count else "from 0"
        yield f"category_id is {category!r}", f"Expected a whole number {known}."
    if not isinstance(box, list | tuple | np.ndarray) or len(box) not in (4, 5):
        yield f"bbox is {box!r}", "Expected four numbers, as bbox_mode says."
    elif thing.get("bbox_mode") not in list(BoxMode):
        expected = "Expected BoxMode.XYXY_ABS, BoxMode.XYWH_ABS or another of it."
        yield f"bbox_mode is {thing.get('bbox_mode')!r}", expected
    if isinstance(masks, dict) and not isinstance(masks.get("counts"), str | bytes) and test:
        yield "its run lengths are not compressed", "Compress them with pycocotools.mask.frPyObjects."


def unpaired(image_root: str, label_root: str) -> Iterator[Problem]:
    """Warn of images without a label image of the same name, and of the reverse: Detectron2's loader drops them."""
    images, labels = (
        {str(path.relative_to(root).with_suffix("")): path for path in sorted(Path(root).rglob("*")) if path.is_file()}
        for root in (image_root, label_root)
    )
    rows: tuple[tuple[Level, str, dict[str, Path], dict[str, Path]], ...] = (
        ("warning", "image(s) have no label image", images, labels),
        ("error", "label image(s) have no image", labels, images),
    )
    for level, what, found, other in rows:
        alone = [found[stem] for stem in found.keys() - other.keys()]
        if alone and len(alone) < len(found):
            text = f"{len(alone)} {what} of the same name, and would be left out"
            yield Problem(level, "unpaired", str(min(alone)), text, "Add or remove them.")


def check_cityscapes(name: str, meta: Mapping[str, Any]) -> None:
    """Refuse a set of Cityscapes whose evaluation would end the program: its scripts exit where a file is missing.

    Raises:
        DatasetError: a package is missing, or the label images of some image, or the reverse.
    """
    kind = meta["evaluator_type"]
    try:
        require_cityscapes(polygons=kind == "cityscapes_instance")
    except ModuleNotFoundError as error:
        raise DatasetError(f"data set {name!r}: {error}") from error

    truth, root = str(meta.get("gt_dir", "")), Path(meta.get("image_dir") or meta.get("image_root", ""))

    def stems(folder: str | Path, ending: str) -> set[str]:
        found = Path(folder).glob(f"*/*{ending}")
        return {path.relative_to(folder).as_posix().removesuffix(ending) for path in found}

    images = stems(root, "_leftImg8bit.png")
    if not images:
        raise DatasetError(f"data set {name!r}: {root} has no <city>/*_leftImg8bit.png.")
    others = (path for path in (*root.glob("*"), *root.glob("*/*")) if path.parent == root or path.is_file())
    if other := next((p for p in others if not (p.is_dir() or p.name.endswith("_leftImg8bit.png"))), None):
        raise DatasetError(
            f"data set {name!r}: {other} is no image of Cityscapes, and Detectron2 stops at it. Move it."
        )
    for wanted in _TRUTHS.get(kind, ()):
        ending = f"_gtFine_{wanted}"
        labels = stems(truth, ending)
        if not labels:
            writes = "tools/prepare_cityscapes.py writes them." if "Train" in wanted else "Unpack the archives again."
            raise DatasetError(f"data set {name!r}: {truth} has no <city>/*{ending}. {writes}")
        for what, missing in (("label image", images - labels), ("image", labels - images)):
            if missing:
                raise DatasetError(
                    f"data set {name!r}: {len(missing)} of {len(images | labels)} have no {what}, e.g. "
                    f"{min(missing)!r}: {truth}/<city>/*{ending} and {root}/<city>/"
                    "*_leftImg8bit.png have to be the same. Unpack the published archives again."
                )
