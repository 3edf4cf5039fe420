"""Data that is unusual and legal: lines of pixels, objects of one pixel, none, or five hundred."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import toy
from PIL import Image

from peft_d2.engine.trainer import Trainer

from .world import Child, Result, World

LINE = 5000
KINDS = ("1 x 5000", "5000 x 1", "1-px objects", "no objects", "500 objects")
MAPPERS = {
    "resized": ["INPUT.DATASET_MAPPER_NAME", "mask_former_instance"],
    "jitter": ["INPUT.DATASET_MAPPER_NAME", "coco_instance_lsj", "INPUT.IMAGE_SIZE", 64],
    "cropped": ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", (48, 48)],
}


def odd_images(world: World, quick: bool = False) -> list[Result]:
    """Each kind of image beside ordinary ones, polygons and run lengths, with each recipe: trains and evaluates."""
    result = Result("odd images and objects")
    for number, kind in enumerate(KINDS):
        recipes = list(MAPPERS.items())
        for recipe, opts in recipes[number % 3 :][:1] if quick else recipes:
            data = odd_set(world, world.root / f"{kind}_{recipe}".replace(" ", "_"), kind)
            child = Child(lambda tell, d=data, o=opts: _train(world, d, o), data.json.with_suffix(".txt"))
            status = child.wait()
            child.close()
            tail = child.console.read_text(errors="replace")[-300:]
            result.add("" if status == 0 else f"{kind}, {recipe}: exit code {status}: {tail}", kind)
    return [result]


def _train(world: World, data: toy.ToySet, opts: list[Any]) -> None:
    cfg = world.cfg(data.json.parent / "run", *opts, "SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 4, data=data)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    figures = trainer.train()
    if not figures or not math.isfinite(figures["segm"]["AP"]):
        raise RuntimeError(f"no figures: {figures}")


def odd_set(world: World, folder: Path, kind: str) -> toy.ToySet:
    """The toy set with two odd images added to the six ordinary ones."""
    data = json.loads(world.data.json.read_text())
    width, height = {"1 x 5000": (1, LINE), "5000 x 1": (LINE, 1)}.get(kind, (64, 64))
    boxes = {
        "1 x 5000": [(0, 100, 1, 900), (0, 4000, 1, 5)],
        "5000 x 1": [(100, 0, 900, 1), (4000, 0, 5, 1)],
        "1-px objects": [(3, 7, 1, 1), (63, 63, 1, 1), (0, 0, 1, 1)],
        "no objects": [],
        "500 objects": [(2 * (i % 30), 3 * (i // 30), 2, 2) for i in range(500)],
    }[kind]
    images = folder / "images"
    images.mkdir(parents=True)
    for record in data["images"]:
        shutil.copy(world.data.images / record["file_name"], images)
    rng = np.random.default_rng(0)
    for number in (1, 2):
        record = {"id": 1000 + number, "file_name": f"odd{number}.png", "width": width, "height": height}
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(images / record["file_name"])
        data["images"].append(record)
        for x, y, w, h in boxes:
            data["annotations"].append({
                "id": len(data["annotations"]) + 10_000, "image_id": record["id"], "category_id": 1, "iscrowd": 0,
                "bbox": [x, y, w, h], "area": w * h,
                "segmentation": _polygon(x, y, w, h) if number == 1 else _run_lengths(x, y, w, h, width, height),
            })  # fmt: skip
    path = folder / "annotations.json"
    path.write_text(json.dumps(data))
    return toy.ToySet(path, images)


def _polygon(x: int, y: int, w: int, h: int) -> list[list[float]]:
    return [[float(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]]


def _run_lengths(x: int, y: int, w: int, h: int, width: int, height: int) -> dict[str, Any]:
    mask = np.zeros((height, width), dtype=bool)
    mask[y : y + h, x : x + w] = True
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False)).tolist()
    return {"size": [height, width], "counts": np.diff([0, *edges, flat.size]).tolist()}
