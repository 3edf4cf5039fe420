"""Panoptic quality against the definition, computed with whole masks."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="needs Detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402

from peft_d2.evaluation.panoptic import PanopticQualityEvaluator, compare, quality  # noqa: E402

CLASSES = (1, 2, 3)


def _random_segments(rng, size=24, count=7):
    labels = np.zeros((size, size), dtype=np.int64)
    for number in range(1, count + 1):
        x, y, w, h = rng.integers(0, size - 4), rng.integers(0, size - 4), rng.integers(3, 14), rng.integers(3, 14)
        labels[y : y + h, x : x + w] = number
    ids = [int(i) for i in np.unique(labels) if i]
    return labels, {i: int(rng.choice(CLASSES)) for i in ids}


def _oracle(pairs):
    """The definition, mask by mask: unannotated pixels are taken out of predictions' unions."""
    sums = {c: [0.0, 0, 0, 0] for c in CLASSES}
    for truth, true_classes, crowd, found, found_classes in pairs:
        matched_t, matched_f = set(), set()
        for t, tc in true_classes.items():
            for f, fc in found_classes.items():
                if tc != fc or t in crowd:
                    continue
                a, b = truth == t, found == f
                iou = (a & b).sum() / ((a | b) & ((truth != 0) | a)).sum()
                if iou > 0.5:
                    sums[tc][0] += iou
                    sums[tc][1] += 1
                    matched_t.add(t)
                    matched_f.add(f)
        for f, fc in found_classes.items():
            ignored = (truth == 0) | np.isin(truth, [t for t in crowd if true_classes[t] == fc])
            if f not in matched_f and (ignored & (found == f)).sum() <= 0.5 * (found == f).sum():
                sums[fc][2] += 1
        for t, tc in true_classes.items():
            sums[tc][3] += t not in matched_t and t not in crowd
    return sums


@pytest.mark.parametrize("seed", range(6))
def test_against_the_definition(seed):
    rng = np.random.default_rng(seed)
    pairs, statistics = [], {c: np.zeros(4) for c in CLASSES}
    for _ in range(12):
        truth, true_classes = _random_segments(rng)
        found, found_classes = np.roll(truth, int(rng.integers(0, 3)), axis=1), dict(true_classes)
        for i in list(found_classes)[: int(rng.integers(0, 3))]:
            found_classes[i] = int(rng.choice(CLASSES))
        one_of_each = {true_classes[i]: i for i in true_classes if rng.random() < 0.2}
        crowd = set(one_of_each.values())
        pairs.append((truth, true_classes, crowd, found, found_classes))
        segments = [{"id": i, "category_id": c, "iscrowd": int(i in crowd)} for i, c in true_classes.items()]
        compare(truth, segments, found, found_classes, statistics)
    expected = _oracle(pairs)
    for category in CLASSES:
        assert statistics[category].tolist() == pytest.approx(expected[category])
    assert 0 < quality(list(statistics.values()))["PQ"] < 1


