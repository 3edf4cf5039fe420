"""COCO figures against pycocotools, and the evaluator against Detectron2's own."""

from __future__ import annotations

import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="needs Detectron2")

import toy  # noqa: E402
from detectron2.data import MetadataCatalog  # noqa: E402
from detectron2.evaluation import COCOEvaluator  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402

from peft_d2.data.registration import register_coco  # noqa: E402
from peft_d2.data.segmentation import segmentation_to_mask  # noqa: E402
from peft_d2.evaluation.coco import (  # noqa: E402
    FastCOCOEvaluator,
    complete,
    encode_masks,  # noqa: E402
    evaluate_coco,
)

from .worlds import encoded, pycocotools, random_world  # noqa: E402


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(4))
def test_figures_are_those_of_pycocotools(task, seed):
    data, results = random_world(6, 40, seed=seed)
    ours, reference = evaluate_coco(copy.deepcopy(data), results, task), pycocotools(data, results, task)
    assert 0.02 < reference.stats[0] < 0.98
    assert np.allclose(ours.stats[:12], reference.stats, rtol=0, atol=1e-12)
    assert np.allclose(ours.eval["precision"], reference.eval["precision"], rtol=0, atol=1e-12)


def test_missing_area_and_iscrowd_are_filled_in():
    data, _ = random_world(2, 0)
    square = [2.0, 2.0, 8.0, 2.0, 8.0, 6.0, 2.0, 6.0]
    data["annotations"][0]["segmentation"] = [square]
    data["annotations"][0]["area"] = 24
    expected = [a["area"] for a in data["annotations"]]
    for annotation in data["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    complete(data)
    assert [a["area"] for a in data["annotations"]] == expected
    assert {a["iscrowd"] for a in data["annotations"]} == {0}


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_masks_are_encoded_as_they_are(dtype, count):
    masks = torch.rand(count, 7, 11) > 0.5
    assert encode_masks(masks.to(dtype), chunk=2) == [encoded(m.numpy()) for m in masks]


@pytest.fixture
def registered(tmp_path, request):
    made = toy.generate(tmp_path / "set", "night", 6, 0, size=64)
    name = request.node.name
    register_coco(name, made.json, made.images)
    return name, json.loads(made.json.read_text())


def _outputs(data, shift=0, drop_every=0):
    """The truth as predictions, moved to the right by ``shift`` px."""
    for image in data["images"]:
        annotations = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        annotations = [a for i, a in enumerate(annotations) if not drop_every or i % drop_every]
        masks = np.zeros((len(annotations), 64, 64), dtype=bool)
        for mask, annotation in zip(masks, annotations, strict=True):
            drawn = segmentation_to_mask(annotation["segmentation"], 64, 64)
            mask[:, shift:] = drawn[:, : 64 - shift]
        instances = Instances((64, 64))
        instances.pred_masks = torch.from_numpy(masks)
        boxes = torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4)
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        instances.pred_boxes = Boxes(corners + torch.tensor([shift, 0, 0, 0]))
        instances.scores = torch.linspace(0.9, 0.3, len(annotations))
        instances.pred_classes = torch.tensor([a["category_id"] - 1 for a in annotations], dtype=torch.int64)
        yield [{"image_id": image["id"]}], [{"instances": instances}]


def _evaluate(evaluator, outputs):
    evaluator.reset()
    for pair in outputs:
        evaluator.process(*pair)
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()


def test_perfect_predictions_give_100(registered, tmp_path):
    name, data = registered
    results = _evaluate(FastCOCOEvaluator(name, output_dir=str(tmp_path / "out")), _outputs(data))
    for task in ("bbox", "segm"):
        assert results[task]["AP"] == results[task]["AP50"] == pytest.approx(100)
        assert {"AP-star", "AP-ring", "AP-cross"} < set(results[task])
    stored = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {r["category_id"] for r in stored} == {1, 2, 3}


@pytest.mark.parametrize(("shift", "drop_every"), [(1, 0), (2, 3)])
def test_evaluator_equals_detectron2s(registered, tmp_path, shift, drop_every):
    name, data = registered
    ours = _evaluate(FastCOCOEvaluator(name), _outputs(data, shift, drop_every))
    theirs = _evaluate(COCOEvaluator(name, output_dir=None, use_fast_impl=False), _outputs(data, shift, drop_every))
    assert ours.keys() == theirs.keys() == {"bbox", "segm"}
    for task in ours:
        assert ours[task].keys() == theirs[task].keys()
        assert list(ours[task].values()) == pytest.approx(list(theirs[task].values()), nan_ok=True, abs=1e-9)
    assert 1 < ours["segm"]["AP"] < 99


def test_no_predictions_are_nan_not_a_crash(registered):
    name, data = registered
    results = _evaluate(FastCOCOEvaluator(name), _outputs(data, drop_every=1))
    assert np.isnan(results["bbox"]["AP"])


def test_a_class_that_the_data_set_lacks_is_an_error(registered):
    name, data = registered
    outputs = list(_outputs(data))
    outputs[0][1][0]["instances"].pred_classes[0] = 3
    with pytest.raises(ValueError, match="class 3, but the data set has classes 0 to 2"):
        _evaluate(FastCOCOEvaluator(name), outputs)
    assert MetadataCatalog.get(name).thing_classes == ["star", "ring", "cross"]
