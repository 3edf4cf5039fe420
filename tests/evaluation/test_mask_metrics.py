"""IoU and Dice: figures of the published COBOT evaluation on small masks, and properties."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

pytest.importorskip("detectron2", reason="needs Detectron2")

from peft_d2.evaluation.prompted import MaskMetrics  # noqa: E402

SIZE, COLUMNS = 18, (3, 14)


def _rectangle(x0, y0, x1, y1):
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


# Overlapping squares, 20 px shared by 36 and 42; one found nowhere, in a class with the first.
OVERLAP = _rectangle(4, 2, 10, 8), _rectangle(5, 4, 12, 10)
MISSED = _rectangle(6, 3, 11, 6), _rectangle(0, 0, 0, 0)
# Outside the columns that are compared: there, both are empty. 8 px of 15.
OUTSIDE = _rectangle(0, 0, 3, 5), _rectangle(0, 0, 2, 4)


@pytest.mark.parametrize(
    ("pair", "dice", "cropped", "pixels"),
    [
        (OVERLAP, 0.5189873576164246, 0.5189873576164246, 0.5128205128205128),
        (MISSED, 0.0625, 0.0625, 0.0),
        (OUTSIDE, 0.7083333134651184, 1.0, 0.6956521739130435),
    ],
)
def test_published_figures(pair, dice, cropped, pixels):
    for columns, expected in ((None, dice), (COLUMNS, cropped)):
        metrics = MaskMetrics(["thing"], smoothing=1, columns=columns)
        metrics.add(*pair, 0)
        assert metrics.results()["mDice"] / 100 == pytest.approx(expected, abs=1e-6)
    metrics = MaskMetrics(["thing"])
    metrics.add(*pair, 0)
    assert metrics.results()["DSC"] / 100 == pytest.approx(pixels)


def test_classes_that_do_not_occur_are_left_out():
    metrics = MaskMetrics(["background", "bottle", "can", "chain"], smoothing=1)
    metrics.add(*OVERLAP, 1)
    metrics.add(*MISSED, 1)
    metrics.add(_rectangle(1, 1, 5, 5), _rectangle(1, 1, 5, 5), 2)
    results = metrics.results()
    bottle = 100 * (0.5189873576164246 + 0.0625) / 2
    assert results["Dice-bottle"] == pytest.approx(bottle)
    assert results["mDice"] == pytest.approx((bottle + 100) / 2)
    assert "Dice-chain" not in results


def test_published_dice_of_a_stack_is_over_all_its_pixels():
    """Intersections 20 + 0 + 8 + 49, areas 78 + 15 + 23 + 119: the figure of the four golden slices together."""
    metrics = MaskMetrics(["organ"])
    truth = np.zeros((4, 10, 20), dtype=bool)
    found = np.zeros_like(truth)
    for k, (shared, true, predicted) in enumerate(((20, 36, 42), (0, 15, 0), (8, 15, 8), (49, 63, 56))):
        truth[k].flat[:true] = True
        found[k].flat[true - shared : true - shared + predicted] = True
    metrics.add(truth, torch.from_numpy(found), 0)
    assert metrics.results()["DSC"] / 100 == pytest.approx(0.6553191489361702)


MASKS = arrays(bool, (5, 6))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(MASKS, MASKS, st.integers(0, 2)), min_size=1, max_size=6), st.sampled_from([0.0, 1.0]))
def test_two_processes_make_one_and_dice_follows_iou(pairs, smoothing):
    whole, parts = MaskMetrics("abc", smoothing), [MaskMetrics("abc", smoothing) for _ in range(2)]
    for number, (truth, found, label) in enumerate(pairs):
        whole.add(truth, found, label)
        parts[number % 2].add(truth, found, label)
    parts[0].merge(parts[1])
    assert parts[0].results() == pytest.approx(whole.results(), nan_ok=True)
    of_class = defaultdict(list)
    for truth, found, label in pairs:
        shared, either = (truth & found).sum() + smoothing, (truth | found).sum() + smoothing
        of_class[label].append(shared / either if either else 1.0)
    by_hand = 100 * np.mean([np.mean(values) for values in of_class.values()])
    assert whole.results()["mIoU"] == pytest.approx(by_hand)
    one = MaskMetrics("a")
    one.add(*pairs[0][:2], 0)
    iou = one.results()["mIoU"] / 100
    assert one.results()["mDice"] / 100 == pytest.approx(2 * iou / (1 + iou))


def test_nothing_is_nan_and_wrong_input_is_named():
    metrics = MaskMetrics(["a"])
    assert np.isnan(metrics.results()["mIoU"])
    with pytest.raises(ValueError, match="must agree"):
        metrics.add(np.zeros((2, 2)), np.zeros((2, 3)), 0)
    with pytest.raises(ValueError, match="class 1 is not listed"):
        metrics.add(np.zeros((2, 2)), np.zeros((2, 2)), 1)
    metrics.add(np.zeros((2, 2)), np.zeros((2, 2)), 0)
    assert np.isnan(metrics.results()["DSC"])
    assert metrics.results()["mIoU"] == 100
