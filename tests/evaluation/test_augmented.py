"""Test-time augmentation: a model that sees every view alike must give what it gives without."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="needs Detectron2")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from torch import nn  # noqa: E402

from peft_d2.data.config import add_data_config  # noqa: E402
from peft_d2.evaluation.augmented import AugmentedModel, check_augmentation  # noqa: E402
from peft_d2.models.layers.boxes import mask_boxes  # noqa: E402

HEIGHT, WIDTH = 40, 60


def _square(x: int, y: int, side: int = 10) -> torch.Tensor:
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[y : y + side, x : x + side] = True
    return mask


class Knows(nn.Module):
    """Finds given masks in every view; ``see(flip, size)`` says how sure it is of each, 0: not at all."""

    def __init__(self, masks, see=lambda flip, size: [0.9, 0.6], masked=True):
        super().__init__()
        self.masks, self.see, self.masked, self.views = torch.stack(masks), see, masked, []

    def forward(self, batched_inputs):
        results = []
        for record in batched_inputs:
            image = record["image"]
            flip = bool(image[0, 0, -1] > image[0, 0, 0])  # the left half is bright
            self.views.append((flip, *image.shape[1:]))
            scores = torch.tensor(self.see(flip, min(image.shape[1:])))
            masks = (self.masks.flip(-1) if flip else self.masks)[scores > 0]
            found = Instances((record["height"], record["width"]))
            found.pred_boxes, found.scores = Boxes(mask_boxes(masks)), scores[scores > 0]
            found.pred_classes = torch.arange(len(scores))[scores > 0] % 2
            if self.masked:
                found.pred_masks = masks
            results.append({"instances": found, "sem_seg": masks.float().sum(0, keepdim=True)})
        return results


def _predict(model, sizes=(20, 40), **options):
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    image[:, :, : WIDTH // 2] = 255
    return AugmentedModel(model, sizes, 100, **options).eval()([{"image": image}])[0]


@pytest.mark.parametrize("masked", [True, False], ids=["masks", "boxes"])
def test_views_that_agree_change_nothing(masked):
    masks = [_square(3, 5), _square(30, 20, 14)]
    model = Knows(masks, masked=masked)
    found = _predict(model)["instances"]
    assert set(model.views) == {(False, 20, 30), (True, 20, 30), (False, 40, 60), (True, 40, 60)}
    assert found.scores.tolist() == pytest.approx([0.9, 0.6]) and found.pred_classes.tolist() == [0, 1]
    assert torch.equal(found.pred_boxes.tensor, mask_boxes(torch.stack(masks)))
    if masked:
        assert torch.equal(found.pred_masks, torch.stack(masks))


def test_semantic_maps_are_averaged():
    maps = _predict(Knows([_square(3, 5), _square(30, 20, 14)], lambda flip, size: [0.5, 0.0 if flip else 0.5]))
    assert torch.equal(maps["sem_seg"][0], _square(3, 5) + 0.5 * _square(30, 20, 14))


def test_what_one_view_sees_counts_as_one_of_all():
    found = _predict(
        Knows([_square(3, 5), _square(30, 20)], lambda flip, size: [0.8, 0.4 if flip and size == 20 else 0])
    )
    assert found["instances"].scores.tolist() == pytest.approx([0.8, 0.1])


def test_pixels_are_voted_by_score_and_boxes_averaged():
    """The same object, 2 px further to the right in the mirrored view, of which the model is less sure."""
    model = Knows([_square(10, 5), _square(12, 5)], lambda flip, size: [0.0, 0.3] if flip else [0.6, 0.0])
    model.forward, forward = (lambda batch: [_same_class(output) for output in forward(batch)]), model.forward
    found = _predict(model, sizes=(40,))["instances"]
    assert len(found) == 1 and found.scores.item() == pytest.approx((0.6 + 0.3) / 2)
    assert torch.equal(found.pred_masks[0], _square(10, 5))
    assert found.pred_boxes.tensor[0].tolist() == pytest.approx([10 + 2 / 3, 5, 20 + 2 / 3, 15])


def _same_class(output):
    output["instances"].pred_classes[:] = 0
    return output


def test_duplicates_of_one_view_stay_apart_and_the_limit_holds():
    model = Knows([_square(3, 5)] * 6, lambda flip, size: [0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    assert _predict(model)["instances"].scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    assert _predict(model, limit=2)["instances"].scores.tolist() == pytest.approx([0.9, 0.8])


@pytest.mark.parametrize("masked", [True, False], ids=["masks", "boxes"])
def test_nothing_found(masked):
    found = _predict(Knows([_square(3, 5)], lambda flip, size: [0.0], masked=masked))["instances"]
    assert len(found) == 0 and found.has("pred_masks") == masked


def test_a_line_of_pixels_has_views():
    model = AugmentedModel(Knows([torch.ones(1, 500, dtype=torch.bool)], lambda flip, size: [0.5]), (8,), 64).eval()
    image = torch.from_numpy(np.linspace(255, 0, 500).astype(np.uint8)).expand(3, 1, 500)
    assert len(model([{"image": image}])[0]["instances"]) == 1


@pytest.mark.parametrize(
    ("node", "key", "value"), [("TILES", "ENABLED", True), ("", "INPUT.DATASET_MAPPER_NAME", "sam_prompts")]
)
def test_what_cannot_be_augmented_is_refused(node, key, value):
    cfg = get_cfg()
    add_data_config(cfg)
    cfg.INPUT.DATASET_MAPPER_NAME = ""
    cfg.TEST.AUG.ENABLED = True
    check_augmentation(cfg)
    cfg.merge_from_list([key if not node else f"TEST.{node}.{key}", value])
    with pytest.raises(ValueError, match="TEST.AUG cannot be combined"):
        check_augmentation(cfg)
