"""Post-processing against a plain formulation that holds everything at full size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_d2.models.layers import postprocess
from peft_d2.models.layers.boxes import mask_boxes
from peft_d2.models.layers.postprocess import (
    Canvas,
    instance_inference,
    panoptic_inference,
    semantic_inference,
)

CANVAS = Canvas(padded=(64, 96), image=(50, 90), output=(33, 71))
QUERIES, CLASSES = 12, 5


@pytest.fixture(params=[2**24, 64 * 96 * 5, 1], ids=["one chunk", "some chunks", "one mask a chunk"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postprocess, "CHUNK_VALUES", request.param)


@pytest.fixture
def queries() -> tuple[Tensor, Tensor]:
    """Probabilities of the classes and of no-object, and mask logits."""
    masks = F.interpolate(6 * torch.randn(1, QUERIES, 4, 6), size=(16, 24), mode="bicubic")[0]
    masks[3] = -5.0  # a query without a mask
    return (3 * torch.randn(QUERIES, CLASSES + 1)).softmax(-1), masks


def full_size(masks: Tensor) -> Tensor:
    padded = F.interpolate(masks[None], size=CANVAS.padded, mode="bilinear", align_corners=False)
    cropped = padded[:, :, : CANVAS.image[0], : CANVAS.image[1]]
    return F.interpolate(cropped, size=CANVAS.output, mode="bilinear", align_corners=False)[0]


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("top_k", [1, 7, QUERIES * CLASSES, 1000])
@pytest.mark.parametrize("things", [None, {1, 3}])
def test_instances(queries: tuple[Tensor, Tensor], top_k: int, things: set[int] | None) -> None:
    probability, masks = queries[0], full_size(queries[1])
    result, chosen = instance_inference(probability[:, :-1], queries[1], CANVAS, top_k, things)
    ranked = sorted(((probability[q, c].item(), q, c) for q in range(QUERIES) for c in range(CLASSES)), reverse=True)
    expected = []
    for class_score, query, category in ranked[:top_k]:
        if things is None or category in things:
            inside = masks[query] > 0
            quality = masks[query].sigmoid()[inside].sum() / (inside.sum() + 1e-6)
            expected.append((class_score * quality.item(), category, inside, query))
    expected.sort(key=lambda row: -row[0])
    assert len(result) == len(expected)
    torch.testing.assert_close(result.scores, torch.tensor([row[0] for row in expected]))
    positive = result.scores > 0  # the order among empty masks is arbitrary
    assert result.pred_classes[positive].tolist() == [row[1] for row in expected if row[0] > 0]
    assert chosen[positive].tolist() == [row[3] for row in expected if row[0] > 0]
    for found, row in zip(result.pred_masks[positive], expected, strict=False):
        assert torch.equal(found, row[2])
    assert result.pred_masks.dtype == torch.bool and result.image_size == CANVAS.output


def test_bicubic_last_step() -> None:
    """Only the step from the image to the output is bicubic, antialiased where it shrinks."""
    masks = 6 * torch.randn(QUERIES, 16, 24)
    canvas = Canvas(CANVAS.padded, CANVAS.image, CANVAS.output, bicubic=True)
    padded = F.interpolate(masks[None], size=CANVAS.padded, mode="bilinear", align_corners=False)
    cropped = padded[:, :, : CANVAS.image[0], : CANVAS.image[1]]
    expected = F.interpolate(cropped, size=CANVAS.output, mode="bicubic", align_corners=False, antialias=True)[0]
    torch.testing.assert_close(canvas.upsample(masks), expected)
    assert (expected - full_size(masks)).abs().max() > 0.1


def test_fewer_pairs_than_detections_asked_for() -> None:
    result, _ = instance_inference(torch.rand(2, 1), torch.randn(2, 16, 24), CANVAS, top_k=100)
    assert len(result) == 2  # 2 queries x 1 class


def test_no_thing_among_the_best() -> None:
    result, _ = instance_inference(torch.rand(2, 2), torch.randn(2, 16, 24), CANVAS, top_k=4, keep_classes=set())
    assert len(result) == 0 and result.pred_masks.shape == (0, 33, 71)


def test_boxes_enclose_their_masks(queries: tuple[Tensor, Tensor]) -> None:
    masks = CANVAS.upsample(queries[1]) > 0
    boxes = mask_boxes(masks).tolist()
    for mask, box in zip(masks, boxes, strict=True):
        place = mask.nonzero()
        if not len(place):
            assert box == [0, 0, 0, 0]
            continue
        (y0, x0), (y1, x1) = place.amin(0).tolist(), (place.amax(0) + 1).tolist()
        assert box == [x0, y0, x1, y1]
    assert boxes.count([0, 0, 0, 0]) >= 1 and len(set(map(tuple, boxes))) > 2


def test_box_of_a_full_mask() -> None:
    assert mask_boxes(torch.ones(1, 4, 7, dtype=torch.bool)).tolist() == [[0, 0, 7, 4]]


@pytest.mark.usefixtures("_chunks")
def test_semantic_map(queries: tuple[Tensor, Tensor]) -> None:
    found = semantic_inference(queries[0][:, :-1], queries[1], CANVAS)
    probability = queries[0][:, :-1].double()
    expected = (probability[:, :, None, None] * full_size(queries[1]).sigmoid().double()[:, None]).sum(0)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("_chunks")
def test_semantic_map_resized_last(queries: tuple[Tensor, Tensor]) -> None:
    found = semantic_inference(queries[0][:, :-1], queries[1], CANVAS, resize_last=True)
    masks = F.interpolate(queries[1][None], size=CANVAS.padded, mode="bilinear", align_corners=False)[0].sigmoid()
    summed = torch.einsum("qc,qhw->chw", queries[0][:, :-1], masks)[None, :, :50, :90]
    expected = F.interpolate(summed, size=CANVAS.output, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def slow_panoptic(probabilities: Tensor, masks: Tensor, things: set[int], score: float, overlap: float) -> Any:
    scores, classes = probabilities.max(-1)
    kept = [q for q in range(QUERIES) if classes[q] != CLASSES and scores[q] > score]
    ids = torch.zeros(masks.shape[1:], dtype=torch.int32)
    segments: list[dict] = []
    if not kept:
        return ids, segments
    probability = masks.sigmoid()
    winner = torch.stack([scores[q] * probability[q] for q in kept]).argmax(0)
    stuff: dict[int, int] = {}
    for k, q in enumerate(kept):
        wins, own = winner == k, probability[q] >= 0.5
        if not (wins & own).any() or wins.sum() / own.sum() < overlap:
            continue
        category = int(classes[q])
        if category in things or category not in stuff:
            segments.append({"id": len(segments) + 1, "isthing": category in things, "category_id": category})
            stuff.setdefault(category, len(segments))
        ids[wins & own] = len(segments) if category in things else stuff[category]
    return ids, segments


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("score", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("overlap", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("things", [set(), {0, 1}, set(range(CLASSES))])
def test_panoptic(queries: tuple[Tensor, Tensor], things: set[int], score: float, overlap: float) -> None:
    scores, classes = queries[0].max(-1)
    keep = (classes != CLASSES) & (scores > score)
    ids, segments = panoptic_inference(scores[keep], classes[keep], queries[1][keep], CANVAS, things, overlap)
    expected_ids, expected_segments = slow_panoptic(queries[0], full_size(queries[1]), things, score, overlap)
    assert segments == expected_segments
    assert torch.equal(ids, expected_ids) and ids.dtype == torch.int32
    if score == overlap == 0.0:
        assert len(segments) > 1  # the case says something
