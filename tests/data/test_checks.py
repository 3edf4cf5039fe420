"""Each defect of a data set is found and named; a good set has none."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from mask_shapes import mask_to_rle
from PIL import Image

from peft_d2.data.segmentation import mask_to_compressed_rle
from peft_d2.data.validation import DatasetError, check_coco, check_datasets, summary


def _world():
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:12, 5:15] = True
    corners = [5.0, 4.0, 15.0, 4.0, 15.0, 12.0, 5.0, 12.0]
    forms = [[corners], mask_to_rle(mask), mask_to_compressed_rle(mask)]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 30} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "a"}, {"id": 5, "name": "b"}],
        "annotations": [
            {"id": i + 1, "image_id": i + 1, "category_id": (1, 5, 1)[i], "bbox": [5, 4, 10, 8], "area": 80,
             "iscrowd": 0, "segmentation": form} for i, form in enumerate(forms)
        ],
    }  # fmt: skip


@pytest.fixture
def root(tmp_path):
    for number in (1, 2, 3):
        Image.new("RGB", (30, 20)).save(tmp_path / f"{number}.png")
    return tmp_path


def _check(root, data):
    path = root / "a.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return check_coco(path, root)


def test_a_good_set_has_no_problem(root):
    assert _check(root, _world()) == []


def _set(key, index, **changes):
    return lambda d: d[key][index].update(changes)


def _polygon(*values):
    return _set("annotations", 0, segmentation=[list(values)])


ERRORS = {
    "nan": (_polygon(5, 4, 15, float("nan"), 15, 12), "annotations[id 1", "no finite number"),
    "infinite": (_polygon(5, 4, 15, float("inf"), 15, 12), "annotations[id 1", "no finite number"),
    "text": (_polygon(5, 4, 15, "x", 15, 12), "annotations[id 1", "no finite number"),
    "huge": (_polygon(5, 4, 15, 1e9, 15, 12), "annotations[id 1", "1e+09"),
    "two points": (_polygon(5, 4, 15, 4), "annotations[id 1", "2 points"),
    "odd": (_polygon(5, 4, 15, 4, 15, 12, 5), "annotations[id 1", "odd length"),
    "no polygons": (_set("annotations", 0, segmentation=[]), "annotations[id 1", "empty list"),
    "flat polygon": (_set("annotations", 0, segmentation=[1, 2, 3, 4, 5, 6]), "annotations[id 1", "one flat list"),
    "points": (_set("annotations", 0, segmentation=[[[1, 2], [9, 2], [9, 8]]]), "annotations[id 1", "list of points"),
    "other folder": (_set("images", 0, file_name="images/1.PNG"), "images[id 1", "/1.png is"),
    "segmentation is text": (_set("annotations", 0, segmentation="x"), "annotations[id 1", "is a str"),
    "no mask": (lambda d: d["annotations"][2].pop("segmentation"), "annotations[id 3", "no segmentation"),
    "rle size": (_set("annotations", 1, segmentation={"size": [30, 20], "counts": [600]}), "id 2", "[30, 20]"),
    "rle sum": (_set("annotations", 1, segmentation={"size": [20, 30], "counts": [5, 4]}), "id 2", "add up to 9"),
    "rle minus": (_set("annotations", 1, segmentation={"size": [20, 30], "counts": [700, -100]}), "id 2", "negative"),
    "rle empty": (_set("annotations", 1, segmentation={"size": [20, 30], "counts": [600]}), "id 2", "mask is empty"),
    "rle text": (_set("annotations", 2, segmentation={"size": [20, 30], "counts": "ooo"}), "id 3", "be decoded"),
    "rle form": (_set("annotations", 2, segmentation={"size": [20, 30], "counts": 3}), "id 3", "counts are int"),
    "category": (_set("annotations", 0, category_id=2), "id 1", "category_id 2 is not listed"),
    "image": (_set("annotations", 0, image_id=9), "annotations[id 1, image 9]", "not listed"),
    "annotation id": (_set("annotations", 0, id=2), "annotations[id 2]", "used 2 times"),
    "image id": (_set("images", 0, id=2), "images[id 2]", "used 2 times"),
    "category id": (_set("categories", 0, id=5), "categories[id 5]", "used 2 times"),
    "image without name": (lambda d: d["images"][0].pop("file_name"), "images[0]", "file_name"),
    "image without size": (lambda d: d["images"][0].pop("height"), "images[0]", "height"),
    "box of three": (_set("annotations", 0, bbox=[1, 2, 3]), "id 1", "[1, 2, 3]"),
    "box nan": (_set("annotations", 0, bbox=[1, 2, 3, float("nan")]), "id 1", "not finite"),
    "missing file": (_set("images", 0, file_name="gone.png"), "images[id 1 gone.png]", "no file"),
    "other size": (_set("images", 0, width=31), "images[id 1", "30 x 20 px, the json says 31 x 20"),
    "same name": (_set("categories", 0, name="b"), "categories[b]", "2 categories have this name"),
    "no categories": (lambda d: d.update(categories=[]), "categories", "empty"),
    "no images": (lambda d: d.update(images=[]), "images", "empty"),
    "no list": (lambda d: d.pop("annotations"), "annotations", "no list"),
}  # fmt: skip


@pytest.mark.parametrize("defect", ERRORS)
def test_errors(root, defect):
    change, where, what = ERRORS[defect]
    data = _world()
    change(data)
    found = [p for p in _check(root, data) if p.level == "error"]
    assert any(where in p.where and what in p.what and p.remedy for p in found), [str(p) for p in found]


WARNINGS = {
    "degenerate box": (_set("annotations", 0, bbox=[5, 4, 0, 8]), "no area"),
    "box outside": (_set("annotations", 0, bbox=[25, 4, 10, 8]), "leaves the image"),
    "polygon outside": (_polygon(40, 4, 50, 4, 50, 12), "lies outside"),
    "polygon leaves": (_polygon(5, 4, 50, 4, 50, 12), "leaves the image"),
    "no area": (_polygon(5, 4, 15, 4, 10, 4), "area of 0"),
    "empty class": (_set("annotations", 1, category_id=1), "no object is of this class"),
    "same file": (_set("images", 1, file_name="1.png"), "2 images are this file"),
    "nothing": (lambda d: d.update(annotations=[]), "is empty"),
}


@pytest.mark.parametrize("defect", WARNINGS)
def test_warnings(root, defect):
    change, what = WARNINGS[defect]
    data = _world()
    change(data)
    problems = _check(root, data)
    assert any(what in p.what for p in problems)
    assert {p.level for p in problems} == {"warning"}


def test_boxes_alone_are_a_warning(root):
    data = _world()
    for annotation in data["annotations"]:
        del annotation["segmentation"]
    assert [p.kind for p in _check(root, data)] == ["no masks"]


def test_unreadable_files(root):
    assert _check(root, "{")[0].kind == "not json"
    (root / "2.png").write_bytes(b"not a picture")
    assert [p.kind for p in _check(root, _world())] == ["unreadable file"]
    assert check_coco(root / "gone.json", root)[0].kind == "missing json"
    assert check_coco(root / "a.json", root / "gone")[0].kind == "missing folder"


def test_pictures_turned_by_exif_have_their_turned_size(root):
    turned = Image.new("RGB", (20, 30))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(root / "1.jpg", exif=exif)
    data = _world()
    data["images"][0]["file_name"] = "1.jpg"
    assert _check(root, data) == []


def _remembered(root):
    return check_coco(root / "a.json", root, remember=True)


def test_only_good_sets_are_remembered(root, monkeypatch):
    data = _world()
    data["annotations"][0]["bbox"] = [25, 4, 10, 8]
    first = _check(root, data)
    assert _remembered(root) == first != []
    with monkeypatch.context() as patched:
        patched.setattr("peft_d2.data.validation._Check", lambda *_: pytest.fail("checked again"))
        assert _remembered(root) == first
    (root / "3.png").unlink()
    assert [p.kind for p in _remembered(root) if p.level == "error"] == ["missing file"]
    Image.new("RGB", (30, 20)).save(root / "3.png")
    assert [p for p in _remembered(root) if p.level == "error"] == []


def test_memory_notices_a_changed_image_and_the_tool_always_looks(root):
    assert _check(root, _world()) == _remembered(root) == []
    state = (root / "3.png").stat()
    Image.new("RGB", (20, 30)).save(root / "3.png")  # changes no folder
    assert [p.kind for p in _remembered(root)] == ["sizes disagree"]
    (root / "3.png").write_bytes(b"x" * state.st_size)
    os.utime(root / "3.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert [p.kind for p in check_coco(root / "a.json", root)] == ["unreadable file"]


def test_training_refuses_errors_and_says_which(make_cfg, tmp_path):
    import toy

    from peft_d2.data.registration import register_from_config

    made = toy.generate(tmp_path / "set", "day", 4, 0, size=48)
    cfg = make_cfg(made)
    register_from_config(cfg)
    check_datasets(cfg)
    data = json.loads(made.json.read_text())
    for annotation in data["annotations"][:5]:
        annotation["segmentation"] = [[1, 2, 3, 4]]
    made.json.write_text(json.dumps(data))
    with pytest.raises(DatasetError, match=r"5 error\(s\)(.|\n)*2 points(.|\n)*and 2 more") as caught:
        check_datasets(cfg)
    assert str(made.json) in str(caught.value)
    cfg.DATASETS.CHECK = False
    check_datasets(cfg)


def test_summary_is_short(root):
    data = _world()
    data["annotations"] *= 5
    lines = summary([p for p in _check(root, data) if p.level == "error"], per_kind=2)
    assert len(lines) == 3
    assert lines[-1] == "... and 1 more of the kind 'duplicate id in annotations'"


TOOL = Path(__file__).parents[2] / "tools" / "check_dataset.py"


def _run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [TOOL.name, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOL), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize("good", [True, False])
def test_tool(root, good, monkeypatch, capsys):
    data = _world()
    if not good:
        data["annotations"][0]["category_id"] = 2
    (root / "a.json").write_text(json.dumps(data))
    Image.new("RGB", (30, 20), (10, 20, 250)).save(root / "2.png")
    sheet = root / "sheet.png"
    code = _run(monkeypatch, "--json", root / "a.json", "--images", root, "--sheet", sheet, "--statistics")
    printed = capsys.readouterr().out
    assert code == (0 if good else 1)
    assert ("category_id 2" in printed) is not good
    assert sheet.exists() is good
    if good:
        assert "3 images (0 without objects), 3 objects, 2 classes" in printed
        assert "MODEL.PIXEL_MEAN [3.333, 6.667, 83.333] MODEL.PIXEL_STD [4.714, 9.428, 117.851]" in printed


def test_tool_by_name(root, monkeypatch, capsys):
    pytest.importorskip("detectron2", reason="names are registered with Detectron2")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    assert _run(monkeypatch, "--name", "lvis_v1_train", "--preview", "a.jpg") == 2
    assert "--preview, --save-json and --class-map are for COCO-format sets of objects, not lvis" in (
        capsys.readouterr().err
    )
    for name, said in (("lvis_v1_train", "is no file"), ("coco_2017_val_panoptic", "does not exist")):
        assert _run(monkeypatch, "--name", name) == 1
        assert said in "".join(capsys.readouterr())
    assert _run(monkeypatch, "--name", "zerowaste_tra1n") == 2
    assert "is not registered" in capsys.readouterr().err
    assert _run(monkeypatch, "--name", "coco_2014_minival") == 1
    assert "is no file" in capsys.readouterr().out
