"""Formats that draw objects as shapes: CVAT, Label Studio, labelme, YOLO. A reader returns None for another format."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse
from xml.etree import ElementTree

import numpy as np
import yaml
from PIL import Image

from peft_d2.data.formats.export import IMAGE_SUFFIXES, Export, Images, Thing, ellipse, grouped, jsons, placed
from peft_d2.data.images import DatasetError, image_size

_LABEL_STUDIO = {  # kinds of regions that have an area, and the names of their lengths
    "polygonlabels": ("", ""), "brushlabels": ("", ""),
    "rectanglelabels": ("width", "height"), "ellipselabels": ("radiusX", "radiusY"),
}  # fmt: skip


def read_cvat(folder: Path, split: str) -> Export | None:
    """``annotations.xml`` of "CVAT for images 1.1"."""
    export = Export("CVAT for images")
    images = Images(folder)
    found = False
    for file in sorted(folder.glob("[!.]*.xml")):
        content = file.read_bytes()
        if b"<annotations" not in content[:1000]:
            continue
        if b"<!ENTITY" in content or b"<!DOCTYPE" in content:
            raise DatasetError(f"{file}: declares entities, which no export of CVAT does. It is not read.")
        try:
            tree = ElementTree.fromstring(content)
        except ElementTree.ParseError as error:
            raise DatasetError(f"{file}: is not XML ({error}).") from error
        if tree.find("track") is not None:
            raise DatasetError(f"{file}: is CVAT for video. Export it as 'CVAT for images', with images.")
        found = True
        export.classes += [str(label.text) for label in tree.findall(".//labels/label/name")]
        for image in tree.findall("image"):
            size = int(image.get("height", 0)), int(image.get("width", 0))
            groups = [(shape.get("group_id"), _cvat_thing(shape, size, export)) for shape in image]
            export.images[images.find(image.get("name", ""), file)] = grouped(groups, size)
    return export if found else None


def _cvat_thing(shape: Any, size: tuple[int, int], export: Export) -> Thing | None:
    """The object of an XML element, None for one without an area, which is counted in ``export.skipped``."""
    label, turn = shape.get("label", ""), float(shape.get("rotation", 0))

    def numbers(*names: str) -> list[float]:
        return [float(shape.get(name)) for name in names]

    if shape.tag == "polygon":
        return Thing(label, [[float(v) for v in shape.get("points").replace(";", ",").split(",")]])
    if shape.tag == "ellipse":
        return Thing(label, [ellipse(*numbers("cx", "cy", "rx", "ry"), degrees=turn)])
    if shape.tag == "box" and not turn:
        x0, y0, x1, y1 = numbers("xtl", "ytl", "xbr", "ybr")
        return Thing(label, box=(x0, y0, x1 - x0, y1 - y0))
    if shape.tag == "mask":
        left, top, width, height = map(int, numbers("left", "top", "width", "height"))
        runs = [int(run) for run in shape.get("rle").split(",")]
        part = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
        return Thing(label, mask=placed(part, left, top, size))
    export.skipped[f"turned {shape.tag}" if turn else shape.tag] += shape.tag != "tag"
    return None


def read_label_studio(folder: Path, split: str) -> Export | None:
    """A json, or json-min, of tasks with polygon, brush, rectangle and ellipse regions."""
    export, images = Export("Label Studio"), Images(folder)
    for file, tasks in jsons(folder, depth=0):
        if isinstance(tasks, dict) and "shapes" in tasks:
            return None
        for task in tasks if isinstance(tasks, list) else ():
            values = list(task.get("data", task).values()) if isinstance(task, dict) else []
            names = [v for v in values if isinstance(v, str) and _url_path(v).suffix.lower() in IMAGE_SUFFIXES]
            if not names:
                continue
            done = [entry["result"] for entry in task.get("annotations", ()) if not entry.get("was_cancelled")]
            done += [value for value in task.values() if isinstance(value, list)] if "annotations" not in task else []
            regions = [region for region in (done[0] if done else ()) if isinstance(region, dict)]
            path = images.find(_url_path(names[0]).name, file)
            export.images[path] = [thing for region in regions for thing in _label_studio_things(region, path, export)]
    return export if export.images else None


def _label_studio_things(region: Mapping[str, Any], path: Path, export: Export) -> Iterator[Thing]:
    """The object of a region of an image, if it has an area; others are counted in ``export.skipped``."""
    value = region.get("value", region)
    kind = next((key for key in value if key.endswith("labels")), "")
    if kind not in _LABEL_STUDIO or not value[kind]:
        export.skipped[kind or str(region.get("type", "region"))] += 1
        return
    width, height = (region.get(f"original_{side}") for side in ("width", "height"))
    width, height = (width, height) if width and height else image_size(path)
    label = str(value[kind][0])
    if kind == "brushlabels":
        yield Thing(label, mask=_brush_mask(value["rle"], height, width))
        return
    # Places and lengths are per cent of the image's width and height.
    points = [(x * width / 100, y * height / 100) for x, y in value.get("points", ())]
    x, w = (value.get(key, 0) * width / 100 for key in ("x", _LABEL_STUDIO[kind][0]))
    y, h = (value.get(key, 0) * height / 100 for key in ("y", _LABEL_STUDIO[kind][1]))
    turn = value.get("rotation", 0)
    if kind == "ellipselabels":
        yield Thing(label, [ellipse(x, y, w, h, degrees=turn)])
    elif kind == "rectanglelabels" and not turn:
        yield Thing(label, box=(x, y, w, h))
    elif kind == "rectanglelabels":  # turned about its upper left corner
        along = complex(math.cos(math.radians(turn)), math.sin(math.radians(turn)))
        corners = [complex(x, y) + along * corner for corner in (0, w, complex(w, h), complex(0, h))]
        yield Thing(label, [[part for corner in corners for part in (corner.real, corner.imag)]])
    else:
        yield Thing(label, [[part for point in points for part in point]])


def _brush_mask(packed: Sequence[int], height: int, width: int) -> np.ndarray:
    """The (H, W) mask of Label Studio's brush: runs of RGBA bytes, packed into bits; what is painted has an alpha.

    The bits are: 32 of the number of bytes, 5 of the bits of a word less 1, four times 4 of the bits of a run's length
    less 1; then runs of a bit (whether one word is repeated), 2 of which of the four, the length less 1, and the words.
    """
    bits = np.unpackbits(np.array(packed, dtype=np.uint8)).tobytes().translate(bytes.maketrans(b"\0\1", b"01")).decode()
    place = 0

    def take(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    total, word = take(32), take(5) + 1
    lengths = [take(4) + 1 for _ in range(4)]
    if total != height * width * 4:
        raise DatasetError(f"a brush of Label Studio has {total} bytes: its image is not {width} x {height}.")
    values, filled = np.zeros(total, dtype=np.uint8), 0
    while filled < total:
        repeated = take(1)
        end = min(filled + 1 + take(lengths[take(2)]), total)
        values[filled:end] = take(word) if repeated else [take(word) for _ in range(end - filled)]
        filled = end
    return values.reshape(height, width, 4)[..., 3] > 0


def _url_path(text: str) -> PurePosixPath:
    """The path of an address: of ``/data/local-files/?d=...`` what stands behind ``d``."""
    parts = urlparse(text)
    return PurePosixPath(unquote(parse_qs(parts.query).get("d", [parts.path])[0]))


def read_labelme(folder: Path, split: str) -> Export | None:
    """A json an image, with ``shapes``."""
    export, images = Export("labelme"), Images(folder)
    for file, data in jsons(folder, depth=9):
        if not isinstance(data, dict) or not isinstance(data.get("shapes"), list):
            if export.images:
                continue
            return None
        path = images.find(str(data.get("imagePath") or ""), file)
        width, height = image_size(path)
        groups = [(shape.get("group_id"), _labelme_thing(shape, (height, width), export)) for shape in data["shapes"]]
        export.images[path] = grouped(groups, (height, width))
    return export if export.images else None


def _labelme_thing(shape: Mapping[str, Any], size: tuple[int, int], export: Export) -> Thing | None:
    """The object of a shape, None for one without an area, which is counted in ``export.skipped``."""
    label, kind, points = str(shape["label"]), shape.get("shape_type") or "polygon", shape["points"]
    if kind == "polygon":
        return Thing(label, [[float(v) for point in points for v in point]])
    if kind == "rectangle":
        (x0, x1), (y0, y1) = (sorted((min(v), max(v))) for v in zip(*points, strict=True))
        return Thing(label, box=(x0, y0, x1 - x0, y1 - y0))
    if kind == "circle":
        (x, y), radius = points[0], math.dist(*points[:2])
        return Thing(label, [ellipse(x, y, radius, radius)])
    if kind == "mask":
        part = np.asarray(Image.open(io.BytesIO(base64.b64decode(shape["mask"])))) > 0
        return Thing(label, mask=placed(part, round(points[0][0]), round(points[0][1]), size))
    export.skipped[kind] += 1
    return None


def read_yolo(folder: Path, split: str) -> Export | None:
    """A text file an image, below ``labels`` where the image is below ``images``; names in data.yaml or classes.txt."""
    config, source = _yolo_config(folder)
    names = config.get("names", [])
    names = dict(names) if isinstance(names, dict) else dict(enumerate(names))
    splits = source == folder and (config.get("train") or config.get("val"))
    paths = _yolo_images(config, split, source) if splits else Images(folder).paths
    texts = {path: text for path in paths if (text := _yolo_text(path, folder))}
    if not texts and not splits:
        return None
    export = Export("YOLO segmentation", classes=[str(names[number]).strip() for number in sorted(names)])
    for path in paths:
        size = image_size(path)
        lines = texts[path].read_text().splitlines() if path in texts else []
        rows = [(f"{texts[path]}, line {i}", line.split()) for i, line in enumerate(lines, 1) if line.strip()]
        export.images[path] = [_yolo_thing(where, row, names, *size) for where, row in rows]
    return export


def _yolo_config(folder: Path) -> tuple[dict[str, Any], Path]:
    """The content of data.yaml or its like, or the names of classes.txt, in the folder or above; and where it is."""
    for above in (folder, *folder.parents[:2]):
        for file in sorted(above.glob("[!.]*.y*ml")):
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
            if isinstance(found, dict) and found.get("names"):
                return found, above
        for file in (above / "classes.txt", above / "obj.names"):
            if file.is_file():
                return {"names": file.read_text(encoding="utf-8").splitlines()}, above
    return {}, folder


def _yolo_thing(where: str, row: Sequence[str], names: Mapping[int, Any], width: int, height: int) -> Thing:
    """The object of a line: a class number, and points or a box in shares of the image's size."""
    try:
        number, values = int(row[0]), [float(value) for value in row[1:]]
    except ValueError as error:
        raise DatasetError(f"{where}: expected a class number and coordinates, got {' '.join(row)[:60]!r}.") from error
    if len(values) != 4 and (len(values) < 6 or len(values) % 2) or not all(-0.01 <= v <= 1.01 for v in values):
        raise DatasetError(f"{where}: expected x y pairs, or a box's x y w h, from 0 to 1, got {' '.join(row)[:60]!r}.")
    label = str(names.get(number, f"class {number}")).strip()
    if len(values) == 4:
        x, y, w, h = values
        return Thing(label, box=((x - w / 2) * width, (y - h / 2) * height, w * width, h * height))
    return Thing(label, [[value * (width, height)[i % 2] for i, value in enumerate(values)]])


