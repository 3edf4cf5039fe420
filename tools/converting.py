"""What the converters (prepare_*.py) share: json, command line, splits, processes, and errors that name the file."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from peft_d2.data.builtin import data_root
from peft_d2.data.records import read_json
from peft_d2.data.segmentation import mask_box, mask_to_compressed_rle, polygon_area
from peft_d2.storage import atomic


class CocoJson:
    """A COCO-format json that grows by images and objects, whose ids count from 1."""

    def __init__(self, categories: Iterable[tuple[int, str]]) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.categories = [{"id": number, "name": name} for number, name in categories]

    def add_image(self, file_name: str, size: tuple[int, int], image_id: int | str | None = None) -> int | str:
        """Add an image of ``size`` (width, height) and return its id."""
        image_id = len(self.images) + 1 if image_id is None else image_id
        self.images.append({"id": image_id, "file_name": file_name, "width": size[0], "height": size[1]})
        return image_id

    def add_polygons(self, image_id: int | str, category_id: int, polygons: Sequence[Sequence[float]]) -> None:
        """Add an object of flat polygons ``[x0, y0, x1, y1, ...]``; its area is the sum of theirs."""
        xs = [x for polygon in polygons for x in polygon[::2]]
        ys = [y for polygon in polygons for y in polygon[1::2]]
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        area = sum(abs(polygon_area(polygon)) for polygon in polygons)
        self._add(image_id, category_id, box, area, segmentation=[list(polygon) for polygon in polygons])

    def add_mask(
        self, image_id: int | str, category_id: int, mask: np.ndarray, segmentation: Any = None, **more: Any
    ) -> None:
        """Add an object of an (H, W) mask, as compressed run lengths unless its ``segmentation`` is given."""
        form = mask_to_compressed_rle(mask) if segmentation is None else segmentation
        self._add(image_id, category_id, mask_box(mask), int(mask.sum()), segmentation=form, **more)

    def add_box(self, image_id: int | str, category_id: int, box: Sequence[float]) -> None:
        """Add an object without a mask; ``box`` is [x, y, width, height]."""
        self._add(image_id, category_id, list(box), box[2] * box[3])

    def _add(self, image_id: int | str, category_id: int, box: list[float], area: float, **more: Any) -> None:
        number = len(self.annotations) + 1
        self.annotations.append({
            "id": number, "image_id": image_id, "category_id": category_id, "bbox": box, "area": area, "iscrowd": 0,
            **more,
        })  # fmt: skip

    def write(self, path: str | Path) -> int:
        """Write the json in one step and return the number of objects."""
        return write_coco(path, self.images, self.annotations, self.categories)


def write_coco(path: str | Path, images: list[Any], annotations: list[Any], categories: list[Any]) -> int:
    """Write a json in one step and return the number of annotations."""
    data = {"images": images, "annotations": annotations, "categories": categories}
    atomic.write_bytes(path, json.dumps(data).encode())
    return len(annotations)


def split_names(
    names: Iterable[str], share: float, splits: str | Path | None = None, first: str = "train", second: str = "test"
) -> dict[str, list[str]]:
    """Two splits of file names, by the names' checksums: the same wherever and whenever it is done.

    Args:
        names: of all images.
        share: of them that goes to the ``second`` split.
        splits: a json of ``{split: [name, ...]}`` to follow instead.

    Raises:
        ValueError: the json lists names that there are not, or none at all.
    """
    ordered = sorted(set(names))
    if splits is None:
        drawn = sorted(ordered, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        chosen = set(drawn[: round(share * len(drawn))])
        return {first: [n for n in ordered if n not in chosen], second: [n for n in ordered if n in chosen]}
    found = read_json(splits)
    if not isinstance(found, Mapping) or not all(isinstance(v, list) for v in found.values()):
        raise ValueError(f"{splits}: expected a json of the form {{{first!r}: [file name, ...], {second!r}: [...]}}.")
    missing = sorted({name for listed in found.values() for name in listed} - set(ordered))
    if missing:
        raise ValueError(f"{splits}: lists {len(missing)} images that are not there, {missing[0]!r} for one.")
    return {split: list(listed) for split, listed in found.items()}


def require_folder(path: str | Path, holds: str) -> Path:
    """The folder, or an error that says what it has to hold.

    Raises:
        FileNotFoundError: no such folder; an archive of that name, or the one beside it, is named.
    """
    path = Path(path)
    if path.is_dir():
        return path
    beside = [path.with_name(path.name + ending) for ending in (".zip", ".tar", ".tar.gz", ".tgz", ".rar", ".7z")]
    packed = next((p for p in (path, *beside) if p.is_file()), None)
    found = f"{packed} is an archive: unpack it there" if packed else "it does not exist"
    raise FileNotFoundError(f"{path}: expected a folder with {holds}; {found}.")


def converter_main(
    description: str, folder: str, convert: Callable[..., Mapping[str, int]], **options: tuple[str, int]
) -> int:
    """Run a converter on the command line's arguments.

    Args:
        description: for ``--help``.
        folder: of the published files, below the folder of all data sets; ``--source`` names another.
        convert: takes the source and the options, and returns how many entries each written file has.
        options: help and default of each; one whose default is 0 is passed on as None where it is not given.

    Returns:
        The exit code: 0, or 1 after a line that says what is wrong with the source.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", default=str(data_root() / folder), help="the unpacked folder, which gets the new files"
    )
    for name, (text, default) in options.items():
        kind = int if default else str
        parser.add_argument(f"--{name}", help=text, type=kind, default=default or None)
    arguments = vars(parser.parse_args())
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        counts = convert(arguments.pop("source"), **arguments)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path, count in counts.items():
        print(f"{path}: {count}")
    return 0


def in_parallel(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> list[Any]:
    """The function's results for all items, in order; in several processes where ``workers`` says so."""
    items = list(items)
    if workers <= 1:
        return [function(item) for item in items]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(function, items, chunksize=16))


def read_label_image(path: Path, channels: int = 1) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 label image.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it has another number of channels or bits.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Unpack the published archive again.")
    with Image.open(path) as opened:
        labels = np.asarray(opened)
    if labels.dtype != np.uint8 or labels.ndim != (2 if channels == 1 else 3):
        raise ValueError(
            f"{path}: a label image of {labels.dtype} {labels.shape}, expected 8 bits, {channels} channel(s)."
        )
    return labels[..., :3] if channels == 3 else labels
