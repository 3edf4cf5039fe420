"""Folders as annotation tools export them: each is written here from the same objects, by the tool's published format,
and has to give these objects back, pixel by pixel.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
import pytest
from PIL import Image

from peft_d2.data.formats import map_classes, read_class_map, read_folder, store
from peft_d2.data.images import DatasetError
from peft_d2.data.segmentation import segmentation_to_mask
from peft_d2.data.validation import Rules, check_coco

HEIGHT, WIDTH = 40, 60
ENTITY = '<!DOCTYPE x [<!ENTITY a "b">]>'
COLOURS = {"cat": (128, 0, 0), "dog": (0, 128, 0)}
# Of each image its objects: class and polygon; the last has two parts, which groups tell.
WORLD = {
    "a.png": [("cat", [[2, 3, 20, 3, 20, 15, 2, 15]]), ("dog", [[30, 5, 50, 5, 50, 30]])],
    "b.png": [("dog", [[5, 5, 15, 5, 15, 30, 5, 30], [40, 10, 55, 10, 55, 20, 40, 20]])],
    "c.png": [],
}


def _mask(polygons: list[list[float]]) -> np.ndarray:
    return segmentation_to_mask(polygons, HEIGHT, WIDTH)


def _images(folder: Path, names: object = WORLD) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8)).save(folder / name)


def _points(polygon: list[float]) -> list[list[float]]:
    return [list(pair) for pair in zip(polygon[::2], polygon[1::2], strict=True)]


def write_coco(folder: Path) -> None:
    _images(folder / "images")
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    data: dict = {"images": [], "annotations": [], "categories": categories}
    for number, (name, objects) in enumerate(WORLD.items()):
        data["images"].append({"id": number, "file_name": f"elsewhere/{name}", "height": HEIGHT, "width": WIDTH})
        for label, polygons in objects:
            category = {"cat": 7, "dog": 3}[label]
            row = {"id": len(data["annotations"]), "image_id": number, "category_id": category, "iscrowd": 0}
            xs, ys = polygons[0][::2], polygons[0][1::2]
            if len(polygons) > 1:
                xs, ys = xs + polygons[1][::2], ys + polygons[1][1::2]
            box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            data["annotations"].append({**row, "segmentation": polygons, "bbox": box, "area": 1.0})
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(data))


def write_yolo(folder: Path) -> None:
    """YOLO has no parts: each polygon is an object."""
    _images(folder / "train" / "images")
    _images(folder / "valid" / "images", ["c.png"])
    (folder / "train" / "labels").mkdir()
    for name, objects in WORLD.items():
        rows = []
        for label, polygons in objects:
            for polygon in polygons:
                scaled = [value / (WIDTH, HEIGHT)[i % 2] for i, value in enumerate(polygon)]
                rows.append(" ".join(map(str, [list(COLOURS).index(label), *scaled])))
        if rows:
            (folder / "train" / "labels" / name).with_suffix(".txt").write_text("\n".join(rows) + "\n")
    (folder / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']\n")


def write_voc(folder: Path) -> None:
    """As CVAT exports it, in colours; test_voc_by_palette has the original's palette."""
    _images(folder / "JPEGImages")
    for kind in ("SegmentationObject", "SegmentationClass"):
        (folder / kind).mkdir()
    for name, objects in WORLD.items():
        kinds = {kind: np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8) for kind in ("Object", "Class")}
        for number, (label, polygons) in enumerate(objects, 1):
            kinds["Object"][_mask(polygons)] = (0, 0, 40 * number)
            kinds["Class"][_mask(polygons)] = COLOURS[label]
        for kind, image in kinds.items():
            image[0, :5] = (224, 224, 192)  # not labelled
            Image.fromarray(image).save(folder / f"Segmentation{kind}" / name)
    rows = [
        "# label:color_rgb:parts:actions",
        "background:0,0,0::",
        *(f"{n}:{c[0]},{c[1]},{c[2]}::" for n, c in COLOURS.items()),
    ]
    (folder / "labelmap.txt").write_text("\n".join(rows) + "\n")