@pytest.fixture
def evaluator(tmp_path, request):
    rng = np.random.default_rng(0)
    annotations, truths = [], {}
    for image in (1, 2):
        labels, classes = _random_segments(rng)
        labels[labels > 0] += 300  # ids beyond one byte
        Image.fromarray(np.stack([labels % 256, labels // 256, 0 * labels], -1).astype(np.uint8)).save(
            tmp_path / f"{image}.png"
        )
        segments = [{"id": i + 300, "category_id": 10 * c, "iscrowd": 0} for i, c in classes.items()]
        annotations.append({"image_id": image, "file_name": f"{image}.png", "segments_info": segments})
        truths[image] = labels, segments
    path = tmp_path / "panoptic.json"
    categories = [{"id": 10, "isthing": 1}, {"id": 20, "isthing": 1}, {"id": 30, "isthing": 0}]
    path.write_text(json.dumps({"annotations": annotations, "categories": categories}))
    name = request.node.name
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(
        panoptic_json=str(path), panoptic_root=str(tmp_path), label_divisor=1000,
        thing_dataset_id_to_contiguous_id={10: 0, 20: 1}, stuff_dataset_id_to_contiguous_id={10: 0, 20: 1, 30: 2},
    )  # fmt: skip
    return PanopticQualityEvaluator(name), truths


@pytest.mark.parametrize("as_labels", [True, False])
def test_perfect_predictions_give_100(evaluator, as_labels):
    evaluator, truths = evaluator
    evaluator.reset()
    for image, (labels, segments) in truths.items():
        output = torch.from_numpy(labels.astype(np.int32))
        infos = [
            {"id": s["id"], "category_id": s["category_id"] // 10 - 1, "isthing": s["category_id"] < 30}
            for s in segments
        ]
        if as_labels:
            output = torch.full_like(output, -1)
            for number, segment in enumerate(segments):
                output[torch.from_numpy(labels == segment["id"])] = (segment["category_id"] // 10 - 1) * 1000 + number
            infos = None
        evaluator.process([{"image_id": image}], [{"panoptic_seg": (output, infos)}])
    results = evaluator.evaluate()["panoptic_seg"]
    assert set(results) == {f"{a}{b}" for a in ("PQ", "SQ", "RQ") for b in ("", "_th", "_st")}
    assert list(results.values()) == pytest.approx([100.0] * 9)


def test_nothing_found_is_zero(evaluator):
    evaluator, truths = evaluator
    evaluator.reset()
    for image, (labels, _) in truths.items():
        evaluator.process([{"image_id": image}], [{"panoptic_seg": (torch.zeros(labels.shape, dtype=torch.int32), [])}])
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] == 0


def test_the_report_shows_the_best_and_the_worst(evaluator, tmp_path):
    """Of ten images, of which k segments were left out: quality (n - k) / (n - k / 2)."""
    evaluator, truths = evaluator
    labels, segments = truths[1]
    own = PanopticQualityEvaluator(evaluator._metadata.name, str(tmp_path), report=True)
    for k in (3, 0, 1, 4, 2, 0, 3, 1, 4, 2):
        name = tmp_path / f"{k}.jpg"
        Image.fromarray(np.full((24, 24, 3), 90, np.uint8)).save(name)
        kept = [{"id": s["id"], "category_id": s["category_id"] // 10 - 1, "isthing": s["category_id"] < 30}
                for s in segments[k:]]  # fmt: skip
        ids = np.where(np.isin(labels, [s["id"] for s in kept]), labels, 0)
        own.process(
            [{"image_id": 1, "file_name": str(name)}],
            [{"panoptic_seg": (torch.from_numpy(ids.astype(np.int32)), kept)}],
        )
    figures = own.evaluate()["panoptic_seg"]
    page = (tmp_path / "report_panoptic.html").read_text()
    assert "10 images" in page and f"<td>all</td><td>{figures['PQ']:.1f}</td>" in page
    best, worst = (re.findall(r"(\d)\.jpg: quality ([\d.]+)", part) for part in page.split("Worst images"))
    assert [int(k) for k, _ in best] == [0, 0, 1, 1, 2, 2] and [int(k) for k, _ in worst] == [4, 4, 3, 3, 2, 2]
    assert page.count("<img") == 2 * 12
    n = len(segments)
    assert [float(q) for _, q in best] == pytest.approx(
        [100 * (n - k) / (n - k / 2) for k in (0, 0, 1, 1, 2, 2)], abs=0.05
    )
    for category, (iou, true, false, missed) in own._statistics.items():
        weight = true + (false + missed) / 2
        kind = "stuff" if category == 30 else "thing"
        mean = f"{100 * iou / weight:.1f}" if weight else ""
        assert f"<td>{category}</td><td>{kind}</td><td>{mean}</td>" in page
        assert f"<td>{true:.0f}</td><td>{false:.0f}</td><td>{missed:.0f}</td>" in page
