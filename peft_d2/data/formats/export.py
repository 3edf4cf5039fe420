"""What the readers of formats share: the objects they find, the COCO json these become, a folder's images, shapes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os.path import commonpath
from pathlib import Path
from typing import Any

import numpy as np

from peft_d2.data.images import DatasetError, image_size, visible
from peft_d2.data.registration import read_json
from peft_d2.data.segmentation import extent, mask_box, mask_to_compressed_rle, segmentation_to_mask

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")


class CocoJson:
    """A COCO-format json (``data``) to which images and objects are added; their ids count from 1."""

    def __init__(self, categories: Iterable[tuple[int, str]]) -> None:
        listed = [{"id": number, "name": name} for number, name in categories]
        self.data: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": listed}

    def add_image(self, file_name: str, size: tuple[int, int], image_id: int | str | None = None) -> int | str:
        """Add an image of ``size`` (width, height) and return its id."""
        images = self.data["images"]
        image_id = len(images) + 1 if image_id is None else image_id
        images.append({"id": image_id, "file_name": file_name, "width": size[0], "height": size[1]})
        return image_id

    def add(
        self, image_id: int | str, category_id: int, *,
        polygons: Sequence[Sequence[float]] = (), mask: np.ndarray | None = None, box: Sequence[float] = (),
    ) -> None:  # fmt: skip
        """Add an object: flat polygons ``[x0, y0, x1, y1, ...]``, an (H, W) mask, or only a box [x, y, width, height].

        Of a mask with polygons, these are what is written, else its run lengths.
        """
        shape: dict[str, Any] = {"segmentation": [list(polygon) for polygon in polygons]} if polygons else {}
        area: float
        if mask is not None:
            box, area = mask_box(mask), int(mask.sum())
            shape = shape or {"segmentation": mask_to_compressed_rle(mask)}
        elif polygons:
            (x0, y0, x1, y1), area = extent(polygons)
            box = x0, y0, x1 - x0, y1 - y0
        else:
            area = box[2] * box[3]
        things = self.data["annotations"]
        entry = {"id": len(things) + 1, "image_id": image_id, "category_id": category_id, "bbox": list(box)}
        things.append(entry | {"area": area, "iscrowd": 0} | shape)


@dataclass
class Thing:
    """An object: its class, and polygons (flat, px), a mask (H, W), or only a box (x, y, width, height; px)."""

    label: str
    polygons: list[list[float]] = field(default_factory=list)
    mask: np.ndarray | None = None
    box: Sequence[float] = ()


@dataclass
class Export:
    """What a folder was understood as.

    Attributes:
        format: its name.
        images: each image file with its objects.
        classes: in their order; those of no list are ordered by name.
        skipped: kinds of annotations that are no objects with an area, and how many.
        coco: what is in COCO's format already, and the folder that its file names are relative to.
    """

    format: str
    images: dict[Path, list[Thing]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    coco: tuple[dict[str, Any], Path] | None = None

    def to_coco(self) -> tuple[dict[str, Any], Path]:
        """The set in COCO's format, and the folder that its file names are relative to."""
        if self.coco is not None:
            return self.coco
        found = {thing.label for things in self.images.values() for thing in things}
        classes = [*dict.fromkeys(self.classes), *sorted(found - set(self.classes))]
        coco = CocoJson(enumerate(classes, 1))
        root = common_folder(self.images)
        for path, things in sorted(self.images.items()):
            image = coco.add_image(path.relative_to(root).as_posix(), image_size(path))
            for thing in things:
                label = classes.index(thing.label) + 1
                if thing.mask is None or thing.mask.any():
                    coco.add(image, label, polygons=thing.polygons, mask=thing.mask, box=thing.box)
        return coco.data, root


