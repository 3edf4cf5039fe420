"""Boxes as prompts: noise, limits, detectors, pictures that go wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="needs Detectron2")

from detectron2.config import CfgNode  # noqa: E402
from detectron2.data import DatasetCatalog  # noqa: E402
from PIL import Image  # noqa: E402

from peft_d2.data.loader import build_test_loader, build_train_loader  # noqa: E402
from peft_d2.data.mappers import build_mapper, build_test_mapper  # noqa: E402
from peft_d2.data.prompts import prompted_objects, widened  # noqa: E402
from peft_d2.data.registration import register_from_config  # noqa: E402

SIZE = 128


@pytest.fixture
def cfg(make_cfg, toy_set):
    cfg = make_cfg(toy_set)
    cfg.INPUT.DATASET_MAPPER_NAME = "sam_prompts"
    cfg.MODEL.SAM = CfgNode({"IMAGE_SIZE": SIZE})
    cfg.INPUT.PROMPTS.BOX_NOISE = 6.0
    register_from_config(cfg)
    return cfg


@pytest.fixture
def records(cfg):
    return DatasetCatalog.get(cfg.DATASETS.TRAIN[0])


def test_each_box_holds_its_object_and_is_wider_by_the_noise_at_most(cfg, records):
    mapper = build_mapper(cfg, records)
    widths = []
    for record in records:
        sample = mapper(record)
        truth, boxes = sample["instances"].gt_boxes.tensor, sample["boxes"]
        assert sample["image"].shape[1:] == (SIZE, SIZE) == sample["instances"].image_size
        assert len(boxes) == len(truth) == len(sample["instances"].gt_masks)
        outwards = (boxes - truth) * torch.tensor([-1, -1, 1, 1])
        assert (outwards >= 0).all() and (outwards <= 6).all()
        assert (boxes >= 0).all() and (boxes <= SIZE).all()
        widths += outwards[(boxes > 0) & (boxes < SIZE)].tolist()
    assert np.mean(widths) == pytest.approx(3, abs=0.7) and np.max(widths) > 5


def test_noise_stays_within_the_image_and_is_drawn_for_each_side():
    boxes = torch.tensor([[100.0, 100, 200, 200]]).repeat(2000, 1)
    moved = (widened(boxes, 50, (1024, 230)) - boxes) * torch.tensor([-1, -1, 1, 1])
    assert moved.min() >= 0 and moved[:, [0, 1, 3]].max() > 48 and moved[:, 2].max() == 30
    assert moved[:, [0, 1, 3]].mean().item() == pytest.approx(25, abs=1.5)
    assert torch.corrcoef(moved.T).fill_diagonal_(0).abs().max() < 0.1
    assert torch.equal(widened(boxes, 0, (1024, 1024)), boxes)


def test_more_objects_than_the_limit(cfg, records):
    record = max(records, key=lambda r: len(r["annotations"]))
    record = {**record, "annotations": record["annotations"] * 300}
    cfg.INPUT.PROMPTS.MAX_BOXES = 7
    sample = build_mapper(cfg, records)(record)
    assert len(sample["boxes"]) == len(sample["instances"]) == 7
    assert len(record["annotations"]) > 500


def test_an_image_without_objects(cfg, records):
    record = {**records[0], "annotations": []}
    train, test = build_mapper(cfg, records)(record), build_test_mapper(cfg, cfg.DATASETS.TEST[0])(record)
    assert train["boxes"].shape == test["boxes"].shape == (0, 4)
    assert len(train["instances"]) == len(test["box_classes"]) == 0


def test_a_resumed_run_sees_the_same_boxes(cfg):
    whole, rest = iter(build_train_loader(cfg)), iter(build_train_loader(cfg, start_iter=1))
    next(whole)
    for one, other in zip(next(whole), next(rest), strict=True):
        assert torch.equal(one["boxes"], other["boxes"]) and torch.equal(one["image"], other["image"])


def test_testing_prompts_with_the_ground_truth_without_noise(cfg, records):
    for batch, record in zip(build_test_loader(cfg, cfg.DATASETS.TEST[0]), records, strict=True):
        boxes = np.array([a["bbox"] for a in record["annotations"]])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(batch[0]["boxes"].numpy(), boxes * SIZE / 64, atol=1e-4)
        assert batch[0]["box_classes"].tolist() == [a["category_id"] for a in record["annotations"]]
        assert "box_scores" not in batch[0] and batch[0]["height"] == 64


def test_crowds_are_no_prompts(cfg, records):
    record = {**records[0], "annotations": [{**a, "iscrowd": i % 2} for i, a in enumerate(records[0]["annotations"])]}
    mapper = build_test_mapper(cfg, cfg.DATASETS.TEST[0])
    assert len(mapper(record)["boxes"]) == len(prompted_objects(record)) == (len(record["annotations"]) + 1) // 2


def test_boxes_of_a_detector(cfg, records, tmp_path):
    rows = [{"image_id": records[1]["image_id"], "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.25}]
    cfg.INPUT.PROMPTS.DETECTIONS = str(tmp_path / "found.json")
    (tmp_path / "found.json").write_text(json.dumps(rows))
    mapper = build_test_mapper(cfg, cfg.DATASETS.TEST[0])
    none, one = mapper(records[0]), mapper({k: v for k, v in records[1].items() if k != "annotations"})
    assert none["boxes"].shape == (0, 4) and none["box_scores"].shape == (0,)
    assert one["boxes"].tolist() == [[2, 4, 62, 84]] and one["box_scores"].tolist() == [0.25]


GOOD = {"category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.25}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bbox": [1, 2, 30]}, r"row 1 has bbox \[1, 2, 30\] and score 0.25. Expected x, y, width, height"),
        ({"bbox": "1 2 3 4"}, "row 1 has bbox 1 2 3 4 and"),
        ({"bbox": [1, 2, float("nan"), 40]}, "row 1 has bbox .* all finite"),
        ({"bbox": [1, 2, -5, 40]}, r"row 1 has bbox \[1, 2, -5, 40\] with a side below 0"),
        ({"score": None}, "row 1 has bbox .* and score None"),
        ({"category_id": 999}, "row 1 is of category 999, which data set '.*' does not have"),
    ],
)
def test_detections_that_are_none(cfg, records, tmp_path, change, said):
    rows = [{"image_id": records[0]["image_id"], **GOOD}, {"image_id": records[1]["image_id"], **GOOD, **change}]
    cfg.INPUT.PROMPTS.DETECTIONS = str(tmp_path / "found.json")
    (tmp_path / "found.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=said):
        build_test_mapper(cfg, cfg.DATASETS.TEST[0])


def test_detections_of_another_data_set(cfg, records, tmp_path, caplog):
    cfg.INPUT.PROMPTS.DETECTIONS = str(tmp_path / "found.json")
    foreign = {"image_id": 987654, **GOOD}
    (tmp_path / "found.json").write_text(json.dumps([foreign]))
    with pytest.raises(ValueError, match="1 of 1 images with results, e.g. 987654, are not in the data set"):
        build_test_mapper(cfg, cfg.DATASETS.TEST[0])
    (tmp_path / "found.json").write_text(json.dumps([foreign, {"image_id": records[0]["image_id"], **GOOD}]))
    assert len(build_test_mapper(cfg, cfg.DATASETS.TEST[0])(records[0])["boxes"]) == 1
    assert "1 of 2 images with results, e.g. 987654" in caplog.text


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (3, 2)])
def test_images_of_extreme_shape(cfg, records, tmp_path, size):
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(tmp_path / "a.png")
    height, width = size
    thing = {**records[0]["annotations"][0], "bbox": [0, 0, width, height]}
    thing["segmentation"] = [[0, 0, width, 0, width, height, 0, height]]
    record = {"file_name": str(tmp_path / "a.png"), "height": height, "width": width, "image_id": 1}
    record["annotations"] = [thing]
    train, test = build_mapper(cfg, records)(record), build_test_mapper(cfg, cfg.DATASETS.TEST[0])(record)
    for sample in (train, test):
        assert max(sample["image"].shape[1:]) == SIZE and min(sample["image"].shape[1:]) >= 1
        assert len(sample["boxes"]) == 1


def test_what_cannot_be_prompted_is_an_error(cfg, records):
    bare = {k: v for k, v in records[0].items() if k != "annotations"}
    with pytest.raises(ValueError, match="no boxes to prompt with.*INPUT.PROMPTS.DETECTIONS"):
        build_test_mapper(cfg, cfg.DATASETS.TEST[0])(bare)
    with pytest.raises(ValueError, match="'sam_prompts' needs 'annotations'"):
        build_mapper(cfg, [bare])
    cfg.TEST.TILES.ENABLED = True
    with pytest.raises(ValueError, match="TEST.TILES.ENABLED"):
        build_test_mapper(cfg, cfg.DATASETS.TEST[0])
