"""Published formats to COCO's: what was drawn comes out, and a wrong folder or file is named."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="the class names of ADE20K are Detectron2's")

from converting import split_names  # noqa: E402
from prepare_ade20k import convert_ade20k  # noqa: E402
from prepare_cityscapes import convert_cityscapes  # noqa: E402
from prepare_coco_panoptic import convert_coco_panoptic  # noqa: E402
from prepare_ndd20 import convert_ndd20, read_via, region_polygon  # noqa: E402
from prepare_nwpu_vhr10 import convert_nwpu_vhr10  # noqa: E402
from prepare_ssdd import convert_ssdd  # noqa: E402

from peft_d2.data.registration import NWPU_VHR10_CLASSES  # noqa: E402
from peft_d2.data.segmentation import segmentation_to_mask  # noqa: E402
from peft_d2.data.validation import check_coco  # noqa: E402

from . import published  # noqa: E402


def _read(path):
    return json.loads(Path(path).read_text())


def _names(data):
    return [image["file_name"] for image in data["images"]]


def _masks(data, image_id):
    sizes = {i["id"]: (i["height"], i["width"]) for i in data["images"]}
    objects = [a for a in data["annotations"] if a["image_id"] == image_id]
    return [(a["category_id"], segmentation_to_mask(a["segmentation"], *sizes[image_id])) for a in objects]


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ({"name": "polygon", "all_points_x": [0, 20, 20], "all_points_y": [0, 0, 10]}, 100),
        ({"name": "polyline", "all_points_x": [0, 20, 20, 0], "all_points_y": [0, 0, 10, 10]}, 200),
        ({"name": "rect", "x": 3, "y": 4, "width": 20, "height": 10}, 200),
        ({"name": "circle", "cx": 30, "cy": 30, "r": 20}, np.pi * 400),
        ({"name": "ellipse", "cx": 30, "cy": 30, "rx": 20, "ry": 10}, np.pi * 200),
        ({"name": "ellipse", "cx": 30, "cy": 30, "rx": 20, "ry": 10, "theta": np.pi / 2}, np.pi * 200),
    ],
)
def test_regions_keep_their_area(shape, area):
    mask = segmentation_to_mask([region_polygon(shape)], 60, 60)
    assert mask.sum() == pytest.approx(area, rel=0.06)
    if "theta" in shape:  # turned by a quarter: higher than wide
        assert np.ptp(np.nonzero(mask)[0]) > 1.8 * np.ptp(np.nonzero(mask)[1])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"name": "point", "cx": 1, "cy": 2}, "shape 'point', which is no area"),
        ({"name": "scribble"}, "shape 'scribble'"),
        ({}, "shape None"),
        ({"name": "rect", "x": 1, "y": 2, "width": 3}, "'rect' lacks 'height'"),
        ({"name": "polygon", "all_points_x": [1, 2], "all_points_y": [1]}, "2 x and 1 y"),
    ],
)
def test_regions_that_are_no_area_are_named(shape, message):
    with pytest.raises(ValueError, match=message):
        region_polygon(shape)


def test_via_projects_and_old_regions(tmp_path):
    regions = {"0": {"shape_attributes": {"name": "rect"}}}
    entry = {"filename": "é 1.jpg", "regions": regions}
    published.write(tmp_path / "a.json", {"_via_settings": {}, "_via_img_metadata": {"a": entry}})
    assert read_via(tmp_path / "a.json") == {"é 1.jpg": [regions["0"]]}
    published.write(tmp_path / "b.json", [])
    published.write(tmp_path / "c.json", {"x": {"filename": "a"}, "y": {"filename": "a"}})
    published.write(tmp_path / "d.json", {"images": {}, "x": 1})
    for name, message in (("b", "not a VIA json"), ("c", "'a' twice"), ("d", "has no filename")):
        with pytest.raises(ValueError, match=message):
            read_via(tmp_path / f"{name}.json")


def test_ndd20(tmp_path, caplog):
    published.ndd20(tmp_path)
    counts = convert_ndd20(tmp_path)
    assert len(counts) == 6 and sum(counts.values()) == 2 * 24
    assert caplog.text.count("2 point(s) and is left out") == 2
    data = {name: _read(tmp_path / "annotations" / f"{name}.json") for name in ("train", "test", "above_test")}
    assert len(data["test"]["images"]) == 4 and len(data["above_test"]["images"]) == 2  # 300 of 1800
    assert not set(_names(data["train"])) & set(_names(data["test"]))
    assert set(_names(data["above_test"])) == {n for n in _names(data["test"]) if n.startswith("ABOVE/")}
    for name, part in data.items():
        assert check_coco(tmp_path / "annotations" / f"{name}.json", tmp_path) == []
        for image in part["images"]:
            last = 30 + int(Path(image["file_name"]).stem)
            expected = segmentation_to_mask([[10, 5, 40, 5, 40, 30, 10, last]], published.HEIGHT, published.WIDTH)
            [(category, mask)] = _masks(part, image["id"])
            assert category == 1 and np.array_equal(mask, expected)
    convert_ndd20(tmp_path)
    assert _read(tmp_path / "annotations" / "train.json") == data["train"]
    published.write(tmp_path / "own.json", {"train": ["ABOVE/1.jpg"], "test": ["BELOW/2.jpg"]})
    convert_ndd20(tmp_path, tmp_path / "own.json")
    assert _names(_read(tmp_path / "annotations" / "test.json")) == ["BELOW/2.jpg"]


def test_ssdd(tmp_path):
    published.ssdd(tmp_path)
    counts = convert_ssdd(tmp_path)
    assert list(counts.values()) == [6, 4]
    for split in ("train", "test"):
        problems = check_coco(tmp_path / "annotations" / f"{split}.json", tmp_path)
        assert {p.kind for p in problems} <= {"copies"}  # as the files have them: both ships of an image are one
    data = _read(tmp_path / "annotations" / "test.json")
    assert [Path(n).name for n in _names(data)] == ["000001.jpg", "000009.jpg"]
    expected = segmentation_to_mask([[5, 6, 30, 6, 30, 21, 5, 20]], published.HEIGHT, published.WIDTH)
    assert all(np.array_equal(mask, expected) for _, mask in _masks(data, 1))


@pytest.mark.parametrize("masks", [None, "none"])
def test_nwpu_vhr10(tmp_path, masks):
    published.nwpu_vhr10(tmp_path, NWPU_VHR10_CLASSES)
    counts = convert_nwpu_vhr10(tmp_path, masks)
    assert list(counts.values()) == [16, 4]
    train, val = (_read(tmp_path / "annotations" / f"{s}.json") for s in ("train", "val"))
    assert sorted(_names(train) + _names(val)) == [f"{i:03}.jpg" for i in range(1, 11)]
    problems = check_coco(tmp_path / "annotations" / "train.json", tmp_path / "positive image set")
    assert {p.kind for p in problems} <= {"empty class", "no masks"}
    assert {a["category_id"] for a in val["annotations"]} == {1, 10}
    if masks == "none":
        boxes = [a["bbox"] for a in val["annotations"] if a["image_id"] == val["images"][0]["id"]]
        assert boxes == [[10, 5, 30, 25], [50, 20, 10, 30]]


def test_ade20k(tmp_path):
    published.ade20k(tmp_path)
    counts = convert_ade20k(tmp_path, workers=2)
    assert counts[str(tmp_path / "ade20k_instance_train.json")] == 6
    shifted = np.asarray(Image.open(tmp_path / "annotations_detectron2/validation/ADE_val_00000001.png"))
    assert np.unique(shifted).tolist() == [0, 3, 7, 12, 255]
    instances = _read(tmp_path / "ade20k_instance_train.json")
    assert len(instances["categories"]) == 100 and instances["categories"][0] == {"id": 7, "name": "bed"}
    assert (
        check_coco(tmp_path / "ade20k_instance_train.json", tmp_path / "images" / "training")[0].kind == "empty class"
    )
    [(first, mask), (second, _)] = _masks(instances, "ADE_train_00000002")
    assert (first, second) == (7, 12)
    expected = np.zeros((published.HEIGHT, published.WIDTH), dtype=bool)
    expected[20:52, 8:32] = True
    assert np.array_equal(mask, expected)
    panoptic = _read(tmp_path / "ade20k_panoptic_train.json")
    colours = np.asarray(Image.open(tmp_path / "ade20k_panoptic_train" / "ADE_train_00000002.png")).astype(int)
    ids = colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
    segments = {s["category_id"]: s for s in panoptic["annotations"][2]["segments_info"]}
    assert set(segments) == {0, 3, 7, 12} and sum(c["isthing"] for c in panoptic["categories"]) == 100
    assert np.array_equal(ids == segments[7]["id"], expected)
    assert all(s["area"] == (ids == s["id"]).sum() for s in segments.values())
    assert (ids[:4] == 0).all()


def test_coco_panoptic(tmp_path):
    published.coco_panoptic(tmp_path)
    assert list(convert_coco_panoptic(tmp_path).values()) == [2]
    classes = np.asarray(Image.open(tmp_path / "panoptic_semseg_val2017" / "000000000001.png"))
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    assert {COCO_CATEGORIES[c]["id"] for c in np.unique(classes) if c != 255} == {1, 18, 187, 193}
    assert (classes[:3] == 255).all() and COCO_CATEGORIES[classes[25, 20]]["name"] == "person"


def test_cityscapes(tmp_path):
    pytest.importorskip("cityscapesscripts", reason="the extra 'cityscapes'")
    published.cityscapes(tmp_path)
    counts = convert_cityscapes(tmp_path)
    assert list(counts.values()) == [2, 2, 2, 2]
    truth = tmp_path / "gtFine" / "val" / "town"
    labels = np.asarray(Image.open(truth / "town_000001_000019_gtFine_labelIds.png"))
    train_ids = np.asarray(Image.open(truth / "town_000001_000019_gtFine_labelTrainIds.png"))
    for label, train_id in ((23, 10), (7, 0), (1, 255), (26, 13), (24, 11)):
        assert (train_ids[labels == label] == train_id).all()
    panoptic = _read(tmp_path / "gtFine" / "cityscapes_panoptic_val.json")
    segments = panoptic["annotations"][1]["segments_info"]
    assert {s["id"]: s["iscrowd"] for s in segments} == {7: 0, 23: 0, 24000: 0, 24001: 0, 26000: 0, 26: 1}
    assert not [p for p in (tmp_path / "gtFine").rglob(".*")]


FAULTS = {
    "ndd20 folder": (lambda f: convert_ndd20(f / "gone"), "expected a folder with ABOVE/"),
    "ndd20 archive": (lambda f: convert_ndd20(f / "packed"), "packed.zip is an archive: unpack it"),
    "ndd20 json": (lambda f: ((f / "n/ABOVE_LABELS.json").unlink(), convert_ndd20(f / "n")), "ABOVE_LABELS.json is no"),
    "ndd20 packed json": (
        lambda f: ((f / "n/ABOVE_LABELS.json").write_bytes(b"PK\x03\x04"), convert_ndd20(f / "n")), "an archive",
    ),
    "ndd20 image": (lambda f: ((f / "n/ABOVE/3.jpg").unlink(), convert_ndd20(f / "n")), "ABOVE/3.jpg is missing"),
    "ndd20 empty image": (lambda f: ((f / "n/ABOVE/3.jpg").write_bytes(b""), convert_ndd20(f / "n")), "ABOVE/3.jpg"),
    "ssdd folder": (lambda f: convert_ssdd(f), "PSeg_SSDD/voc_style: expected a folder"),
    "ssdd xml": (
        lambda f: (published.write(f / "s/PSeg_SSDD/voc_style/Annotations_test/000001.xml", "<a><b>"),
                   convert_ssdd(f / "s")), "000001.xml: .*PSeg_SSDD",
    ),
    "ssdd boxes": (
        lambda f: (published.write(f / "s/PSeg_SSDD/voc_style/Annotations_test/000001.xml", "<a><object/></a>"),
                   convert_ssdd(f / "s")), "object 0 has no outline",
    ),
    "nwpu masks": (lambda f: ((f / "w/annotations.json").unlink(), convert_nwpu_vhr10(f / "w")), "--masks none"),
    "nwpu text": (
        lambda f: (published.write(f / "w/ground truth/003.txt", "(1,2),(3,4),11"),
                   convert_nwpu_vhr10(f / "w", "none")), "003.txt, line 1",
    ),
    "nwpu image": (lambda f: ((f / "w/positive image set/003.jpg").unlink(), convert_nwpu_vhr10(f / "w")), "'003.jpg'"),
    "ade20k folder": (lambda f: convert_ade20k(f), "images/training: expected a folder"),
    "ade20k labels": (
        lambda f: ((f / "a/annotations/training/ADE_train_00000001.png").unlink(), convert_ade20k(f / "a")),
        "ADE_train_00000001.png is missing",
    ),
    "ade20k colours": (
        lambda f: (published.save(published.picture(0), f / "a/annotations/training/ADE_train_00000001.png"),
                   convert_ade20k(f / "a")), "expected 8 bits, 1 channel",
    ),
    "coco": (lambda f: convert_coco_panoptic(f), "expected panoptic_train2017.json"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(tmp_path, fault):
    published.ndd20(tmp_path / "n")
    published.ssdd(tmp_path / "s")
    published.nwpu_vhr10(tmp_path / "w", NWPU_VHR10_CLASSES)
    published.ade20k(tmp_path / "a")
    (tmp_path / "packed.zip").write_bytes(b"PK")
    convert, message = FAULTS[fault]
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        convert(tmp_path)
    assert not [p for p in tmp_path.rglob(".*")], "nothing half-written stays"


def test_splits_do_not_depend_on_the_order():
    names = [f"{i}.jpg" for i in range(50)]
    one = split_names(names, 0.2)
    assert one == split_names(reversed(names), 0.2)
    assert len(one["test"]) == 10 and sorted(one["train"] + one["test"]) == sorted(names)


TOOLS = Path(__file__).parents[2] / "tools"


def _run(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOLS / name), run_name="__main__")
    return end.value.code


def test_tool(tmp_path, monkeypatch, capsys):
    published.ndd20(tmp_path / "NDD20")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert _run("prepare_ndd20.py", monkeypatch) == 0
    assert f"{tmp_path}/NDD20/annotations/train.json: 20" in capsys.readouterr().out
    (tmp_path / "NDD20" / "BELOW_LABELS.json").unlink()
    assert _run("prepare_ndd20.py", monkeypatch) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "BELOW_LABELS.json" in error


@pytest.mark.parametrize("name", sorted(p.name for p in TOOLS.glob("prepare_*.py")))
def test_tools_explain_themselves(name, monkeypatch, capsys):
    assert _run(name, monkeypatch, "--help") == 0
    assert f"python tools/{name}" in capsys.readouterr().out
