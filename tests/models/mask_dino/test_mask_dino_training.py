"""A small Mask DINO trains and predicts with every option of its config; denoising queries and boxes are as meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peft_d2.models.layers.criterion import Target
from peft_d2.models.mask_dino.transformer_decoder import denoising_queries

from ..test_training import sample, step

OPTIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "three maps": {"MODEL.SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS": 3, "MODEL.SEM_SEG_HEAD.FEATURE_ORDER": "high2low"},
    "two coarser maps": {"MODEL.SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS": 5, "MODEL.MaskDINO.INITIALIZE_BOX_TYPE": "no"},
    "four maps and one": {
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS": 5,
        "MODEL.MaskDINO.INITIALIZE_BOX_TYPE": "bitmask",
    },
    "learned content": {"MODEL.MaskDINO.LEARN_TGT": True},
    "one stage": {"MODEL.MaskDINO.TWO_STAGE": False, "MODEL.MaskDINO.INITIALIZE_BOX_TYPE": "no"},
    "no first prediction": {"MODEL.MaskDINO.INITIAL_PRED": False, "MODEL.MaskDINO.INITIALIZE_BOX_TYPE": "no"},
    "boxes and classes denoised": {"MODEL.MaskDINO.DN": "standard"},
    "semantic, classes compete": {
        "MODEL.MaskDINO.SEMANTIC_CE_LOSS": True,
        "MODEL.MaskDINO.TEST.SEMANTIC_ON": True,
        "MODEL.MaskDINO.TEST.INSTANCE_ON": False,
    },
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_train_and_predict(small_dino: Any, option: str) -> None:
    model = small_dino(OPTIONS[option])
    inputs = [sample("bitmasks"), sample("bitmasks", 1, (48, 60))]
    losses = step(model, inputs)
    assert set(losses) == set(model.criterion.weight_dict)
    assert all(loss.isfinite() for loss in losses.values())
    assert any("_dn_0" in name for name in losses) == (option != "one stage")
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    # Places are chosen and boxes start from masks: with these, the encoder's own boxes are supervised all the same.
    assert not idle and all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        result = model.eval()(inputs)[1]
    if option.startswith("semantic"):
        assert result["sem_seg"].shape == (4, 48, 60)
    else:
        assert len(result["instances"]) == 32 and result["instances"].pred_boxes.tensor.isfinite().all()


@pytest.mark.parametrize("counts", [(0, 2), (0, 0), (8, 1)])
def test_without_denoising_queries_all_losses_stay(small_dino: Any, counts: tuple[int, int]) -> None:
    """Nothing to restore, or too much: every worker has the same losses and gradients all the same."""
    model = small_dino()
    inputs = [sample("tensor", min(count, 3)) for count in counts]
    if counts[0] == 8:
        instances = inputs[0]["instances"]
        inputs[0]["instances"] = type(instances).cat([instances] * 3)
    losses = step(model, inputs)
    assert set(losses) == set(model.criterion.weight_dict)
    denoised = sum(loss.item() for name, loss in losses.items() if "_dn" in name)
    assert (denoised == 0) == (counts != (0, 2))
    assert all(p.grad is not None for p in model.parameters())


def test_padded_boxes(small_dino: Any) -> None:
    """Published: target boxes relative to the image alone; ours on request: to the padded image, as results are."""
    from detectron2.structures import ImageList

    inputs = [sample("tensor", 1, (48, 60))]
    batch = ImageList.from_tensors([item["image"] for item in inputs], 32)
    for padded, size in ((False, (60, 48)), (True, (64, 64))):
        model = small_dino({"MODEL.SEM_SEG_HEAD.PADDED_BOXES": padded})
        (target,) = model.targets(inputs, batch)
        x0, y0, x1, y1 = 4, 6, 30, 40
        expected = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]) / torch.tensor([*size, *size])
        torch.testing.assert_close(target.boxes[0], expected)


def test_denoising_queries() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(3, 8)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.6, 0.1, 0.1]])
    targets = [
        Target(torch.tensor([0, 2]), torch.zeros(2, 4, 4), boxes),
        Target(torch.tensor([1]), torch.zeros(1, 4, 4)),
    ]
    targets[1].boxes = boxes[:1]
    queries = denoising_queries(targets, embedding, 7, 0.4)
    assert queries is not None and (queries.groups, queries.group_size, len(queries)) == (3, 2, 6)
    (first, _), (second, indices) = queries.matches(targets)
    assert first.tolist() == list(range(6)) and second.tolist() == [0, 2, 4] and indices.tolist() == [0, 0, 0]
    assert not queries.content[1, [1, 3, 5]].any() and not queries.box_logits[1, [1, 3, 5]].any()
    moved = queries.box_logits[0].sigmoid() - boxes.repeat(3, 1)
    reach = torch.cat([boxes[:, 2:] / 2, boxes[:, 2:]], dim=1).repeat(3, 1) * 0.4
    assert (moved.abs() <= reach + 1e-5).all() and (moved.abs() > 0.05 * reach).float().mean() > 0.8
    blocked = queries.blocked(2)
    for i in range(8):
        for j in range(8):
            sees = i // 2 == j // 2 if j < 6 else True  # its own group, and what is matched; that sees itself alone
            assert bool(blocked[i, j]) == (not sees)
    assert denoising_queries(targets, embedding, 1, 0.4) is None
    quiet = denoising_queries(targets, embedding, 7, 0.0)
    torch.testing.assert_close(quiet.box_logits[0].sigmoid(), boxes.repeat(3, 1))
    assert torch.equal(quiet.content[0], embedding(torch.tensor([0, 2] * 3)))