def _yolo_images(config: Mapping[str, Any], split: str, folder: Path) -> list[Path]:
    """The images of a split of data.yaml: a folder, a text file of names, or a list of these."""
    entry = config.get(split) or config.get("valid" if split == "val" else "") or []
    root = folder / (config.get("path") or "")
    paths: list[Path] = []
    for item in map(str, entry if isinstance(entry, list) else [entry]):
        inside = item.lstrip("./")  # Roboflow writes ../train/images for train/images
        place = next((p.resolve() for p in (root / item, folder / item, folder / inside) if p.exists()), None)
        if place is None:
            raise FileNotFoundError(f"{folder}: its yaml names {item!r} for {split!r}, which is not there.")
        lines = [] if place.is_dir() else place.read_text().split("\n")
        paths += [(place.parent / line.strip()).resolve() for line in lines if line.strip()] or Images(place).paths
    return paths


def _yolo_text(image: Path, folder: Path) -> Path | None:
    """The text file of an image: below ``labels`` in place of ``images``, beside it, or in ``folder/labels``."""
    swapped, parts = image, image.parts
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        swapped = Path(*parts[:last], "labels", *parts[last + 1 :])
    places = (swapped.with_suffix(".txt"), image.with_suffix(".txt"), folder / "labels" / f"{image.stem}.txt")
    return next((place for place in places if place.is_file()), None)
