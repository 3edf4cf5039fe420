"""Masks of prompted boxes against their objects."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="needs Detectron2")

import toy  # noqa: E402
from detectron2.config import CfgNode, get_cfg  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.structures import Instances  # noqa: E402

from peft_d2.data.config import add_data_config  # noqa: E402
from peft_d2.evaluation.build import build_evaluator  # noqa: E402
from peft_d2.evaluation.prompted import PromptedMaskEvaluator  # noqa: E402

from .worlds import encoded


@pytest.fixture
def name(request):
    name = request.node.name
    MetadataCatalog.get(name).set(thing_classes=["cat", "dog", "bird"])
    yield name
    MetadataCatalog.remove(name)


def square(x, side, size=40):
    mask = np.zeros((size, size), dtype=bool)
    mask[5 : 5 + side, x : x + side] = True
    return mask


def pair(truths, found, crowd=()):
    """A record whose objects are ``truths`` (mask, class), and the output with the masks ``found``."""
    annotations = [{"segmentation": encoded(m), "category_id": c, "iscrowd": 0} for m, c in truths]
    annotations[1:1] = [{"segmentation": encoded(m), "category_id": 0, "iscrowd": 1} for m in crowd]
    instances = Instances((40, 40))
    instances.pred_masks = torch.from_numpy(np.stack(found)) if found else torch.zeros(0, 40, 40, dtype=torch.bool)
    return {"file_name": "a.png", "annotations": annotations}, {"instances": instances}


def test_each_prediction_belongs_to_one_object(name):
    evaluator = PromptedMaskEvaluator(name)
    rows = [
        # moved by half its side: IoU 1/3; exact; nothing found
        pair([(square(0, 10), 0), (square(20, 8), 1)], [square(5, 10), square(20, 8)], crowd=[square(1, 30)]),
        pair([(square(3, 6), 0)], [square(3, 0)]),
        pair([], []),
    ]
    inputs, outputs = zip(*rows, strict=True)
    evaluator.process(inputs, outputs)
    found = evaluator.evaluate()["masks"]
    assert found["IoU-cat"] == pytest.approx(100 * (1 / 3 + 0) / 2)
    assert found["Dice-cat"] == pytest.approx(100 * (1 / 2 + 0) / 2)
    assert found["DSC-cat"] == pytest.approx(100 * 2 * 50 / (100 + 100 + 36))
    assert found["IoU-dog"] == 100 and "IoU-bird" not in found
    assert found["mIoU"] == pytest.approx((100 / 6 + 100) / 2)
    evaluator.reset()
    assert np.isnan(evaluator.evaluate()["masks"]["mIoU"])


def test_another_number_of_predictions_is_an_error(name):
    record, output = pair([(square(0, 10), 0), (square(20, 8), 1)], [square(5, 10)])
    with pytest.raises(ValueError, match="a.png: 1 predictions for 2 objects"):
        PromptedMaskEvaluator(name).process([record], [output])


@pytest.mark.parametrize(
    ("detections", "expected"),
    [("", ["PromptedMaskEvaluator", "FastCOCOEvaluator"]), ("a.json", ["FastCOCOEvaluator"])],
)
def test_which_evaluators_it_gets(tmp_path, request, detections, expected):
    made = toy.generate(tmp_path, "day", 2, 0, size=32)
    DatasetCatalog.register(request.node.name, list)
    MetadataCatalog.get(request.node.name).set(
        json_file=str(made.json), image_root=str(made.images), thing_classes=["a"], evaluator_type="coco"
    )
    cfg = get_cfg()
    add_data_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "PEFTModel"
    cfg.MODEL.PEFT = CfgNode({"META_ARCHITECTURE": "PD2SegmentAnything"})
    cfg.INPUT.PROMPTS.DETECTIONS = detections
    evaluator = build_evaluator(cfg, request.node.name, None)
    assert [type(e).__name__ for e in getattr(evaluator, "_evaluators", [evaluator])] == expected
