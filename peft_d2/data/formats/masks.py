"""Formats that are pictures of masks: Pascal VOC's, and instance masks beside images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from peft_d2.data.formats.export import IMAGE_SUFFIXES, Export, Images, Thing
from peft_d2.data.images import DatasetError, visible
from peft_d2.data.segmentation import panoptic_ids

_FOLDERS = ("masks", "mask", "labels", "instances", "annotations")
_ENDINGS = ("", "_mask", "_masks", "_label", "_labels", "_instance", "_instances", "_gt")
_VOID = (224 << 16) + (224 << 8) + 192
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def read_voc(folder: Path, split: str) -> Export | None:
    """Pascal VOC's masks: ``SegmentationObject`` tells objects, ``SegmentationClass`` their classes, by colours."""
    root = next((path.parent for path in visible(folder, "SegmentationObject") if path.is_dir()), None)
    if root is None:
        return None
    export, images = Export("Pascal VOC masks"), Images(root / "JPEGImages")
    names = {_voc_colour(i): name for i, name in enumerate(VOC_CLASSES, 1)}
    if (file := root / "labelmap.txt").is_file():  # label:r,g,b:parts:actions
        rows = [line.split(":") for line in file.read_text().splitlines() if line.strip() and line[0] != "#"]
        colours = [[int(value) for value in row[1].split(",")] for row in rows]
        names = {(r << 16) + (g << 8) + b: row[0] for (r, g, b), row in zip(colours, rows, strict=True)}
        export.classes = [row[0] for row in rows if row[0] != "background"]
    listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    stems = set(listed.read_text().split()) if listed.is_file() else None
    for file in visible(root / "SegmentationObject", "*.png"):
        stem = file.relative_to(root / "SegmentationObject").with_suffix("").as_posix()
        if stems is not None and stem not in stems:
            continue
        objects, classes = _colours(file), _colours(root / "SegmentationClass" / f"{stem}.png")
        things = export.images[images.by_stem(stem, file)] = []
        for mask in _instances(objects):
            values, counts = np.unique(classes[mask], return_counts=True)
            if (colour := int(values[counts.argmax()])) not in names:
                raise DatasetError(f"{file}: an object's class has the colour #{colour:06x}, which labelmap.txt lacks.")
            things.append(Thing(names[colour], mask=mask))
    return export


def _voc_colour(index: int) -> int:
    """VOC's colour of a class: the index's bits, from the lowest on, go to red, green, blue from their highest on."""
    parts = [sum((index >> 3 * bit + channel & 1) << 7 - bit for bit in range(8)) for channel in range(3)]
    return (parts[0] << 16) + (parts[1] << 8) + parts[2]


def read_masks(folder: Path, split: str) -> Export | None:
    """Masks beside images: one PNG an image with a value an object, or a folder of PNGs, one an object."""
    export, images = Export("instance masks", classes=["object"]), Images(folder)
    label_images: dict[Path, np.ndarray] = {}
    for path in images.paths:
        if any(part in _FOLDERS for part in path.relative_to(folder).parts[:-1]):
            continue
        for place in _mask_places(path, folder):
            if place.is_dir() and (
                files := sorted(p for p in place.glob("[!.]*") if p.suffix.lower() in IMAGE_SUFFIXES)
            ):
                export.images[path] = [Thing("object", mask=_colours(file) > 0) for file in files]
                break
            if place.is_file():
                label_images[path] = _colours(place)
                break
    foreground = [np.unique(image).tolist() for image in label_images.values()]
    binary = bool(foreground) and all(set(values) <= {0, 255, 0xFFFFFF} for values in foreground)
    if binary:
        export.format = "instance masks (black and white: each connected part is an object)"
    for path, image in label_images.items():
        export.images[path] = [Thing("object", mask=mask) for mask in _instances(_parts(image) if binary else image)]
    return export if export.images else None


def _mask_places(image: Path, folder: Path) -> Iterator[Path]:
    """Where an image's masks may be: beside it, or below a folder of masks beside its folder or above."""
    for above in (image.parent, image.parent.parent):
        for name in _FOLDERS:
            below = above / name / (image.parent.relative_to(above) if above == image.parent else "")
            for ending in _ENDINGS:
                yield below / f"{image.stem}{ending}.png"
                yield below / f"{image.stem}{ending}.tif"
            yield below / image.stem
        if above != image.parent and image.parent.name == "images" and image.stem == above.name:
            yield above / "masks"  # a folder an image
    yield from (image.with_name(f"{image.stem}{ending}.png") for ending in _ENDINGS[1:])


def _colours(file: Path) -> np.ndarray:
    """(H, W) numbers of a label image: its values where it is grey, its colours' as 0xRRGGBB where it has some."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the export is not whole.")
    with Image.open(file) as opened:
        if opened.mode not in ("P", "RGB", "RGBA"):
            return np.asarray(opened).astype(np.int64)
        return panoptic_ids(np.asarray(opened.convert("RGB"))[..., ::-1])


def _instances(image: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the mask of each value of a label image, but for 0 and VOC's colour of what is not labelled."""
    for value in np.unique(image):
        if value not in (0, _VOID):
            yield image == value


def _parts(image: np.ndarray) -> np.ndarray:
    """A number for each connected part of what is not 0."""
    import cv2

    return cv2.connectedComponents((image > 0).astype(np.uint8), connectivity=8)[1]
