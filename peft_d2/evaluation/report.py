"""A page about an evaluation: figures, classes, precision-recall curves, best and worst images, in one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from peft_d2.data.images import DatasetError, path_inside, read_rgb
from peft_d2.data.pictures import overlay
from peft_d2.evaluation.overlaps import Evaluation, run_lengths

REPORT_FILE = "report.html"
_IMAGES = 6  # of the best, and of the worst
_LARGEST = 40_000_000  # px of an image that is shown: its masks are drawn at full size
_WIDTH = 360  # of a picture, px
_CURVES = 60  # classes whose curves are drawn
_IOUS = ((0.5, "#2a78d6"), (0.75, "#d97706"), (0.9, "#b0455a"))
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em;
  color: #1c2024; background: #fff }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
td.bar { min-width: 9em; text-align: left } td.bar i { display: block; height: .7em; background: #2a78d6 }
.curves { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0 }
.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(22em, 1fr)); gap: 1em }
.pairs div { display: flex; gap: 4px } .pairs img { width: 50%; height: auto; object-fit: contain }
figcaption { font-size: .85em; color: #667 }
@media (prefers-color-scheme: dark) { body { color: #e4e6e8; background: #16181a }
  th, td { border-color: #333 } figcaption { color: #9aa }
}
"""


@dataclass(frozen=True)
class _Judged:
    """One image: the ids of the predictions that are shown, and their panoptic quality."""

    image: Any
    quality: float
    found: list[int]


def write_report(
    folder: str | Path,
    title: str,
    image_root: str | Path,
    evaluations: Mapping[str, Evaluation],
    figures: Mapping[str, Mapping[str, float]],
    outside: bool = False,
) -> Path:
    """Write ``folder/report.html``.

    Args:
        folder: where to.
        title: the data set's name.
        image_root: folder of its images; pictures of those that cannot be read are left out.
        evaluations: "bbox", "segm" -> the finished evaluation. Classes and images are judged by the masks where there
            are some.
        figures: the same keys -> what Detectron2 reports.
        outside: also show images that lie outside ``image_root``.
    """
    task = "segm" if "segm" in evaluations else next(iter(evaluations))
    evaluation = evaluations[task]
    thresholds = best_thresholds(evaluation)
    judged = judge_images(evaluation, thresholds)
    judged.sort(key=lambda image: -image.quality)
    best, worst = judged[:_IMAGES], judged[::-1][:_IMAGES]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{len(evaluation.params.imgIds)} images, {len(evaluation.cocoGt.anns)} objects, "
        f"{len(evaluation.cocoDt.anns)} predictions.</p>",
        "<h2>Figures</h2>",
        _figures_table(figures),
        f"<h2>Classes ({task})</h2>",
        _class_table(evaluation, thresholds),
        "<h2>Precision over recall</h2>",
        _curves(evaluation),
        "<h2>Best images</h2>",
        "<p>Truth on the left, predictions on the right: those above the score at which their class has its best F1. "
        "Images are ranked by panoptic quality, IoU 0.5 and more.</p>",
        _pairs(best, evaluation, image_root, outside),
        "<h2>Worst images</h2>",
        _pairs(worst, evaluation, image_root, outside),
    ]
    path = Path(folder) / REPORT_FILE
    body, viewport = "\n".join(parts), '<meta name="viewport" content="width=device-width">'
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"{viewport}<style>{_STYLE}</style></head><body>{body}</body></html>\n",
        encoding="utf-8",
    )
    return path


def best_thresholds(evaluation: Evaluation) -> dict[Any, float]:
    """Category id -> the score from which predictions give the best F1 at IoU 0.5; infinite where none ever hits."""
    precision = evaluation.eval["precision"][0, :, :, 0, -1]  # (recall, class)
    scores = evaluation.eval["scores"][0, :, :, 0, -1]
    recall = np.asarray(evaluation.params.recThrs)[:, None]
    hits = precision > 0
    f1 = np.where(hits, 2 * precision * recall / np.maximum(precision + recall, 1e-9), -1.0)
    rows = f1.argmax(axis=0)
    return {
        category: float(scores[row, k]) if hits[row, k] else float("inf")
        for k, (category, row) in enumerate(zip(evaluation.params.catIds, rows, strict=True))
    }


def judge_images(evaluation: Evaluation, thresholds: Mapping[Any, float]) -> list[_Judged]:
    """Panoptic quality of each image's predictions above the thresholds; 1 where there is nothing and nothing found."""
    judged = []
    for image in evaluation.params.imgIds:
        shown, quality, weight = [], 0.0, 0.0
        truths = [row for row in evaluation.cocoGt.imgToAnns[image] if not row.get("iscrowd", 0)]
        found = [r for r in evaluation.cocoDt.imgToAnns[image] if r["score"] >= thresholds.get(r["category_id"], 0)]
        for category in {row["category_id"] for row in [*truths, *found]}:
            mine = sorted((r for r in found if r["category_id"] == category), key=lambda r: -r["score"])
            matched = _matched_ious(evaluation.ious.get((image, category), []), image, category, len(mine), evaluation)
            shown += [row["id"] for row in mine]
            quality += sum(matched)
            count = sum(row["category_id"] == category for row in truths)
            weight += 0.5 * (count + len(mine))
        judged.append(_Judged(image, quality / weight if weight else 1.0, shown))
    return judged


