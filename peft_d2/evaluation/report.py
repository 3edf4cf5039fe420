"""A page about an evaluation: figures, classes, precision-recall curves, best and worst images, in one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval import COCOeval_faster
from PIL import Image

from peft_d2.data.images import DatasetError, path_inside, read_rgb
from peft_d2.data.pictures import overlay
from peft_d2.data.segmentation import segmentation_to_mask

REPORT_FILE = "report.html"
CURVE_FILE = "precision.png"
IMAGES = 6  # of the best, and of the worst
_LARGEST = 40_000_000  # px of an image that is shown: its masks are drawn at full size
_WIDTH = 360  # of a picture, px
_CURVES = 60  # classes whose curves are drawn
_IOUS = ((0.5, "#2a78d6"), (0.75, "#d97706"), (0.9, "#b0455a"))
_FRAME = (
    '<path d="M20 10V140H150" fill="none" stroke="#999"/><g font-size="9" fill="#888"><text x="2" y="16">1</text>'
    '<text x="2" y="142">0</text><text x="144" y="152">1</text></g>'
)


Drawn = tuple[Sequence[np.ndarray], Sequence[int]]  # masks (H, W) bool, and the class of each


class _Judged(NamedTuple):
    """One image: the ids of the predictions that are shown, and their panoptic quality."""

    image: Any
    quality: float
    found: list[int]


def write_report(
    folder: str | Path, title: str, image_root: str | Path, evaluations: Mapping[str, COCOeval_faster],
    figures: Mapping[str, Mapping[str, float]], outside: bool = False,
) -> Path:  # fmt: skip
    """Write ``folder/report.html``, and ``folder/precision.png``, which shows none of the images.

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
    judged = sorted(judge_images(evaluation, thresholds), key=lambda image: -image.quality)
    names = [name for name in next(iter(figures.values())) if not name.startswith("AP-")]
    rows = [[escape(key), *(_number(row.get(name)) for name in names)] for key, row in figures.items()]
    counts = len(evaluation.params.imgIds), len(evaluation.cocoGt.anns), len(evaluation.cocoDt.anns)
    path = _write(
        Path(folder) / REPORT_FILE,
        title=escape(title),
        counts="{} images, {} objects, {} predictions".format(*counts),
        figures=_table(["", *map(escape, names)], rows),
        classes_title=f"Classes ({task})",
        classes=_classes(evaluation, thresholds),
        curves=_curves(evaluation),
        shown=": those above the score at which their class has its best F1",
        best="".join(_pair(image, evaluation, image_root, outside) for image in judged[:IMAGES]),
        worst="".join(_pair(image, evaluation, image_root, outside) for image in judged[::-1][:IMAGES]),
    )
    draw_precision(evaluation, f"{title} ({task})", path.with_name(CURVE_FILE))
    return path


def write_panoptic_report(
    folder: str | Path, title: str, images: int, figures: Mapping[str, float], classes: Sequence[Sequence[Any]],
    best: Sequence[str], worst: Sequence[str],
) -> Path:  # fmt: skip
    """Write ``folder/report_panoptic.html``.

    Args:
        folder: where to.
        title: the data set's name.
        images: how many were evaluated.
        figures: PQ, SQ, RQ and those with ``_th``, ``_st``, in per cent.
        classes: of each its name, thing or stuff, PQ, SQ, RQ in per cent, and true positives, false ones and missed.
        best, worst: what :func:`side_by_side` makes of the images to show.
    """
    groups = (("all", ""), ("things", "_th"), ("stuff", "_st"))
    rows = [[name, *(_number(figures[key + suffix]) for key in ("PQ", "SQ", "RQ"))] for name, suffix in groups]
    table = [[escape(name), kind, *map(_number, row[:3]), *(f"{n:.0f}" for n in row[3:]), _bar(row[0])]
             for name, kind, *row in classes]  # fmt: skip
    return _write(
        Path(folder) / "report_panoptic.html",
        title=escape(title),
        counts=f"{images} images",
        figures=_table(["", "PQ", "SQ", "RQ"], rows),
        classes_title="Classes",
        classes=_table(["class", "", "PQ", "SQ", "RQ", "found", "false", "missed", ""], table),
        curves="",
        shown="",
        best="".join(best),
        worst="".join(worst),
    )


def _write(path: Path, **parts: str) -> Path:
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def best_thresholds(evaluation: COCOeval_faster) -> dict[Any, float]:
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


def judge_images(evaluation: COCOeval_faster, thresholds: Mapping[Any, float]) -> list[_Judged]:
    """Panoptic quality of each image's predictions above the thresholds; 1 where there is nothing and nothing found."""
    judged = []
    for image in evaluation.params.imgIds:
        truths = evaluation.cocoGt.imgToAnns[image]
        found = [r for r in evaluation.cocoDt.imgToAnns[image] if r["score"] >= thresholds.get(r["category_id"], 0)]
        total = 0.0
        for category in {row["category_id"] for row in found}:
            count = sum(row["category_id"] == category for row in found)
            free = [not row.get("iscrowd", 0) for row in truths if row["category_id"] == category]
            if free:  # IoUs are of predictions in the order of their scores
                total += _matched_iou(np.asarray(evaluation.ious[image, category])[:count], free)
        weight = 0.5 * (len(found) + sum(not row.get("iscrowd", 0) for row in truths))
        judged.append(_Judged(image, total / weight if weight else 1.0, [row["id"] for row in found]))
    return judged


