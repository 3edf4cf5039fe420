"""Random truths and predictions in COCO format, and what pycocotools says of them."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def ellipse(centre: np.ndarray, radii: np.ndarray, size: int) -> np.ndarray:
    ys, xs = np.mgrid[:size, :size]
    return ((xs - centre[0]) / radii[0]) ** 2 + ((ys - centre[1]) / radii[1]) ** 2 < 1


def encoded(mask: np.ndarray) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def random_world(
    images: int, detections: int, *, size: int = 160, objects: int = 10, classes: int = 4, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO json and results: near hits, wrong classes, equal scores, crowds; one class is never seen."""
    rng = np.random.default_rng(seed)
    data: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    results = []
    data["categories"] = [{"id": 2 * k, "name": f"class {k}"} for k in range(1, classes + 2)]
    for image in range(1, images + 1):
        data["images"].append({"id": image, "height": size, "width": size, "file_name": f"{image}.png"})
        truths = []
        for _ in range(objects):
            centre, radii = rng.uniform(0, size, 2), np.exp(rng.uniform(1, 4.3, 2))
            mask = ellipse(centre, radii, size)
            if not mask.any():
                continue
            truths.append((centre, radii, 2 * int(rng.integers(1, classes + 1))))
            rle = encoded(mask)
            data["annotations"].append({
                "id": len(data["annotations"]) + 1, "image_id": image, "category_id": truths[-1][2],
                "bbox": coco_mask.toBbox(rle).tolist(), "area": int(mask.sum()), "segmentation": rle,
                "iscrowd": int(rng.random() < 0.1),
            })  # fmt: skip
        for _ in range(detections if truths else 0):
            centre, radii, category = truths[rng.integers(len(truths))]
            shake = rng.uniform(0, 0.4)
            moved, scaled = radii * shake * rng.normal(size=2), np.exp(0.5 * shake * rng.normal(size=2))
            mask = ellipse(centre + moved, radii * scaled, size)
            if rng.random() < 0.2:
                category = 2 * int(rng.integers(1, classes + 1))
            rle = encoded(mask)
            results.append({
                "image_id": image, "category_id": category, "score": round(float(rng.random()), 2),
                "bbox": coco_mask.toBbox(rle).tolist(), "segmentation": rle,
            })  # fmt: skip
    return data, results


def pycocotools(data: dict[str, Any], results: list[dict[str, Any]], task: str) -> COCOeval:
    """The finished evaluation of results, as everyone does it."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(data)
        truth.createIndex()
        drop = "bbox" if task == "segm" else "segmentation"
        found = truth.loadRes([{k: copy.deepcopy(v) for k, v in r.items() if k != drop} for r in results])
        evaluation = COCOeval(truth, found, task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation
