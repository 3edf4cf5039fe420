#!/usr/bin/env python
"""Measure COCO evaluation: ours (faster-coco-eval) against pycocotools on the same random truths and predictions.

    tools/benchmark_evaluation.py --images 500 --detections 100

Prints CPU seconds, their ratio, and whether the twelve figures are identical.
"""

import argparse
import contextlib
import copy
import io
import time
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from peft_d2.evaluation.coco import evaluate_coco

SIZE, OBJECTS, CLASSES = 160, 10, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--detections", type=int, default=100, help="of each image")
    args = parser.parse_args()
    data, results = world(args.images, args.detections)
    for task in ("bbox", "segm"):
        seconds, figures = {}, {}
        for name, evaluate in (("ours", evaluate_coco), ("pycocotools", pycocotools)):
            copies = copy.deepcopy(data), copy.deepcopy(results)
            start = time.process_time()
            figures[name] = evaluate(*copies, task).stats[:12]
            seconds[name] = time.process_time() - start
        same = np.allclose(figures["ours"], figures["pycocotools"], rtol=0, atol=1e-12)
        ratio = seconds["pycocotools"] / seconds["ours"]
        print(
            f"{task}: {seconds['ours']:.1f} s, pycocotools {seconds['pycocotools']:.1f} s: {ratio:.1f}x, same: {same}"
        )


def world(images: int, detections: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ellipses in COCO format, and predictions that are near them."""
    rng = np.random.default_rng(0)
    data: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    data["categories"] = [{"id": k, "name": f"class {k}"} for k in range(1, CLASSES + 1)]
    results = []
    for image in range(1, images + 1):
        data["images"].append({"id": image, "height": SIZE, "width": SIZE, "file_name": f"{image}.png"})
        truths = [(rng.uniform(20, SIZE - 20, 2), np.exp(rng.uniform(1.5, 4, 2)), k % CLASSES) for k in range(OBJECTS)]
        for number, (centre, radii, category) in enumerate(truths):
            truth = ellipse(centre, radii, category + 1, image)
            identity = (image - 1) * OBJECTS + number + 1
            area = float(coco_mask.area(truth["segmentation"]))
            data["annotations"].append({**truth, "id": identity, "area": area, "iscrowd": 0})
        for number in range(detections):
            centre, radii, category = truths[number % OBJECTS]
            moved = centre + 0.2 * radii * rng.normal(size=2)
            found = ellipse(moved, radii * np.exp(0.1 * rng.normal(size=2)), category + 1, image)
            results.append({**found, "score": float(rng.random())})
    return data, results


def ellipse(centre: np.ndarray, radii: np.ndarray, category: int, image: int) -> dict[str, Any]:
    rows, columns = np.mgrid[:SIZE, :SIZE]
    mask = ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2 < 1
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    box = coco_mask.toBbox(rle).tolist()
    rle["counts"] = rle["counts"].decode()
    return {"image_id": image, "category_id": category, "bbox": box, "segmentation": rle}


def pycocotools(data: dict[str, Any], results: list[dict[str, Any]], task: str) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = data
        truth.createIndex()
        drop = "bbox" if task == "segm" else "segmentation"
        evaluation = COCOeval(truth, truth.loadRes([{k: v for k, v in r.items() if k != drop} for r in results]), task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


if __name__ == "__main__":
    main()
