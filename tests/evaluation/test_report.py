"""The page about an evaluation: complete, self-contained, and right about which images are good."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="needs Detectron2")

from PIL import Image  # noqa: E402
from pycocotools import mask as coco_mask  # noqa: E402

from peft_d2.evaluation.coco import evaluate_coco  # noqa: E402
from peft_d2.evaluation.report import best_thresholds, judge_images, write_report  # noqa: E402

from .worlds import random_world  # noqa: E402


class Balanced(HTMLParser):
    """Collects tags and sees that they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def _world(images=9):
    data, results = random_world(images, 20)
    data["categories"][0]["name"] = "<b>bold & brave</b>"
    return data, results


def _report(tmp_path: Path, data, results, tasks=("bbox", "segm")) -> str:
    for record in data["images"]:
        Image.new("RGB", (160, 160), (40, 60, 80)).save(tmp_path / record["file_name"])
    done = {task: evaluate_coco(copy.deepcopy(data), results, task) for task in tasks}
    figures = {task: {"AP": 100 * done[task].stats[0], "AP-star": 3.0} for task in tasks}
    return write_report(tmp_path, "my <set>", tmp_path, done, figures).read_text()


def test_the_page_is_whole_and_self_contained(tmp_path):
    data, results = _world()
    text = _report(tmp_path, data, results)
    page = Balanced(text)
    tags = [tag for tag, _ in page.seen]
    assert tags.count("img") == 2 * 2 * 6 and tags.count("figure") == 12 + 4
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") for tag, attrs in page.seen if tag == "img")
    assert not re.search(r"https?:|<script|<link", text)
    assert "my &lt;set&gt;" in text and "&lt;b&gt;bold &amp; brave&lt;/b&gt;" in text and "<b>bold" not in text
    ap = 100 * evaluate_coco(copy.deepcopy(data), results, "segm").stats[0]
    assert f"<td>{ap:.1f}</td>" in text and "AP-star" not in text


def test_precision_is_drawn_beside_the_page(tmp_path):
    """At a recall of 0.3 the line of an IoU is as high as the mean of the classes' precision there."""
    data, results = _world()
    _report(tmp_path, data, results)
    image = np.asarray(Image.open(tmp_path / "precision.png").convert("RGB")).astype(int)
    dark = image.max(-1) < 60  # the frame
    top, *_, bottom = np.flatnonzero(dark.mean(1) > 0.6)
    left, *_, right = np.flatnonzero(dark.mean(0) > 0.6)
    precision = evaluate_coco(copy.deepcopy(data), results, "segm").eval["precision"][..., 0, -1]
    present = (precision > -1).any(axis=(0, 1))
    column = image[top:bottom, left + round(0.3 * (right - left))]
    for index, colour in ((0, (42, 120, 214)), (8, (176, 69, 90))):
        line = np.flatnonzero(np.abs(column - colour).max(-1) < 40).mean()
        height = 1.02 * (bottom - top - line) / (bottom - top)
        assert height == pytest.approx(precision[index, 30, present].mean(), abs=0.03)


def test_boxes_alone_and_missing_pictures(tmp_path):
    data, results = _world()
    results = [{k: v for k, v in r.items() if k != "segmentation"} for r in results]
    page = Balanced(_report(tmp_path, data, results, tasks=("bbox",)))
    assert [tag for tag, _ in page.seen].count("img") == 24
    for record in data["images"]:
        record["file_name"] = f"gone/{record['file_name']}"
    done = {"bbox": evaluate_coco(data, results, "bbox")}
    assert "<img" not in write_report(tmp_path, "set", tmp_path, done, {"bbox": {"AP": float("nan")}}).read_text()


def test_images_are_judged_by_panoptic_quality():
    """Against a plain computation from decoded masks."""
    data, results = _world(4)
    evaluation = evaluate_coco(copy.deepcopy(data), results, "segm")
    thresholds = best_thresholds(evaluation)
    assert sum(np.isfinite(list(thresholds.values()))) == 4  # the fifth class is never seen
    for judged in judge_images(evaluation, thresholds):
        found = [r for r in results if r["image_id"] == judged.image and r["score"] >= thresholds[r["category_id"]]]
        truths = [a for a in data["annotations"] if a["image_id"] == judged.image and not a["iscrowd"]]
        used, total = set(), 0.0
        for result in sorted(found, key=lambda r: -r["score"]):
            mine = coco_mask.decode(result["segmentation"]).astype(bool)
            overlaps = {
                number: (mine & theirs).sum() / (mine | theirs).sum()
                for number, truth in enumerate(truths)
                if truth["category_id"] == result["category_id"] and number not in used
                for theirs in [coco_mask.decode(truth["segmentation"]).astype(bool)]
            }
            best = max(overlaps, key=overlaps.get, default=None)
            if best is not None and overlaps[best] >= 0.5:
                used.add(best)
                total += overlaps[best]
        assert len(judged.found) == len(found)
        assert judged.quality == pytest.approx(total / (0.5 * (len(found) + len(truths))))


def test_perfect_predictions_are_perfect_images():
    data, _ = random_world(3, 0)
    data["annotations"] = [a for a in data["annotations"] if not a["iscrowd"]]
    results = [{k: a[k] for k in ("image_id", "category_id", "bbox", "segmentation")} for a in data["annotations"]]
    evaluation = evaluate_coco(data, [{**r, "score": 0.9} for r in results], "segm")
    assert {j.quality for j in judge_images(evaluation, best_thresholds(evaluation))} == {1.0}