def _matched_ious(ious: Any, image: Any, category: Any, count: int, evaluation: Evaluation) -> list[float]:
    """IoUs of the first ``count`` predictions with the objects that they hit."""
    if not len(ious) or not count:
        return []
    rows = [row for row in evaluation.cocoGt.imgToAnns[image] if row["category_id"] == category]
    free = [not row.get("iscrowd", 0) for row in rows]
    matched = []
    for row in np.asarray(ious)[:count]:
        best = int(np.where(free, row, -1).argmax())
        if free[best] and row[best] >= 0.5:
            free[best] = False
            matched.append(float(row[best]))
    return matched


def _figures_table(figures: Mapping[str, Mapping[str, float]]) -> str:
    names = [name for name in next(iter(figures.values())) if not name.startswith("AP-")]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = "".join(
        f"<tr><td>{escape(task)}</td>" + "".join(f"<td>{_number(row.get(name))}</td>" for name in names) + "</tr>"
        for task, row in figures.items()
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def _class_table(evaluation: Evaluation, thresholds: Mapping[Any, float]) -> str:
    precision = evaluation.eval["precision"][..., 0, -1]  # (IoU, recall, class)
    lines = []
    for k, category in enumerate(evaluation.params.catIds):
        part = precision[:, :, k]
        ap, ap50, ap75 = (_mean(p) for p in (part, part[0], part[5]))
        count = sum(row["category_id"] == category for row in evaluation.cocoGt.anns.values())
        score = thresholds[category]
        lines.append(
            f"<tr><td>{escape(str(evaluation.cocoGt.cats[category]['name']))}</td><td>{count}</td>"
            f"<td>{_number(ap)}</td><td>{_number(ap50)}</td><td>{_number(ap75)}</td>"
            f"<td>{'' if np.isinf(score) else f'{score:.2f}'}</td>"
            f'<td class="bar"><i style="width:{0 if np.isnan(ap) else ap:.1f}%"></i></td></tr>'
        )
    head = (
        "<tr><th>class</th><th>objects</th><th>AP</th><th>AP50</th><th>AP75</th><th>score of best F1</th><th></th></tr>"
    )
    return f"<table>{head}{''.join(lines)}</table>"


def _mean(precision: np.ndarray) -> float:
    valid = precision[precision > -1]
    return 100 * float(valid.mean()) if valid.size else float("nan")


def _number(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.1f}"


def _curves(evaluation: Evaluation) -> str:
    precision, recall = evaluation.eval["precision"][..., 0, -1], np.asarray(evaluation.params.recThrs)
    drawn = []
    for k, category in list(enumerate(evaluation.params.catIds))[:_CURVES]:
        lines = []
        for iou, colour in _IOUS:
            row = precision[int(np.argmin(np.abs(np.asarray(evaluation.params.iouThrs) - iou))), :, k]
            if (row > -1).any():
                points = " ".join(f"{20 + 130 * r:.1f},{140 - 130 * p:.1f}" for r, p in zip(recall, row, strict=True))
                lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if lines:
            name = escape(str(evaluation.cocoGt.cats[category]["name"]))
            frame = '<path d="M20 10V140H150" fill="none" stroke="#999"/>'
            ticks = '<g font-size="9" fill="#888"><text x="2" y="16">1</text><text x="2" y="142">0</text>'
            ticks += '<text x="144" y="152">1</text></g>'
            svg = f'<svg width="160" height="155" role="img">{frame}{ticks}{"".join(lines)}</svg>'
            drawn.append(f"<figure>{svg}<figcaption>{name}</figcaption></figure>")
    legend = ", ".join(f'<b style="color:{colour}">IoU {iou}</b>' for iou, colour in _IOUS)
    rest = len(evaluation.params.catIds) - _CURVES
    more = f" Of {rest} more classes the table above has the figures." if rest > 0 else ""
    return f'<p>{legend}.{more}</p><div class="curves">{"".join(drawn)}</div>'


def _pairs(judged: Sequence[_Judged], evaluation: Evaluation, image_root: str | Path, outside: bool) -> str:
    figures = []
    for image in judged:
        record = evaluation.cocoGt.imgs[image.image]
        if record["height"] * record["width"] > _LARGEST:
            continue
        try:
            pixels = read_rgb(path_inside(image_root, record["file_name"], outside))
        except (OSError, DatasetError, Image.DecompressionBombError):
            continue
        truths = evaluation.cocoGt.imgToAnns[image.image]
        found = [evaluation.cocoDt.anns[i] for i in image.found]
        pictures = "".join(_picture(pixels, rows, record) for rows in (truths, found))
        name = f"{escape(str(record['file_name']))}: quality {100 * image.quality:.1f}"
        figures.append(f"<figure><div>{pictures}</div><figcaption>{name}</figcaption></figure>")
    return f'<div class="pairs">{"".join(figures)}</div>'


def _picture(pixels: np.ndarray, rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> str:
    masks = [_mask(row, record["height"], record["width"]) for row in rows]
    drawn = Image.fromarray(overlay(pixels, masks, [int(row["category_id"]) for row in rows]))
    drawn.thumbnail((_WIDTH, 2 * _WIDTH))
    stream = io.BytesIO()
    drawn.save(stream, format="JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}">'


def _mask(row: Mapping[str, Any], height: int, width: int) -> np.ndarray:
    if row.get("segmentation"):
        return coco_mask.decode(run_lengths(row["segmentation"], height, width)).astype(bool)
    mask = np.zeros((height, width), dtype=bool)
    x, y, w, h = row["bbox"]
    mask[max(0, int(y)) : int(y + h) + 1, max(0, int(x)) : int(x + w) + 1] = True
    return mask
