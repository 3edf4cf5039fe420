"""Tiny generated data sets in the layouts and formats in which the real ones are published.

Each function fills a folder and returns what it drew, so that tests can compare with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 96, 64


def picture(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def drawn(points: list[tuple[float, float]], width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    canvas = Image.new("1", (width, height))
    ImageDraw.Draw(canvas).polygon(points, fill=1)
    return np.asarray(canvas)


def ndd20(folder: Path, images: int = 12) -> None:
    """Outlines of the kinds that VIA writes; the region of two points that the real set has as well."""
    for kind in ("ABOVE", "BELOW"):
        entries = {}
        for number in range(images):
            name = f"{number}.jpg"
            save(picture(number), folder / kind / name)
            outline = {"name": "polyline", "all_points_x": [10, 40, 40, 10], "all_points_y": [5, 5, 30, 30 + number]}
            regions = [{"shape_attributes": outline, "region_attributes": {"species": "WBD", "id": " "}}]
            if number == 0:
                line = {"name": "polyline", "all_points_x": [1, 5], "all_points_y": [1, 5]}
                regions.append({"shape_attributes": line, "region_attributes": {}})
            entries[f"{name}1234"] = {"filename": name, "size": 1234, "regions": regions, "file_attributes": {}}
        write(folder / f"{kind}_LABELS.json", entries)


def ssdd(folder: Path) -> None:
    voc = folder / "PSeg_SSDD" / "voc_style"
    for split, numbers in (("train", (2, 3, 4)), ("test", (1, 9))):
        for number in numbers:
            save(picture(number).convert("L"), voc / f"JPEGImages_{split}" / f"{number:06}.jpg")
            points = "".join(f"<point>{x},{y}</point>" for x, y in ((5, 6), (30, 6), (30, 20 + number), (5, 20)))
            entry = f"<object><name>ship</name><bndbox><xmin>5</xmin></bndbox><segm>{points}</segm></object>"
            text = f"<annotation><filename>{number:06}.jpg</filename>{entry * 2}</annotation>"
            write(voc / f"Annotations_{split}" / f"{number:06}.xml", text)


def nwpu_vhr10(folder: Path, classes: tuple[str, ...], images: int = 10) -> None:
    data: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    data["categories"] = [{"id": i, "name": name, "supercategory": None} for i, name in enumerate(classes, 1)]
    for number in range(1, images + 1):
        name = f"{number:03}.jpg"
        save(picture(number), folder / "positive image set" / name)
        write(folder / "ground truth" / f"{number:03}.txt", "(10,5),(40,30),1 \n( 50 , 20 ),( 60 , 50 ),10\n\n")
        data["images"].append({"id": number - 1, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for x, category in ((10, 1), (50, 10)):
            polygon = [x, 5, x + 30, 5, x + 30, 30, x, 30]
            data["annotations"].append({
                "id": len(data["annotations"]), "image_id": number - 1, "category_id": category, "iscrowd": 0,
                "bbox": [x, 5, 30, 25], "area": 750, "segmentation": [polygon],
            })  # fmt: skip
    write(folder / "annotations.json", data)


def ade20k(folder: Path, images: int = 3) -> None:
    """Wall (1) and floor (4) as stuff, beds (instance class 1, semantic 8) over them, partly unlabelled."""
    for split, long in (("train", "training"), ("val", "validation")):
        for number in range(images):
            stem = f"ADE_{split}_{number:08}"
            semantic = np.ones((HEIGHT, WIDTH), dtype=np.uint8)
            semantic[40:] = 4
            semantic[:4] = 0
            objects = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
            for index, (x, category, semantic_class) in enumerate(((8, 1, 8), (50, 4, 13)), 1):
                box = np.s_[20 : 50 + number, x : x + 24]
                semantic[box] = semantic_class
                objects[box] = (category, index, 0)
            save(picture(number), folder / "images" / long / f"{stem}.jpg")
            save(Image.fromarray(semantic), folder / "annotations" / long / f"{stem}.png")
            save(Image.fromarray(objects), folder / "annotations_instance" / long / f"{stem}.png")


def coco_panoptic(folder: Path, split: str = "val", images: int = 2) -> None:
    """Person (1) and dog (18) as things, grass (193) and sky (187) as stuff, and the instances' json."""
    panoptic: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    instances: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    panoptic["categories"] = [{k: c[k] for k in ("id", "name", "isthing")} for c in COCO_CATEGORIES]
    instances["categories"] = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    for number in range(1, images + 1):
        stem = f"{number:012}"
        ids = np.full((HEIGHT, WIDTH), 70000)
        ids[30:] = 300
        ids[:3] = 0
        ids[10:40, 10:30] = 5
        ids[20:60, 50:90] = 1001
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        save(picture(number), folder / f"{split}2017" / f"{stem}.jpg")
        save(Image.fromarray(colours), folder / f"panoptic_{split}2017" / f"{stem}.png")
        record = {"id": number, "file_name": f"{stem}.jpg", "width": WIDTH, "height": HEIGHT}
        classes = {70000: 187, 300: 193, 5: 1, 1001: 18}
        segments = [
            {"id": i, "category_id": c, "area": int((ids == i).sum()), "bbox": _box(ids == i), "iscrowd": 0}
            for i, c in classes.items()
        ]
        panoptic["images"].append(record)
        panoptic["annotations"].append({"image_id": number, "file_name": f"{stem}.png", "segments_info": segments})
        instances["images"].append(record)
        for segment in segments[2:]:
            x, y, w, h = segment["bbox"]
            instances["annotations"].append({
                **segment, "id": len(instances["annotations"]) + 1, "image_id": number,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            })  # fmt: skip
    write(folder / "annotations" / f"panoptic_{split}2017.json", panoptic)
    write(folder / "annotations" / f"instances_{split}2017.json", instances)


