"""Odd and broken data: what is odd trains as it should, what is broken is refused with its name."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image, ImageOps

pytest.importorskip("detectron2", reason="needs Detectron2")

import toy  # noqa: E402
from check_dataset import contact_sheet  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402

from peft_d2.data.classes import class_names  # noqa: E402
from peft_d2.data.loader import build_test_loader, build_train_loader  # noqa: E402
from peft_d2.data.segmentation import mask_to_compressed_rle  # noqa: E402
from peft_d2.data.validation import DatasetError, check_coco, check_datasets  # noqa: E402

from . import published  # noqa: E402

W, H = 40, 24
MASK = np.zeros((H, W), dtype=bool)
MASK[4:14, 6:30] = True
POLYGON = [6, 4, 30, 4, 30, 14, 6, 14]


def _picture(mode="RGB"):
    return published.picture(3, W, H).convert(mode)


def _encode(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _jpeg(image, **options):
    return _encode(image, "JPEG", **options)


def _png(image, **options):
    return _encode(image, "PNG", **options)


def _turned():
    """Stored lying on its side, with a note in its EXIF that turns it back to W x H."""
    image = _picture().transpose(Image.Transpose.ROTATE_90)
    exif = image.getexif()
    exif[0x0112] = 6
    return _jpeg(image, exif=exif)


def _world(folder, content=None, name="a.png"):
    """A set of one image with one object of each of two classes."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_png(_picture()) if content is None else content)
    objects = [
        {"id": i, "image_id": 1, "category_id": i, "bbox": [6, 4, 24, 10], "area": 240, "iscrowd": 0,
         "segmentation": [POLYGON]} for i in (1, 2)
    ]  # fmt: skip
    return {
        "images": [{"id": 1, "file_name": name, "width": W, "height": H}], "annotations": objects,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }  # fmt: skip


@pytest.fixture
def sample(make_cfg, tmp_path):
    """Check and load a set, and return its only training sample."""

    def load(data, root=tmp_path, workers=0, check=True, outside=False):
        path = tmp_path / "set.json"
        path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
        cfg = make_cfg(toy.ToySet(path, root), name="hostile")
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (H,), 100, "none"
        cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 1, workers
        cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
        cfg.DATASETS.ALLOW_FILES_OUTSIDE = outside
        class_names(cfg)
        if check:
            check_datasets(cfg)
        load.cfg = cfg
        with contextlib.closing(build_train_loader(cfg)) as loader:
            return next(iter(loader))[0]

    yield load
    for catalog in (DatasetCatalog, MetadataCatalog):
        if "hostile" in catalog.list():
            catalog.remove("hostile")


IMAGES = {
    "grey.png": lambda: _png(_picture("L")),
    "grey with alpha.png": lambda: _png(_picture("LA")),
    "one bit.png": lambda: _png(_picture("1")),
    "palette.png": lambda: _png(_picture("P")),
    "see-through palette.png": lambda: _png(_picture("P"), transparency=3),
    "alpha.png": lambda: _png(_picture("RGBA")),
    "grey.jpg": lambda: _jpeg(_picture("L")),
    "cmyk.jpg": lambda: _jpeg(_picture("CMYK")),
    "progressive.jpg": lambda: _jpeg(_picture(), progressive=True),
    "turned.jpg": _turned,
    "jpeg by content.png": lambda: _jpeg(_picture()),
    "ünï cödé/ä b.png": lambda: _png(_picture()),
}


@pytest.mark.parametrize("name", IMAGES)
def test_odd_images_are_fed_as_they_look(sample, tmp_path, name):
    data = _world(tmp_path, IMAGES[name](), name)
    data["annotations"][0]["segmentation"] = mask_to_compressed_rle(MASK)
    found = sample(data)
    with Image.open(tmp_path / name) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert expected.shape == (H, W, 3)
    assert np.array_equal(found["image"].permute(1, 2, 0).numpy(), expected)
    assert all(np.array_equal(mask.numpy(), MASK) for mask in found["instances"].gt_masks)
    assert contact_sheet(data, tmp_path).size == (192, 192)  # one cell