def write_labelme(folder: Path) -> None:
    """The second object of the first image as a mask, with its corner as labelme stores it."""
    _images(folder)
    for name, objects in WORLD.items():
        shapes = [{"label": "cat", "points": [[1, 1]], "shape_type": "point", "group_id": None}]
        for number, (label, polygons) in enumerate(objects):
            for polygon in polygons:
                shape = {"label": label, "points": _points(polygon), "shape_type": "polygon"}
                if name == "a.png" and number == 1:
                    mask = _mask(polygons)
                    (top, left), (bottom, right) = np.argwhere(mask).min(0), np.argwhere(mask).max(0)
                    buffer = io.BytesIO()
                    Image.fromarray(mask[top : bottom + 1, left : right + 1]).save(buffer, format="PNG")
                    points = [[float(left), float(top)], [float(right), float(bottom)]]
                    shape |= {
                        "shape_type": "mask",
                        "points": points,
                        "mask": base64.b64encode(buffer.getvalue()).decode(),
                    }
                shapes.append({**shape, "group_id": 4 if len(polygons) > 1 else None})
        data = {"version": "5.5.0", "shapes": shapes, "imagePath": f"..\\pictures\\{name}", "imageData": None}
        (folder / name).with_suffix(".json").write_text(
            json.dumps({**data, "imageHeight": HEIGHT, "imageWidth": WIDTH})
        )


def write_cvat(folder: Path) -> None:
    """The first object as a mask: run lengths, row by row, of its box, empty ones first."""
    _images(folder / "images")
    rows = []
    for number, (name, objects) in enumerate(WORLD.items()):
        rows.append(f'<image id="{number}" name={quoteattr(name)} width="{WIDTH}" height="{HEIGHT}">')
        for label, polygons in objects:
            for polygon in polygons:
                group = ' group_id="1"' if len(polygons) > 1 else ""
                if label == "cat":
                    part = _mask(polygons)[2:20, 1:30].ravel().astype(int)
                    edges = np.flatnonzero(np.diff(np.concatenate([[0], part]))).tolist()
                    runs = np.diff([0, *edges, len(part)]).tolist()
                    where = f'rle="{", ".join(map(str, runs))}" left="1" top="2" width="29" height="18"'
                    rows.append(f'<mask label="{label}" occluded="0" {where} z_order="0"></mask>')
                    continue
                points = ";".join(f"{x:.2f},{y:.2f}" for x, y in _points(polygon))
                rows.append(f'<polygon label="{label}" occluded="0" points="{points}"{group}></polygon>')
        rows.append('<polyline label="cat" points="1,1;2,2"></polyline></image>')
    labels = "".join(f"<label><name>{name}</name></label>" for name in COLOURS)
    meta = f"<version>1.1</version><meta><task><labels>{labels}</labels></task></meta>"
    (folder / "annotations.xml").write_text(f'<?xml version="1.0"?><annotations>{meta}{"".join(rows)}</annotations>')