def _box(mask: np.ndarray) -> list[int]:
    ys, xs = np.nonzero(mask)
    return [int(v) for v in (xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1)]


# name, id, and the polygons of one street scene from back to front
_SCENE = (
    ("sky", 23, [(0, 0), (255, 0), (255, 60), (0, 60)]),
    ("road", 7, [(0, 60), (255, 60), (255, 127), (0, 127)]),
    ("ego vehicle", 1, [(0, 120), (255, 120), (255, 127), (0, 127)]),
    ("car", 26, [(20, 50), (90, 50), (90, 110), (20, 110)]),
    ("person", 24, [(70, 30), (100, 30), (100, 100), (70, 100)]),
    ("person", 24, [(140, 40), (170, 45), (165, 105), (138, 100)]),
    ("cargroup", 26, [(190, 55), (250, 55), (250, 100), (190, 100)]),
)


def cityscapes(folder: Path, images: int = 2) -> None:
    """Polygons, and the id images drawn from them as cityscapesscripts does; one group of cars."""
    for split in ("train", "val"):
        for number in range(images):
            stem = f"town_{number:06}_000019"
            labels = np.zeros((128, 256), dtype=np.uint8)
            instances = np.zeros((128, 256), dtype=np.int32)
            objects, counts = [], {}
            for name, category, points in _SCENE:
                moved = [(x + (3 * number if category >= 24 else 0), y) for x, y in points]
                mask = drawn(moved, 256, 128)
                labels[mask] = category
                instance = category
                if category >= 24 and not name.endswith("group"):
                    instance = 1000 * category + counts.get(category, 0)
                    counts[category] = counts.get(category, 0) + 1
                instances[mask] = instance
                objects.append({"label": name, "polygon": [list(point) for point in moved]})
            image = picture(number, 256, 128)
            truth = folder / "gtFine" / split / "town"
            save(image, folder / "leftImg8bit" / split / "town" / f"{stem}_leftImg8bit.png")
            save(Image.fromarray(labels), truth / f"{stem}_gtFine_labelIds.png")
            save(Image.fromarray(instances.astype(np.uint16)), truth / f"{stem}_gtFine_instanceIds.png")
            content = {"imgHeight": 128, "imgWidth": 256, "objects": objects}
            write(truth / f"{stem}_gtFine_polygons.json", content)