def _matched_iou(ious: np.ndarray, free: list[bool]) -> float:
    """Match predictions (rows) in turn with the best object (column) that is still ``free``, and add up their IoUs."""
    total = 0.0
    for row in ious:
        best = int(np.where(free, row, -1).argmax())
        if free[best] and row[best] >= 0.5:
            free[best] = False
            total += float(row[best])
    return total


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) for row in rows]
    return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _classes(evaluation: COCOeval_faster, thresholds: Mapping[Any, float]) -> str:
    """HTML of the table of classes."""
    precision = evaluation.eval["precision"][..., 0, -1]  # (IoU, recall, class)
    objects = [row["category_id"] for row in evaluation.cocoGt.anns.values()]
    rows = []
    for k, category in enumerate(evaluation.params.catIds):
        part = np.where(precision[:, :, k] > -1, precision[:, :, k], np.nan)
        aps = [100 * float(np.nanmean(p)) if (p > -1).any() else np.nan for p in (part, part[0], part[5])]
        score = thresholds[category]
        name = escape(str(evaluation.cocoGt.cats[category]["name"]))
        shown = "" if np.isinf(score) else f"{score:.2f}"
        rows.append([name, str(objects.count(category)), *map(_number, aps), shown, _bar(aps[0])])
    return _table(["class", "objects", "AP", "AP50", "AP75", "score of best F1", ""], rows)


def _bar(value: float) -> str:
    """HTML of a cell with a bar as long as ``value``, in per cent."""
    return f'<td class="bar"><i style="width:{0 if np.isnan(value) else value:.1f}%"></i></td>'


def _number(value: float | None) -> str:
    """A figure as text, "" where there is none: LVIS gives -100 where there are no objects of a size."""
    return "" if value is None or np.isnan(value) or value < 0 else f"{value:.1f}"


def _curves(evaluation: COCOeval_faster) -> str:
    """HTML of each class's precision over recall, at three IoUs."""
    recall, drawn = np.asarray(evaluation.params.recThrs), []
    for k, category in list(enumerate(evaluation.params.catIds))[:_CURVES]:
        lines = ""
        for iou, colour in _IOUS:
            row = _precision(evaluation, iou)[:, k]
            if (row > -1).any():
                points = " ".join(f"{20 + 130 * r:.1f},{140 - 130 * p:.1f}" for r, p in zip(recall, row, strict=True))
                lines += f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        if lines:
            name = escape(str(evaluation.cocoGt.cats[category]["name"]))
            svg = f'<svg width="160" height="155" role="img">{_FRAME}{lines}</svg>'
            drawn.append(f"<figure>{svg}<figcaption>{name}</figcaption></figure>")
    legend = ", ".join(f'<b style="color:{colour}">IoU {iou}</b>' for iou, colour in _IOUS)
    rest = len(evaluation.params.catIds) - _CURVES
    more = f" Of {rest} more classes the table above has the figures." if rest > 0 else ""
    return f'<h2>Precision over recall</h2><p>{legend}.{more}</p><div class="curves">{"".join(drawn)}</div>'


def draw_precision(evaluation: COCOeval_faster, title: str, path: Path) -> None:
    """Draw precision over recall, the mean of the classes, at three IoUs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3), layout="constrained")
    axes = figure.subplots()
    present = (evaluation.eval["precision"][..., 0, -1] > -1).any(axis=(0, 1))
    for iou, colour in _IOUS if present.any() else ():
        mean = _precision(evaluation, iou)[:, present].mean(axis=1)
        axes.plot(evaluation.params.recThrs, mean, color=colour, label=f"IoU {iou}")
    axes.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend()
    figure.savefig(path, dpi=120)


def _precision(evaluation: COCOeval_faster, iou: float) -> np.ndarray:
    """Precision (recall, class) at an IoU, -1 where there is none."""
    return evaluation.eval["precision"][
        int(np.argmin(np.abs(np.asarray(evaluation.params.iouThrs) - iou))), :, :, 0, -1
    ]


def _pair(judged: _Judged, evaluation: COCOeval_faster, image_root: str | Path, outside: bool) -> str:
    """Truth and predictions side by side, "" for an image that cannot be shown."""
    record = evaluation.cocoGt.imgs[judged.image]
    if record["height"] * record["width"] > _LARGEST:
        return ""
    try:
        pixels = read_rgb(path_inside(image_root, record["file_name"], outside))
    except (OSError, DatasetError, Image.DecompressionBombError):
        return ""
    both = []
    for rows in (evaluation.cocoGt.imgToAnns[judged.image], [evaluation.cocoDt.anns[i] for i in judged.found]):
        masks = [_mask(row, record["height"], record["width"]) for row in rows]
        both.append((masks, [int(row["category_id"]) for row in rows]))
    return side_by_side(pixels, both[0], both[1], str(record["file_name"]), judged.quality)


def side_by_side(pixels: np.ndarray, truth: Drawn, found: Drawn, name: str, quality: float) -> str:
    """HTML of an image (H, W, 3), RGB, with what is true and with what was found, and its quality of 0 to 1."""
    pictures = ""
    for masks, classes in (truth, found):
        drawn = Image.fromarray(overlay(pixels, masks, classes))
        drawn.thumbnail((_WIDTH, 2 * _WIDTH))
        stream = io.BytesIO()
        drawn.save(stream, format="JPEG", quality=85)
        pictures += f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}">'
    caption = f"{escape(name)}: quality {100 * quality:.1f}"
    return f"<figure><div>{pictures}</div><figcaption>{caption}</figcaption></figure>"


def _mask(row: Mapping[str, Any], height: int, width: int) -> np.ndarray:
    """(H, W) mask of an annotation or a prediction; its box, filled, where it has none."""
    if row.get("segmentation"):
        return segmentation_to_mask(row["segmentation"], height, width)
    mask = np.zeros((height, width), dtype=bool)
    x, y, w, h = row["bbox"]
    mask[max(0, int(y)) : int(y + h) + 1, max(0, int(x)) : int(x + w) + 1] = True
    return mask