def packed_brush(mask: np.ndarray) -> list[int]:
    """Label Studio's run lengths of the RGBA bytes of a mask: every other run is written out word by word."""
    values = np.repeat(mask.ravel().astype(np.uint8) * 255, 4)
    bits = f"{len(values):032b}" + f"{8 - 1:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    starts = np.concatenate([[0], np.flatnonzero(np.diff(values.astype(int))) + 1, [len(values)]])
    for number, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        length = end - start - 1
        code = next(i for i, size in enumerate((3, 4, 8, 16)) if length < 2**size)
        head = f"{code:02b}" + f"{length:0{(3, 4, 8, 16)[code]}b}"
        bits += (
            ("1" + head + f"{values[start]:08b}")
            if number % 2
            else ("0" + head + f"{values[start]:08b}" * (length + 1))
        )
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def write_label_studio(folder: Path) -> None:
    """Without parts; what has several is a brush's."""
    _images(folder / "images", [f"1f2e3d-{name}" for name in WORLD])
    tasks = []
    for name, objects in WORLD.items():
        result = []
        for label, polygons in objects:
            row = {"original_width": WIDTH, "original_height": HEIGHT, "from_name": "label", "to_name": "image"}
            if len(polygons) > 1:
                value = {"format": "rle", "rle": packed_brush(_mask(polygons)), "brushlabels": [label]}
                result.append({**row, "type": "brushlabels", "value": value})
                continue
            points = [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in _points(polygons[0])]
            value = {"points": points, "closed": True, "polygonlabels": [label]}
            result.append({**row, "type": "polygonlabels", "value": value})
        result.append({"type": "choices", "value": {"choices": ["good"]}})
        skipped = {"was_cancelled": True, "result": []}
        image = f"/data/upload/3/1f2e3d-{name}"
        tasks.append({"id": len(tasks), "data": {"image": image}, "annotations": [skipped, {"result": result}]})
    (folder / "project-3-at-2026.json").write_text(json.dumps(tasks))


def write_value_masks(folder: Path) -> None:
    _images(folder / "images")
    (folder / "masks").mkdir()
    for name, objects in WORLD.items():
        values = np.zeros((HEIGHT, WIDTH), dtype=np.uint16)
        for number, (_, polygons) in enumerate(objects, 1):
            values[_mask(polygons)] = 300 * number
        Image.fromarray(values).save(folder / "masks" / name)


def write_mask_folders(folder: Path) -> None:
    """As the nuclei of the Data Science Bowl: a folder an image, a picture an object."""
    for name, objects in WORLD.items():
        stem = Path(name).stem
        _images(folder / stem / "images", [name])
        (folder / stem / "masks").mkdir()
        for number, (_, polygons) in enumerate(objects or [("", [[0, 0, 0, 0, 0, 0]])]):
            Image.fromarray(_mask(polygons)).save(folder / stem / "masks" / f"{number}.png")


FORMATS: dict[str, tuple[Callable[[Path], None], str, bool, bool]] = {  # writer, what is said, classes, parts
    "coco": (write_coco, "COCO", True, True),
    "yolo": (write_yolo, "YOLO segmentation", True, False),
    "voc": (write_voc, "Pascal VOC masks", True, True),
    "labelme": (write_labelme, "labelme", True, True),
    "cvat": (write_cvat, "CVAT for images", True, True),
    "label studio": (write_label_studio, "Label Studio", True, True),
    "values": (write_value_masks, "instance masks", False, True),
    "folders": (write_mask_folders, "instance masks", False, True),
}


def _found(data: dict) -> dict[str, set]:
    """Of each image, by the end of its name, the class and pixels of its objects."""
    names = {category["id"]: category["name"] for category in data["categories"]}
    found: dict[str, set] = {image["file_name"][-5:]: set() for image in data["images"]}
    files = {image["id"]: image["file_name"][-5:] for image in data["images"]}
    for thing in data["annotations"]:
        mask = segmentation_to_mask(thing["segmentation"], HEIGHT, WIDTH)
        found[files[thing["image_id"]]].add((names[thing["category_id"]], mask.tobytes()))
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_every_object_comes_back(name: str, tmp_path: Path) -> None:
    write, said, classes, parts = FORMATS[name]
    write(tmp_path / "export")
    for file in [path for path in (tmp_path / "export").rglob("*") if path.is_file()]:
        (file.parent / f"._{file.name}").write_bytes(b"\0\5\x16\7")  # as an archive that was made on macOS leaves them
    understood, data, root = read_folder(tmp_path / "export")
    assert understood.startswith(f"{said}: 3 images, {3 if parts else 4} objects")
    expected: dict[str, set] = {}
    for file, objects in WORLD.items():
        single = [(label, p) for label, polygons in objects for p in ([polygons] if parts else [[q] for q in polygons])]
        expected[file] = {(label if classes else "object", _mask(polygons).tobytes()) for label, polygons in single}
    assert _found(data) == expected
    if classes:
        assert {category["name"] for category in data["categories"]} == {"cat", "dog"}
    path = store(data, tmp_path / "kept", "train")
    problems = check_coco(path, root, Rules())
    assert not [p for p in problems if p.level == "error"], problems