def _cut(data):
    return data[: len(data) // 2]


BROKEN = {
    "empty file": (b"", "cannot be opened as an image"),
    "text": (b"<html>404</html>", "cannot be opened as an image"),
    "16 bits": (lambda: _png(Image.fromarray(np.full((H, W), 40000, dtype=np.uint16))), "more than 8 bits"),
    "floats": (lambda: _encode(Image.fromarray(np.full((H, W), 0.5, dtype=np.float32)), "TIFF"), "more than 8 bits"),
    "other size": (lambda: _png(_picture().resize((W, H + 1))), "the file is 40 x 25 px, the json says 40 x 24"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_refused(sample, tmp_path, name):
    content, message = BROKEN[name]
    data = _world(tmp_path, content if isinstance(content, bytes) else content())
    with pytest.raises(DatasetError, match=message) as caught:
        sample(data)
    assert "a.png" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["jpg", "png", "gone", "mask"])
def test_what_breaks_while_training_names_the_file(sample, tmp_path, kind, workers):
    data = _world(tmp_path, _cut(_jpeg(published.picture(1, W, H)) if kind == "jpg" else _png(_picture())), "b c.png")
    if kind == "gone":
        (tmp_path / "b c.png").unlink()
    elif kind == "mask":
        (tmp_path / "b c.png").write_bytes(_png(_picture()))
        data["annotations"][1]["segmentation"] = mask_to_compressed_rle(MASK.T)
    elif workers == 0:
        assert {p.kind for p in _problems(data, tmp_path)} >= {"cut off"}
    with pytest.raises(DatasetError) as caught:
        sample(data, workers=workers, check=False)
    last = str(caught.value).strip().splitlines()[-1]  # the lines before are the worker's traceback
    assert str(tmp_path / "b c.png") in last and "DatasetError: DatasetError" not in last
    if kind != "mask":
        with pytest.raises(DatasetError, match="b c.png"):
            next(iter(build_test_loader(sample.cfg, sample.cfg.DATASETS.TEST[0])))


def _problems(data, root):
    (root / "p.json").write_text(json.dumps(data))
    return check_coco(root / "p.json", root)


def _ids(key, kind):
    def change(data):
        for annotation in data["annotations"]:
            annotation[key] = kind(annotation[key])
        for entry in data[{"image_id": "images", "category_id": "categories", "id": "annotations"}[key]]:
            entry["id"] = kind(entry["id"])

    return change


def _set(key, index=0, **values):
    return lambda data: data[key][index].update(values)


def _drop(key):
    return lambda data: [annotation.pop(key) for annotation in data["annotations"]]


FINE = {
    "ids with gaps": _ids("category_id", lambda i: 10**i),
    "category 0": _ids("category_id", lambda i: i - 1),
    "image ids are text": _ids("image_id", lambda i: f"image {i}"),
    "image id 0": _ids("image_id", lambda i: 0),
    "no area": _drop("area"),
    "no iscrowd": _drop("iscrowd"),
    "iscrowd true": lambda d: d["annotations"].append({**d["annotations"][0], "id": 9, "iscrowd": True}),
    "unicode classes": _set("categories", name="Фыв 日本"),
    "an image without objects": lambda d: d["images"].append({**d["images"][0], "id": 7}),
    "more keys": lambda d: (d.update(info=None, licenses=[]), d["images"][0].update(coco_url="x", license=3)),
    "absolute name": lambda d: None,
    "name above the folder": lambda d: None,
}


@pytest.mark.parametrize("name", FINE)
def test_odd_jsons_train(sample, tmp_path, name):
    root = tmp_path / "images"
    data = _world(root)
    FINE[name](data)
    if name == "absolute name":
        data["images"][0]["file_name"] = str(root / "a.png")
        root = tmp_path
    elif name == "name above the folder":
        data["images"][0]["file_name"] = "../images/a.png"
        (tmp_path / "other").mkdir()
        root = tmp_path / "other"
    if name == "name above the folder":
        assert [p.kind for p in _check_with(data, tmp_path, root)] == ["outside the folder"]
        for check in (True, False):
            with pytest.raises(DatasetError, match=r"outside.*ALLOW_FILES_OUTSIDE"):
                sample(data, root, check=check)
    if name == "an image without objects":
        sample(data, root)
        return
    instances = sample(data, root, outside=name == "name above the folder")["instances"]
    assert instances.gt_classes.tolist() == [0, 1]
    assert all(np.array_equal(mask.numpy(), MASK) for mask in instances.gt_masks)


def _check_with(data, folder, root):
    (folder / "q.json").write_text(json.dumps(data))
    return check_coco(folder / "q.json", root)


REFUSED = {
    "float ids": (_ids("category_id", float), "not usable|lacks a usable id|contiguous"),
    "text ids": (_ids("category_id", str), "usable category_id|COCO-format|lacks a usable"),
    "float image ids": (_ids("image_id", lambda i: i + 0.5), "lacks a usable id"),
    "text size": (_set("images", width="40"), "lacks a usable width"),
    "iscrowd text": (_set("annotations", iscrowd="0"), "iscrowd is '0'"),
    "ignored": (_set("annotations", ignore=1), "ignore is 1"),
    "area nan": (_set("annotations", area=float("nan")), "area is nan"),
    "area text": (_set("annotations", area="9"), "area is '9'"),
    "no polygon": (_set("annotations", segmentation=[]), "empty list of polygons"),
    "empty polygon": (_set("annotations", segmentation=[[]]), "has 0 points"),
    "two points": (_set("annotations", segmentation=[[1, 2, 3, 4]]), "has 2 points"),
    "wrong rle": (_set("annotations", segmentation={"size": [W, H], "counts": [W * H]}), "are of size"),
    "no mask": (lambda d: d["annotations"][0].pop("segmentation"), "others have one"),
    "no box": (_drop("bbox"), "bbox is None"),
    "huge polygon": (_set("annotations", segmentation=[[0, 0, 5e7, 0, 5, 5]]), "5e"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_broken_jsons_are_refused(sample, tmp_path, name):
    change, message = REFUSED[name]
    data = _world(tmp_path)
    change(data)
    with pytest.raises(ValueError, match=message) as caught:
        sample(data)
    assert "set.json" in str(caught.value)


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda text: b"\xef\xbb\xbf" + text, "byte order mark|BOM"),
        (lambda text: text.decode().encode("utf-16"), "not json|codec"),
        (lambda text: b"PK\x03\x04" + text, "archive"),
        (lambda text: text[:-20], "not json|not a COCO"),
        (lambda text: b"[]", "not a COCO-format json"),
    ],
    ids=["bom", "utf-16", "zip", "cut off", "a list"],
)
def test_files_that_detectron2_could_not_read(sample, tmp_path, encode, message):
    with pytest.raises(ValueError, match=message) as caught:
        sample(encode(json.dumps(_world(tmp_path)).encode()))
    assert "set.json" in str(caught.value)


def test_an_archive_is_no_folder(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(_world(tmp_path)))
    (tmp_path / "images.zip").write_bytes(b"PK")
    [problem] = check_coco(tmp_path / "a.json", tmp_path / "images.zip")
    assert (problem.level, problem.kind) == ("error", "missing folder") and "not a folder" in problem.what
