"""What the mappers feed: masks against independently transformed label images."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="needs Detectron2")

from detectron2.data import transforms as T  # noqa: E402
from detectron2.structures import BitMasks, BoxMode, PolygonMasks  # noqa: E402
from mask_shapes import mask_to_polygons  # noqa: E402

from peft_d2.data.augmentation import SSDColour, large_scale_jitter_recipe, resize_recipe  # noqa: E402
from peft_d2.data.images import DatasetError  # noqa: E402
from peft_d2.data.mappers import (  # noqa: E402
    InstanceMapper,
    PanopticMapper,
    SemanticMapper,
    build_mapper,
    build_test_mapper,
    transformed_mask,
)
from peft_d2.data.segmentation import mask_to_compressed_rle  # noqa: E402


def _mask(height=40, width=60):
    ys, xs = np.mgrid[:height, :width]
    return ((xs - 22) / 15) ** 2 + ((ys - 18) / 11) ** 2 < 1


def _record(tmp_path, masks, form, height=40, width=60):
    path = tmp_path / "image.png"
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return {
        "file_name": str(path), "height": height, "width": width, "image_id": 1,
        "annotations": [
            {"segmentation": form(m), "category_id": i, "bbox": [0, 0, 5, 5], "bbox_mode": BoxMode.XYWH_ABS,
             "iscrowd": 0} for i, m in enumerate(masks)
        ],
    }  # fmt: skip


FORMS = {"polygons": mask_to_polygons, "rle": mask_to_compressed_rle, "array": lambda m: m.astype(np.uint8)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["none", "flip", "crop", "crop away from it", "shrink", "enlarge"])
def test_masks_move_with_the_image(form, name):
    mask = _mask()
    transform, expected, least = {
        "none": (T.NoOpTransform(), mask, 1.0),
        "flip": (T.HFlipTransform(60), mask[:, ::-1], 1.0),
        "crop": (T.CropTransform(20, 10, 30, 25), mask[10:35, 20:50], 1.0),
        "crop away from it": (T.CropTransform(45, 0, 15, 40), np.zeros((40, 15), bool), 1.0),
        "shrink": (T.ResizeTransform(40, 60, 20, 30), mask[::2, ::2], 0.85),
        "enlarge": (T.ResizeTransform(40, 60, 80, 120), mask.repeat(2, 0).repeat(2, 1), 0.95),
    }[name]
    moved = transformed_mask(FORMS[form](mask), T.TransformList([transform]), expected.shape, (40, 60))
    union = np.count_nonzero(moved | expected)
    assert moved.shape == expected.shape
    assert union == 0 or np.count_nonzero(moved & expected) / union >= least


def test_mask_of_another_size_than_its_image_is_an_error():
    with pytest.raises(ValueError, match="must agree"):
        transformed_mask(mask_to_compressed_rle(_mask()), T.NoOpTransform(), (40, 60), (60, 40))


@pytest.mark.parametrize("form", FORMS)
def test_instances_cut_away_are_left_out(tmp_path, form):
    far = np.zeros((40, 60), dtype=bool)
    far[30:35, 50:58] = True
    mapper = InstanceMapper([T.CropTransform(0, 0, 30, 40)], "RGB", size_divisibility=32)
    sample = mapper(_record(tmp_path, [far, _mask()], FORMS[form]))
    instances = sample["instances"]
    assert sample["image"].shape == (3, 64, 32) == (3, *instances.image_size)
    assert torch.all(sample["image"][:, 40:] == 128)
    assert instances.gt_classes.tolist() == [1]
    assert instances.gt_masks.dtype == torch.bool
    expected = np.zeros((64, 32), dtype=bool)
    expected[:40, :30] = _mask()[:, :30]
    assert np.array_equal(instances.gt_masks[0].numpy(), expected)
    ys, xs = np.nonzero(expected)
    assert instances.gt_boxes.tensor[0].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_crowds_are_left_out_and_no_object_is_a_sample(tmp_path):
    record = _record(tmp_path, [_mask()], mask_to_polygons)
    record["annotations"][0]["iscrowd"] = 1
    sample = InstanceMapper([], "RGB")(record)
    assert sample["instances"].gt_masks.shape == (0, 40, 60)


@pytest.mark.parametrize("form", FORMS)
def test_the_record_is_not_touched(tmp_path, form):
    record = _record(tmp_path, [_mask(), np.zeros((40, 60), dtype=bool)], FORMS[form])
    before = pickle.dumps(record)
    mapper = InstanceMapper([T.HFlipTransform(60), T.ResizeTransform(40, 60, 20, 30)], "RGB", size_divisibility=32)
    mapper(record)["instances"].gt_masks.fill_(True)
    assert pickle.dumps(record) == before


def test_masks_on_only_some_objects_is_an_error(tmp_path):
    record = _record(tmp_path, [_mask(), _mask()], mask_to_polygons)
    del record["annotations"][1]["segmentation"]
    with pytest.raises(ValueError, match="1 of 2 annotations have no"):
        InstanceMapper([], "RGB")(record)


def test_boxes_alone_feed_a_detector(tmp_path):
    record = _record(tmp_path, [_mask()], mask_to_polygons)
    del record["annotations"][0]["segmentation"]
    instances = InstanceMapper([T.HFlipTransform(60)], "RGB", bit_masks=True)(record)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[55.0, 0.0, 60.0, 5.0]]
    assert not instances.has("gt_masks")


@pytest.mark.parametrize("form", ["polygons", "rle"])
@pytest.mark.parametrize("name", ["coco_instance_lsj", "mask_former_instance"])
def test_recipes_by_upstream_names(make_cfg, toy_set, tmp_path, form, name):
    cfg = make_cfg(toy_set)
    cfg.INPUT.DATASET_MAPPER_NAME = name
    cfg.INPUT.IMAGE_SIZE, cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE = 72, 0.1, 2.0
    cfg.INPUT.COLOR_AUG_SSD = True
    cfg.INPUT.CROP.ENABLED = True
    record = _record(tmp_path, [_mask()], FORMS[form])
    mapper = build_mapper(cfg, [record])
    counts = set()
    for _ in range(20):
        sample = mapper(record)
        counts.add(len(sample["instances"]))
        assert sample["instances"].gt_masks.shape[1:] == sample["image"].shape[1:]
        assert sample["image"].dtype == torch.uint8
        if name == "coco_instance_lsj":
            assert sample["image"].shape == (3, 72, 72)
    assert 1 in counts


def test_panoptic_and_semantic(tmp_path):
    labels = np.zeros((40, 60), dtype=np.int64)
    labels[_mask()] = 3
    labels[30:] = 1000
    colours = np.stack([labels % 256, labels // 256, labels * 0], axis=-1).astype(np.uint8)
    Image.fromarray(colours).save(tmp_path / "pan.png")
    semantic = np.full((40, 60), 255, dtype=np.uint8)
    semantic[_mask()] = 4
    Image.fromarray(semantic).save(tmp_path / "sem.png")
    record = _record(tmp_path, [], mask_to_polygons)
    del record["annotations"]
    record["pan_seg_file_name"], record["sem_seg_file_name"] = str(tmp_path / "pan.png"), str(tmp_path / "sem.png")
    record["segments_info"] = [
        {"id": 3, "category_id": 7, "iscrowd": 0}, {"id": 1000, "category_id": 2, "iscrowd": 0},
        {"id": 0, "category_id": 1, "iscrowd": 1},
    ]  # fmt: skip
    sample = PanopticMapper([T.HFlipTransform(60)], "RGB", size_divisibility=64)(record)
    assert sample["instances"].gt_classes.tolist() == [7, 2]
    assert np.array_equal(sample["instances"].gt_masks[0, :40, :60].numpy(), (labels == 3)[:, ::-1])
    assert sample["sem_seg"].shape == (64, 64)
    assert torch.all(sample["sem_seg"][40:] == 255)
    sample = SemanticMapper([T.HFlipTransform(60)], "RGB")(record)
    assert sample["instances"].gt_classes.tolist() == [4]
    assert np.array_equal(sample["instances"].gt_masks[0].numpy(), _mask()[:, ::-1])


@pytest.mark.parametrize(
    ("architecture", "mask_format", "form", "expected"),
    [
        ("GeneralizedRCNN", "polygon", "polygons", PolygonMasks),
        ("GeneralizedRCNN", "bitmask", "polygons", BitMasks),
        ("GeneralizedRCNN", "bitmask", "rle", BitMasks),
        ("GeneralizedRCNN", "polygon", "rle", BitMasks),
    ],
)
def test_detectron2_models_get_detectron2_masks(make_cfg, toy_set, tmp_path, architecture, mask_format, form, expected):
    cfg = make_cfg(toy_set)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = architecture, True, mask_format
    record = _record(tmp_path, [_mask()], FORMS[form])
    sample = build_mapper(cfg, [record])(record)
    assert isinstance(sample["instances"].gt_masks, expected)
    assert len(sample["instances"]) == 1


@pytest.mark.parametrize(
    ("name", "message"), [("mask_former_semantic", "mask_former_instance"), ("mask_former", "Expected one of")]
)
def test_mapper_that_cannot_be(make_cfg, toy_set, tmp_path, name, message):
    cfg = make_cfg(toy_set)
    cfg.INPUT.DATASET_MAPPER_NAME = name
    with pytest.raises(ValueError, match=message):
        build_mapper(cfg, [_record(tmp_path, [], mask_to_polygons)])


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1)])
def test_thin_images_keep_a_pixel(make_cfg, toy_set, tmp_path, size):
    cfg = make_cfg(toy_set)
    cfg.INPUT.IMAGE_SIZE, cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE = 64, 0.1, 2.0
    record = _record(tmp_path, [np.ones(size, dtype=bool)], mask_to_compressed_rle, *size)
    for recipe in (resize_recipe(cfg, semantic=False), large_scale_jitter_recipe(cfg)):
        sample = InstanceMapper(recipe, "RGB")(record)
        assert min(sample["image"].shape[1:]) >= 1
        assert sample["instances"].gt_masks.shape[1:] == sample["image"].shape[1:]
    assert min(build_test_mapper(cfg)(record)["image"].shape[1:]) >= 1


def test_colour_distortion_keeps_grey_grey_and_bounds():
    grey = np.repeat(np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8, 1), 3, axis=2)
    results = [SSDColour("BGR").get_transform(grey).apply_image(grey) for _ in range(30)]
    assert all(np.ptp(r.astype(int), axis=2).max() <= 1 for r in results)  # hue and saturation leave grey alone
    assert len({r.tobytes() for r in results}) > 5
    red = np.zeros((4, 4, 3), dtype=np.uint8)
    red[..., 2] = 200  # BGR
    turned = [SSDColour("BGR").get_transform(red).apply_image(red) for _ in range(30)]
    assert all(t[..., 2].min() > t[..., :2].max() for t in turned)  # 18 of 180 degrees leave red mostly red


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        ("SemanticSegmentor", "annotations", "Name sets with sem_seg_file_name"),
        ("PanopticFPN", "annotations", "Name sets with sem_seg_file_name"),
        ("RetinaNet", "sem_seg_file_name", "Name sets with annotations"),
        ("GeneralizedRCNN", "sem_seg_file_name", "Name sets with annotations"),
    ],
)
def test_labels_of_another_kind_than_detectron2s_model_is_trained_on(make_cfg, toy_set, name, key, said):
    cfg = make_cfg(toy_set)
    cfg.INPUT.DATASET_MAPPER_NAME = ""
    cfg.MODEL.META_ARCHITECTURE = name
    with pytest.raises(DatasetError, match=f"{name} is trained on .*{said}"):
        build_mapper(cfg, [{"file_name": "a.png", key: []}])