@pytest.mark.parametrize(
    ("name", "left_out"), [("labelme", "3 x point"), ("cvat", "3 x polyline"), ("label studio", "3 x choices")]
)
def test_what_is_no_object_is_counted(name: str, left_out: str, tmp_path: Path) -> None:
    FORMATS[name][0](tmp_path / "export")
    assert f"left out: {left_out}" in read_folder(tmp_path / "export")[0]


def test_a_validation_part_before_a_test_part(tmp_path: Path) -> None:
    """As Roboflow exports COCO: train, valid and test, each with a json of the same name beside its images."""
    for part, name in (("train", "a.png"), ("valid", "b.png"), ("test", "c.png")):
        _images(tmp_path / part, [name])
        image = {"id": 1, "file_name": name, "width": 40, "height": 30}
        content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "x"}]}
        (tmp_path / part / "_annotations.coco.json").write_text(json.dumps(content))
    for split, part, name in (("train", "train", "a.png"), ("val", "valid", "b.png"), ("val", "test", "c.png")):
        _, data, root = read_folder(tmp_path, split)
        assert [image["file_name"] for image in data["images"]] == [name] and root == tmp_path / part
        if split == "val":
            shutil.rmtree(tmp_path / part)
    shutil.copytree(tmp_path / "train", tmp_path / "train2")
    with pytest.raises(DatasetError, match="train/_annotations.coco.json, train2/_annotations.coco.json"):
        read_folder(tmp_path)


