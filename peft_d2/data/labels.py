"""Label images: reading them, and what can be wrong with them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from peft_d2.compat import require_cityscapes
from peft_d2.data.images import DatasetError, read_header

Row = tuple[Literal["error", "warning"], str, str, str, str]  # level, kind, where, what, remedy
_AGAIN = "Write label images with one channel, whose values are class numbers from 0."
_TRUTHS = {  # what the evaluations of Cityscapes read, by evaluator_type
    "cityscapes_instance": ("instanceIds",),
    "cityscapes_sem_seg": ("labelIds",),
    "cityscapes_panoptic_seg": ("instanceIds", "labelIds"),
}


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
) -> Iterator[Row]:
    """What is wrong with the images and label images of a set's records.

    Args:
        records: Detectron2's, with ``sem_seg_file_name``, ``pan_seg_file_name`` or both. Of panoptic sets, whose
            segments are listed apart, only the headers are read.
        classes: names of the classes, none if they are not known.
        ignore: the value that means "no label".
        as_grey: the model reads them with Detectron2's mapper, which turns palettes into brightness.
    """
    faults: list[Row] = []
    values: Counter[int] = Counter()
    with ThreadPoolExecutor(max_workers=8) as pool:
        for record, (fault, found) in zip(records, pool.map(partial(_label, as_grey), records), strict=True):
            values.update(found)
            unknown = sorted(v for v in found if v != ignore and not 0 <= v < (len(classes) or v + 1))
            if unknown and not fault:
                what = f"has the value(s) {', '.join(map(str, unknown[:5]))}, but there are {len(classes)} classes "
                what += f"(0 to {len(classes) - 1}), and {ignore} means no label"
                fault = "label values", record["sem_seg_file_name"], what, _AGAIN
            if fault:
                faults.append(("error", *fault))
    if values and set(values) <= {0, 255} and len(values) == 2 and len(classes) >= 2:
        what = f"the labels hold 0 and 255 alone, but there are {len(classes)} classes"
        what += ", and 255 means no label: nothing but the class 0 would be learnt" if ignore == 255 else ""
        faults = [("error", "label values", records[0]["sem_seg_file_name"], what, "Write 1 in place of 255.")]
    yield from faults
    if values and not faults:
        for number, name in enumerate(classes):
            if not values[number]:
                yield (
                    "warning",
                    "empty class",
                    f"class {number} {name!r}",
                    "is in no label image",
                    ("It is never learnt, and its IoU is nan."),
                )


def unpaired(image_root: str, label_root: str) -> Iterator[Row]:
    """Images without a label image of the same name, and the reverse, which Detectron2's loader leaves out."""
    images, labels = (
        {str(path.relative_to(root).with_suffix("")): path for path in sorted(Path(root).rglob("*")) if path.is_file()}
        for root in (image_root, label_root)
    )
    for found, other, what in ((images, labels, "image(s) have no label image"), (labels, images, "label image(s) have "
                               "no image")):  # fmt: skip
        alone = [found[stem] for stem in found.keys() - other.keys()]
        if alone and len(alone) < len(found):
            text = f"{len(alone)} {what} of the same name, and would be left out"
            yield "warning" if found is images else "error", "unpaired", str(min(alone)), text, "Add or remove them."


def _label(as_grey: bool, record: Mapping[str, Any]) -> tuple[tuple[str, str, str, str] | None, Mapping[int, int]]:
    """(kind, where, what, remedy) of what is wrong with a record's files, None if nothing; the label's values."""
    keys = [key for key in ("file_name", "sem_seg_file_name", "pan_seg_file_name") if key in record]
    sizes = {}
    for key in keys:
        path = record[key]
        if "://" in path:
            return None, {}
        if not os.path.isfile(path):
            return ("missing file", path, "is no file", "Put it there or take the image out of the set."), {}
        sizes[key], defect, advice = read_header(path)
        if defect and not (key == "sem_seg_file_name" and sizes[key] != (0, 0)):  # labels may have more than 8 bits
            return ("unreadable file", path, defect, advice), {}
    for key in keys[1:]:
        if sizes[key] != sizes["file_name"]:
            what = f"is {sizes[key][0]} x {sizes[key][1]} px, its image {record['file_name']} "
            what += f"{sizes['file_name'][0]} x {sizes['file_name'][1]}"
            return ("sizes disagree", record[key], what, "They have to agree."), {}
    if "sem_seg_file_name" not in record or "pan_seg_file_name" in record:
        return None, {}
    path = record["sem_seg_file_name"]
    try:
        with Image.open(path) as opened:
            labels = np.asarray(opened)
            same = not as_grey or np.array_equal(labels, np.asarray(opened.convert("L")))
    except (OSError, SyntaxError, ValueError) as error:
        return ("unreadable file", path, f"cannot be read ({error})", "Replace the file."), {}
    if labels.ndim != 2:
        return ("label channels", path, f"is a colour image ({opened.mode}), no class numbers", _AGAIN), {}
    if not same:
        what = f"has the mode {opened.mode}, of which Detectron2's own models would read the brightness, not the number"
        return ("label mode", path, what, "Write it as 8-bit grey (mode L)."), {}
    if not np.issubdtype(labels.dtype, np.integer) and labels.dtype != bool:
        return ("label values", path, f"holds {labels.dtype}, no whole numbers", _AGAIN), {}
    found, counts = np.unique(labels.astype(np.int64), return_counts=True)
    return None, dict(zip(found.tolist(), counts.tolist(), strict=True))


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
    images, truth = (Path(meta.get(key, "")) for key in ("image_dir", "gt_dir"))
    stems = {path.relative_to(images).as_posix().removesuffix("_leftImg8bit.png") for path in images.glob("*/*.png")}
    if not stems:
        raise DatasetError(f"data set {name!r}: {images} has no <city>/*_leftImg8bit.png.")
    for wanted in _TRUTHS.get(kind, ()):
        ending = f"_gtFine_{wanted}.png"
        labelled = {path.relative_to(truth).as_posix().removesuffix(ending) for path in truth.glob(f"*/*{ending}")}
        for some, others, text in ((stems, labelled, "have no label image"), (labelled, stems, "have no image")):
            if missing := sorted(some - others):
                raise DatasetError(
                    f"data set {name!r}: {len(missing)} of {len(some)} {'images' if some is stems else 'label images'} "
                    f"{text}, e.g. {missing[0]!r}: {truth}/<city>/*{ending} and {images}/<city>/*_leftImg8bit.png have "
                    "to be the same. Unpack the published archives again."
                )
