"""Losses and matching against plain float64 formulas, written pair by pair."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from peft_d2.models.layers.boxes import inverse_sigmoid, to_centres, to_corners
from peft_d2.models.layers.criterion import (
    HungarianMatcher,
    MaskProduct,
    SetCriterion,
    Target,
    assign,
    dice_cost,
    mask_cost,
    masks_or_product,
    of_queries,
    pair_up,
    predicted,
    sample_points,
    uncertain_points,
)
from peft_d2.models.mask_dino.model import BoxMaskCriterion, BoxMaskMatcher, generalized_iou

CLASSES, QUERIES, SIZE = 3, 5, 16
WEIGHTS = {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}


def bilinear(image: np.ndarray, x: float, y: float) -> float:
    """The value of ``image`` at (x, y) in units of its size, zero outside, pixel centres at halves."""
    height, width = image.shape
    column, row = x * width - 0.5, y * height - 0.5
    total = 0.0
    for i, j in itertools.product((0, 1), (0, 1)):
        r, c = math.floor(row) + i, math.floor(column) + j
        if 0 <= r < height and 0 <= c < width:
            total += image[r, c] * (1 - abs(row - r)) * (1 - abs(column - c))
    return total


def sample(image: Tensor, where: Tensor) -> np.ndarray:
    return np.array([bilinear(image.detach().double().numpy(), float(x), float(y)) for x, y in where])


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    p = 1 / (1 + np.exp(-logits))
    return float(-(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean())


def dice(logits: np.ndarray, labels: np.ndarray) -> float:
    p = 1 / (1 + np.exp(-logits))
    return float(1 - (2 * (p * labels).sum() + 1) / (p.sum() + labels.sum() + 1))


def softmax(logits: Tensor) -> np.ndarray:
    e = np.exp(logits.detach().double().numpy())
    return e / e.sum(-1, keepdims=True)


def make_criterion(count: int = 24, layers: int = 2) -> SetCriterion:
    weights = dict(WEIGHTS)
    for i in range(layers - 1):
        weights.update({f"{name}_{i}": weight for name, weight in WEIGHTS.items()})
    return SetCriterion(CLASSES, HungarianMatcher(2.0, 5.0, 5.0, count), weights, 0.1, (count, 3.0, 0.75))


def make_batch(counts: tuple[int, ...], layers: int = 2) -> tuple[dict[str, Any], list[Target]]:
    def predictions() -> dict[str, Any]:
        return {
            "pred_logits": torch.randn(len(counts), QUERIES, CLASSES + 1, requires_grad=True),
            "pred_masks": torch.randn(len(counts), QUERIES, SIZE // 2, SIZE // 2, requires_grad=True),
        }

    targets = [
        Target(torch.randint(0, CLASSES, (count,)), (torch.rand(count, SIZE, SIZE) > 0.6).float()) for count in counts
    ]
    return {**predictions(), "aux_outputs": [predictions() for _ in range(layers - 1)]}, targets


@pytest.mark.parametrize("targets", [0, 1, 3, 8])
def test_costs_of_every_pair(targets: int) -> None:
    logits, labels = 4 * torch.randn(QUERIES, 20), torch.rand(targets, 20)
    for cost, formula in ((mask_cost, cross_entropy), (dice_cost, dice)):
        expected = [[formula(p.double().numpy(), t.double().numpy()) for t in labels] for p in logits]
        torch.testing.assert_close(
            cost(logits, labels).double(), torch.tensor(expected).view(QUERIES, targets).double()
        )


@pytest.mark.parametrize("counts", [(2, 3), (0, 4), (7, 1)])
def test_matching_is_the_cheapest_of_all(counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = make_criterion()
    outputs, targets = make_batch(counts)
    drawn: list[Tensor] = []
    original = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **kw: drawn.append(original(*size, **kw)) or drawn[-1])
    layers = [outputs, *outputs["aux_outputs"]]
    matches = criterion.matcher(layers, targets)
    for layer, image in itertools.product(range(len(layers)), range(len(counts))):
        labels, masks, where = targets[image].labels, targets[image].masks, drawn[image]
        probability = softmax(layers[layer]["pred_logits"][image])
        predicted = [sample(mask, where) for mask in layers[layer]["pred_masks"][image]]
        wanted = [sample(mask, where) for mask in masks]

        def cost(q: int, t: int) -> float:
            return (
                -2 * probability[q, labels[t]]  # noqa: B023
                + 5 * cross_entropy(predicted[q], wanted[t])  # noqa: B023
                + 5 * dice(predicted[q], wanted[t])  # noqa: B023
            )

        few, many = sorted((QUERIES, len(labels)))
        best = min(
            sum(cost(*((i, m) if QUERIES == few else (m, i))) for i, m in enumerate(chosen))
            for chosen in itertools.permutations(range(many), few)
        )
        queries, indices = matches[layer][image]
        assert len(queries) == few and indices.tolist() == sorted(set(indices.tolist()))
        found = sum(cost(q, t) for q, t in zip(queries.tolist(), indices.tolist(), strict=True))
        assert found == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("counts", [(2, 3), (0, 4), (7, 1)])
def test_losses_at_the_points_that_were_drawn(counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = make_criterion()
    outputs, targets = make_batch(counts)
    matches = criterion.matcher([outputs, *outputs["aux_outputs"]], targets)
    monkeypatch.setattr(HungarianMatcher, "forward", lambda *_: matches)
    used: list[Tensor] = []

    def keep(*arguments: Any) -> Tensor:
        used.append(uncertain_points(*arguments))
        return used[-1]

    monkeypatch.setattr("peft_d2.models.layers.criterion.uncertain_points", keep)
    losses = criterion(outputs, targets)
    count = max(1, sum(counts))
    for layer, (prediction, suffix) in enumerate(zip([outputs, *outputs["aux_outputs"]], ["", "_0"], strict=True)):
        where = iter(used[layer])
        expected_mask = expected_dice = numerator = denominator = 0.0
        for image, target in enumerate(targets):
            probability = softmax(prediction["pred_logits"][image])
            classes = [CLASSES] * QUERIES
            for query, index in zip(*(m.tolist() for m in matches[layer][image]), strict=True):
                classes[query] = int(target.labels[index])
                at = next(where)
                logits = sample(prediction["pred_masks"][image, query], at)
                labels = sample(target.masks[index], at)
                expected_mask += cross_entropy(logits, labels) / count
                expected_dice += dice(logits, labels) / count
            for query, label in enumerate(classes):
                weight = 0.1 if label == CLASSES else 1.0
                numerator -= weight * math.log(probability[query, label])
                denominator += weight
        assert losses["loss_mask" + suffix].item() == pytest.approx(expected_mask, abs=1e-5)
        assert losses["loss_dice" + suffix].item() == pytest.approx(expected_dice, abs=1e-5)
        assert losses["loss_ce" + suffix].item() == pytest.approx(numerator / denominator, abs=1e-5)


def test_no_target_at_all_is_a_normal_step() -> None:
    outputs, targets = make_batch((0, 0))
    losses = make_criterion()(outputs, targets)
    assert {losses[name].item() for name in ("loss_mask", "loss_dice", "loss_mask_0", "loss_dice_0")} == {0.0}
    no_object = outputs["pred_logits"].log_softmax(-1)[..., -1]
    assert losses["loss_ce"].item() == pytest.approx(-no_object.mean().item(), abs=1e-6)
    sum(losses.values()).backward()
    assert outputs["pred_masks"].grad is not None and not outputs["pred_masks"].grad.any()
    assert outputs["pred_logits"].grad.any()


def test_losses_that_have_no_weight_are_left_out() -> None:
    criterion = make_criterion(layers=1)  # no deep supervision
    assert set(criterion(*make_batch((2, 1)))) == set(WEIGHTS)


def test_points_prefer_uncertain_places() -> None:
    """Certain everywhere but in a band: all of the important share lies there, the uniform share does not."""
    logits = torch.full((2, 32, 32), 9.0)
    logits[:, 10:22] = 0.0
    where = uncertain_points(logits, 400, 3.0, 0.75)
    assert where.shape == (2, 400, 2) and where.min() >= 0 and where.max() <= 1
    certainty = sample_points(logits[:, None], where)[:, 0].abs()
    important, uniform = certainty[:, :300], certainty[:, 300:]
    assert important.max() < 9.0 and uniform.max() > 8.9  # of 1,200 candidates, 450 lie in the band
    assert important.mean() < uniform.mean() / 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_cost_that_is_not_finite_is_avoided(bad: float) -> None:
    cost = torch.tensor([[bad, 1.0], [3.0, 2.0], [bad, bad]])
    queries, targets = assign(cost)
    assert list(zip(queries.tolist(), targets.tolist(), strict=True)) == [(1, 0), (0, 1)]


def test_half_precision_predictions_are_matched_in_float32() -> None:
    """Logits that float16 can hold but whose exponentials it cannot."""
    outputs, targets = make_batch((3, 2))
    for prediction in (outputs, *outputs["aux_outputs"]):
        prediction["pred_masks"] = (3e4 * prediction["pred_masks"].detach()).clamp(-6e4, 6e4).half()
        prediction["pred_logits"] = prediction["pred_logits"].detach().half()
    criterion = make_criterion()
    assert criterion.matcher.costs([outputs], 0, targets[0]).isfinite().all()
    assert all(loss.isfinite() for loss in criterion(outputs, targets).values())


def test_boxes_and_focal_loss_against_torchvision() -> None:
    torch.manual_seed(0)
    boxes, others = torch.rand(5, 4) * 0.4 + 0.1, torch.rand(3, 4) * 0.4 + 0.1
    corners = to_corners(boxes)
    torch.testing.assert_close(corners, torchvision.ops.box_convert(boxes, "cxcywh", "xyxy"))
    torch.testing.assert_close(to_centres(corners), boxes)
    found = generalized_iou(corners[:, None], to_corners(others)[None])
    expected = torchvision.ops.generalized_box_iou(corners, to_corners(others))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # ours has a margin for boxes without area
    assert generalized_iou(torch.zeros(4), torch.zeros(4)).isfinite()
    values = torch.rand(20)
    torch.testing.assert_close(inverse_sigmoid(values), values.logit(), atol=1e-5, rtol=1e-5)
    assert inverse_sigmoid(torch.tensor([-1.0, 2.0])).tolist() == pytest.approx([math.log(1e-5), -math.log(1e-5)])


@pytest.mark.parametrize("counts", [(2, 3), (0, 4), (7, 1), (0, 0)])
def test_masks_made_on_demand_have_the_same_losses_and_gradients(counts: tuple[int, ...]) -> None:
    """As all of them, made before."""
    criterion, targets = make_criterion(layers=3), make_batch(counts)[1]
    features = torch.randn(len(counts), 6, SIZE // 2, SIZE // 2, requires_grad=True)
    embedded = torch.randn(3, len(counts), QUERIES, 6, requires_grad=True)
    logits = torch.randn(3, len(counts), QUERIES, CLASSES + 1)

    def run(before: bool) -> tuple[list[Tensor], dict]:
        torch.manual_seed(0)
        pairs = zip(logits, embedded, strict=True)
        last, *others = [predicted(e, features, before, pred_logits=x) for x, e in pairs]
        last["aux_outputs"] = others
        losses = criterion(last, targets)
        return [*losses.values(), *torch.autograd.grad(sum(losses.values()), (features, embedded))], others[0]

    (expected, _), (found, last) = run(True), run(False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert isinstance(masks_or_product(last), MaskProduct)
    assert last["pred_masks"].shape == (len(counts), QUERIES, SIZE // 2, SIZE // 2)
    assert last["pred_masks"] is last["pred_masks"]  # once asked for, they are kept
    assert torch.equal(of_queries(last, slice(1, 3))["pred_masks"], last["pred_masks"][:, 1:3])
    with pytest.raises(KeyError, match="pred_boxes"):
        last["pred_boxes"]


@pytest.mark.parametrize(
    "copied",
    [
        dict,
        copy.copy,
        copy.deepcopy,
        dict.copy,
        lambda p: {**p},
        lambda p: p | {},
        lambda p: dict(zip(p, p.values(), strict=True)),
    ]
    + [lambda p: {k: v for k, v in p.items() if k != "aux_outputs"}, lambda p: pickle.loads(pickle.dumps(p))]
    + [lambda p: {"pred_logits": p["pred_logits"], "pred_masks": p.get("pred_masks")} if "pred_masks" in p else {}]
    + [lambda p: type(p)(p.items()), lambda p: tree_map(lambda x: x, p), lambda p: {k: p.pop(k) for k in list(p)}]
    + [lambda p: dict.copy(p) if p.setdefault("pred_masks") is not None and len(p) == 2 else {}],
)
def test_other_criteria_find_all_masks(copied: Callable[[dict], dict]) -> None:
    """In whatever way they go through what a decoder predicts, as in a plain dict."""
    values = torch.randn(2, 5, 4), torch.randn(2, 4, 6, 6)
    expected = predicted(*values, kept=True, pred_logits=torch.zeros(2, 5, 3))
    found = copied(predicted(*values, kept=False, pred_logits=torch.zeros(2, 5, 3)))
    assert sorted(found) == sorted(expected) and found.get("pred_boxes", 1) == 1
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("asked", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode])
def test_whoever_asks_first_changes_no_gradient(asked: Callable[[], Any]) -> None:
    """A matcher or a hook, say, that looks at the masks without gradients, or under another autocast."""
    grads = []
    for kept in (True, False):
        torch.manual_seed(0)
        embedded = torch.randn(2, 5, 4, requires_grad=True)
        prediction = predicted(2 * embedded, torch.randn(2, 4, 6, 6), kept, pred_logits=torch.zeros(2, 5, 3))
        with asked():
            prediction["pred_masks"].max()
        prediction["pred_masks"].square().sum().backward()
        grads.append(embedded.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_looking_for_tensors_makes_no_masks() -> None:
    """As torch.utils.checkpoint does with what a recomputed block is given."""
    prediction = predicted(torch.randn(2, 5, 4), torch.randn(2, 4, 6, 6), False, pred_logits=torch.zeros(2, 5, 3))
    assert [leaf.dim() for leaf in tree_leaves(prediction)] == [3, 3, 4]
    assert isinstance(masks_or_product(prediction), MaskProduct)
    moved = tree_map(lambda leaf: leaf.double(), prediction)
    assert isinstance(masks_or_product(moved), MaskProduct) and moved["pred_masks"].dtype == torch.float64


def test_masks_that_are_taken_out_stay_out() -> None:
    prediction = predicted(torch.randn(2, 5, 4), torch.randn(2, 4, 6, 6), False, pred_logits=torch.zeros(2, 5, 3))
    del prediction["pred_masks"]
    assert list(prediction) == ["pred_logits"] and "pred_masks" not in prediction
    with pytest.raises(KeyError):
        prediction["pred_masks"]


def test_masks_that_somebody_replaces_count() -> None:
    """As a decoder does that refines them."""
    criterion, targets = make_criterion(), make_batch((2, 3))[1]
    masks = torch.randn(2, QUERIES, SIZE, SIZE)
    plain = {"pred_logits": torch.randn(2, QUERIES, CLASSES + 1), "pred_masks": masks}
    refined = predicted(torch.randn(2, QUERIES, 4), torch.randn(2, 4, SIZE, SIZE), kept=False, **plain)
    losses = []
    for outputs in (plain, refined):
        torch.manual_seed(0)
        losses.append(criterion(outputs, targets))
    assert losses[0] == losses[1]


def test_costs_and_losses_of_boxes() -> None:
    torch.manual_seed(0)
    matcher = BoxMaskMatcher(cost_class=4, cost_mask=0, cost_dice=0, cost_box=5, cost_giou=2, num_points=4)
    labels, wanted = torch.tensor([2, 0]), torch.rand(2, 4) * 0.3 + 0.2
    target = Target(labels, torch.zeros(2, SIZE, SIZE), wanted)
    prediction = {
        "pred_logits": torch.randn(1, QUERIES, CLASSES),
        "pred_masks": torch.randn(1, QUERIES, SIZE, SIZE),
        "pred_boxes": torch.rand(1, QUERIES, 4) * 0.3 + 0.2,
    }
    (found,) = matcher.costs([prediction], 0, target)
    giou = torchvision.ops.generalized_box_iou(to_corners(prediction["pred_boxes"][0]), to_corners(wanted))
    for q, t in itertools.product(range(QUERIES), range(2)):
        p = 1 / (1 + math.exp(-float(prediction["pred_logits"][0, q, labels[t]])))
        focal = -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)
        distance = float((prediction["pred_boxes"][0, q] - wanted[t]).abs().sum())
        assert float(found[q, t]) == pytest.approx(4 * focal + 5 * distance - 2 * float(giou[q, t]), abs=1e-4)

    options = {"no_object_weight": 0.1, "points": (4, 3.0, 0.75)}
    criterion = BoxMaskCriterion(
        num_classes=CLASSES, matcher=matcher, weight_dict={"loss_ce": 1.0}, softmax_classes=False, **options
    )
    matched = pair_up([target], [(torch.tensor([3, 1]), torch.tensor([0, 1]))])
    losses = criterion.layer_losses(prediction, matched, 2.0, None, masks=True)
    chosen = prediction["pred_boxes"][0, [3, 1]]
    assert losses["loss_bbox"].item() == pytest.approx(float((chosen - wanted).abs().sum()) / 2)
    assert losses["loss_giou"].item() == pytest.approx(float(2 - giou[3, 0] - giou[1, 1]) / 2, abs=1e-4)
    hot = torch.zeros(1, QUERIES, CLASSES)
    hot[0, 3, 2] = hot[0, 1, 0] = 1
    p = prediction["pred_logits"].double().sigmoid()
    focal_sum = -(0.25 * hot * (1 - p) ** 2 * p.log() + 0.75 * (1 - hot) * p**2 * (1 - p).log()).sum()
    assert losses["loss_ce"].item() == pytest.approx(focal_sum.item() / 2, rel=1e-5)
    criterion.box_classes = {0}  # only the second target's
    only = criterion.layer_losses(prediction, matched, 2.0, None, masks=True)
    assert only["loss_bbox"].item() == pytest.approx(float((chosen[1] - wanted[1]).abs().sum()) / 2)