def test_the_other_split(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    understood, data, root = read_folder(tmp_path, "val")
    assert [image["file_name"] for image in data["images"]] == ["c.png"] and root == tmp_path / "valid" / "images"


def test_voc_by_palette(tmp_path: Path) -> None:
    """The original's numbers: bicycle is the second class, 255 is not labelled, and a list names the images."""
    _images(tmp_path / "JPEGImages", ["a.jpg", "b.jpg"])
    palette = [part for i in range(256) for part in _colour(i)]
    for kind, value in (("SegmentationObject", 1), ("SegmentationClass", 2)):
        (tmp_path / kind).mkdir()
        values = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        values[5:9, 5:30] = value
        values[9, 5:30] = 255
        image = Image.fromarray(values, mode="P")
        image.putpalette(palette)
        image.save(tmp_path / kind / "a.png")
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("a\n")
    understood, data, _ = read_folder(tmp_path, "val")
    assert understood == "Pascal VOC masks: 1 images, 1 objects, 1 class(es): bicycle"
    assert data["annotations"][0]["area"] == 4 * 25


def _colour(index: int) -> tuple[int, int, int]:
    """VOC's palette by its own rule: three bits at a time, the first ones highest."""
    colour, rest = [0, 0, 0], index
    for shift in range(7, -1, -1):
        for channel in range(3):
            colour[channel] |= (rest >> channel & 1) << shift
        rest >>= 3
    return (colour[0], colour[1], colour[2])


def test_black_and_white_masks_are_their_connected_parts(tmp_path: Path) -> None:
    _images(tmp_path, ["a.png"])
    Image.fromarray(_mask(WORLD["b.png"][0][1]).astype(np.uint8) * 255).save(tmp_path / "a_mask.png")
    understood, data, _ = read_folder(tmp_path)
    assert "each connected part is an object" in understood
    assert sorted(thing["area"] for thing in data["annotations"]) == [150, 250]


def test_boxes_and_ellipses(tmp_path: Path) -> None:
    """Shapes that are no polygons, against their formulas; a turned box turns about its upper left corner."""
    _images(tmp_path, ["a.png"])
    row = {"original_width": WIDTH, "original_height": HEIGHT}
    box = {"x": 50, "y": 25, "width": 25, "height": 25, "rectanglelabels": ["cat"]}
    round_ = {"x": 50, "y": 50, "radiusX": 20, "radiusY": 25, "rotation": 90, "ellipselabels": ["cat"]}
    result = [{**row, "value": value} for value in (box, {**box, "rotation": 90}, round_)]
    (tmp_path / "tasks.json").write_text(json.dumps([{"image": "/x/a.png", "label": [r | r["value"] for r in result]}]))
    boxes = [thing["bbox"] for thing in read_folder(tmp_path)[1]["annotations"]]
    np.testing.assert_allclose(boxes[0], [30, 10, 15, 10])
    np.testing.assert_allclose(boxes[1], [20, 10, 10, 15])
    np.testing.assert_allclose(boxes[2], [20, 8, 20, 24], atol=1e-6)


def test_class_maps(tmp_path: Path) -> None:
    write_coco(tmp_path)
    data = read_folder(tmp_path)[1]
    (merged,) = map_classes(read_class_map("cat=pet,dog=pet"), data)
    assert merged["categories"] == [{"id": 1, "name": "pet"}] and len(merged["annotations"]) == 3
    (tmp_path / "map.yaml").write_text("dog: \n")
    (kept,) = map_classes(read_class_map(str(tmp_path / "map.yaml")), data)
    assert [c["name"] for c in kept["categories"]] == ["cat"] and len(kept["annotations"]) == 1
    with pytest.raises(DatasetError, match="'bird' is no class of this data. It has cat, dog"):
        map_classes({"bird": "pet"}, data, kept)
    with pytest.raises(DatasetError, match="expected old=new,old=new"):
        read_class_map("cat")


def _damage(folder: Path, name: str, old: str, new: str) -> None:
    (folder / name).write_text((folder / name).read_text().replace(old, new))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("labelme", lambda f: (f / "a.png").unlink(), "a.json: names the image .*a.png', which is not below"),
        ("labelme", lambda f: _damage(f, "a.json", '"label"', '"lable"'), "has another form .KeyError: 'label'"),
        ("cvat", lambda f: _damage(f, "annotations.xml", "<annotations>", ENTITY + "<annotations>"), "declares"),
        ("cvat", lambda f: _damage(f, "annotations.xml", "</image>", ""), "is not XML"),
        ("yolo", lambda f: _damage(f, "train/labels/a.txt", "0 ", "0 7 "), "a.txt, line 1: expected x y pairs"),
        ("yolo", lambda f: shutil.rmtree(f / "valid"), None),
        ("voc", lambda f: _damage(f, "labelmap.txt", "128,0,0", "128,0,1"), "colour #800000, which labelmap.txt lacks"),
        ("voc", lambda f: (f / "SegmentationClass" / "a.png").unlink(), "a.png is missing: the export is not whole"),
    ],
)  # fmt: skip
def test_damaged_exports_are_named(
    name: str, damage: Callable[[Path], None], message: str | None, tmp_path: Path
) -> None:
    FORMATS[name][0](tmp_path)
    damage(tmp_path)
    if message is None:
        with pytest.raises(FileNotFoundError, match="names '../valid/images' for 'val', which is not there"):
            read_folder(tmp_path, "val")
        return
    with pytest.raises((DatasetError, FileNotFoundError), match=message):
        read_folder(tmp_path)


def test_nothing_known(tmp_path: Path) -> None:
    _images(tmp_path)
    with pytest.raises(DatasetError, match="no data set that is known. Expected one of COCO, CVAT"):
        read_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_folder(tmp_path / "export.zip")
