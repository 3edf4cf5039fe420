"""Write and read jsons in COCO's format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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


def read_json(path: str | Path) -> Any:
    """The content of a json.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not json; an archive is named as such.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file.")
    content = Path(path).read_bytes()
    if content[:2] in (b"PK", b"\x1f\x8b"):
        raise ValueError(f"{path} is an archive. Unpack it first.")
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is not json ({error}).") from error