class Images:
    """The image files below a folder, by the names that annotations give them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = [path for path in visible(folder) if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in self.paths:
            self._by_name[path.name].append(path)
            self._by_stem[path.stem].append(path)

    def find(self, name: str, named_by: Path) -> Path:
        """The image of a name, which may be a path of another machine; ``named_by`` is for the error.

        Raises:
            FileNotFoundError: there is none.
            DatasetError: there are several.
        """
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        last = parts[-1] if parts else ""
        # Label Studio puts a hash before the names of files that it was given.
        found = self._by_name.get(last) or self._by_name.get(last.partition("-")[2]) or []
        return self._single(found, parts, name, named_by)

    def by_stem(self, name: str, named_by: Path) -> Path:
        """The image of a name without its suffix; raises as :meth:`find`."""
        parts = name.split("/")
        return self._single(self._by_stem.get(parts[-1], []), parts, name, named_by)

    def _single(self, found: list[Path], parts: list[str], name: str, named_by: Path) -> Path:
        """The one of ``found`` whose folders are most like those that the annotation gives, or that lies beside it."""
        for count in range(len(parts), 1, -1):  # the longest end of the path that fits
            ending = [path for path in found if path.with_suffix("").parts[-count:-1] == tuple(parts[-count:-1])]
            if len(ending) == 1:
                return ending[0]
        beside = [path for path in found if path.parent == named_by.parent]
        found = beside if len(found) > 1 and beside else found
        if not found:
            where = f"which is not below {self.folder}. Give the folder that holds both"
            raise FileNotFoundError(f"{named_by}: names the image {name!r}, {where}.")
        if len(found) > 1:
            raise DatasetError(f"{named_by}: {name!r} may be {found[0]} or {found[1]}. Give the folder of one of them.")
        return found[0]


def jsons(folder: Path, depth: int = 2) -> Iterator[tuple[Path, Any]]:
    """The jsons of a folder, up to so many folders deep, each with its content."""
    for path in visible(folder, "*.json"):
        if len(path.relative_to(folder).parts) <= depth + 1:
            yield path, read_json(path)


def common_folder(paths: Iterable[Path]) -> Path:
    """The deepest folder that holds all files."""
    parents = [str(path.parent) for path in paths]
    return Path(commonpath(parents)) if parents else Path()


def grouped(things: Iterable[tuple[Any, Thing | None]], size: tuple[int, int]) -> list[Thing]:
    """Join shapes to objects: those of one group and class are parts of one object, others stand for themselves.

    Args:
        things: (group's id, shape) pairs; None in place of a shape that is no object.
        size: (height, width) of the image, for objects of which one part is a mask.
    """
    groups: dict[Any, list[Thing]] = defaultdict(list)
    for number, (group, thing) in enumerate(things):
        if thing is not None:
            alone = group in (None, "", 0) or bool(thing.box)
            groups[("alone", number) if alone else (group, thing.label)].append(thing)
    return [_joined(parts, size) for parts in groups.values()]


def _joined(parts: Sequence[Thing], size: tuple[int, int]) -> Thing:
    """One object of several parts: polygons, or a mask where one of them is a mask."""
    if len(parts) == 1:
        return parts[0]
    polygons = [polygon for part in parts for polygon in part.polygons]
    masks = [part.mask for part in parts if part.mask is not None]
    if not masks:
        return Thing(parts[0].label, polygons)
    masks += [segmentation_to_mask(polygons, *size)] if polygons else []
    return Thing(parts[0].label, mask=np.logical_or.reduce(masks))


def ellipse(x: float, y: float, across: float, down: float, *, degrees: float = 0) -> list[float]:
    """The flat polygon of an ellipse about (x, y) with two radii in px, turned clockwise."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    around = [math.pi * i / 32 for i in range(64)]
    on = [(across * math.cos(angle), down * math.sin(angle)) for angle in around]
    return [value for u, v in on for value in (x + u * cos - v * sin, y + u * sin + v * cos)]


def placed(part: np.ndarray, left: int, top: int, size: tuple[int, int]) -> np.ndarray:
    """The mask of an image of ``size`` (height, width) that has ``part`` with its upper left corner at left, top."""
    mask = np.zeros(size, dtype=bool)
    part = part[max(-top, 0) :, max(-left, 0) :]
    top, left = max(top, 0), max(left, 0)
    part = part[: max(size[0] - top, 0), : max(size[1] - left, 0)]
    mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    return mask
