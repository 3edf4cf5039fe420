"""Panoptic and semantic segmentation from end to end, with every model that offers them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from peft_d2.data.loader import build_test_loader
from peft_d2.data.segmentation import segmentation_to_mask

from .conftest import DINO, TINY
from .test_training import train

BACKGROUND = 4  # the category beside the toy set's three


@pytest.fixture(scope="session")
def painted(toy_set: toy.ToySet) -> str:
    """The toy set as a panoptic one whose background is stuff; its name in Detectron2's catalogues."""
    data = json.loads(toy_set.json.read_text())
    root = toy_set.json.parent / "painted"
    root.mkdir()
    records, truth = [], []
    for image in data["images"]:
        ids = np.full((image["height"], image["width"]), 1000)
        classes = np.full(ids.shape, BACKGROUND - 1, dtype=np.uint8)
        segments = [{"id": 1000, "category_id": BACKGROUND, "iscrowd": 0}]
        for annotation in (a for a in data["annotations"] if a["image_id"] == image["id"]):
            mask = segmentation_to_mask(annotation["segmentation"], *ids.shape)
            ids[mask], classes[mask] = annotation["id"], annotation["category_id"] - 1
            segments.append({key: annotation[key] for key in ("id", "category_id", "iscrowd")})
        name = f"{image['id']}.png"
        Image.fromarray(np.stack([ids % 256, ids // 256, 0 * ids], axis=-1).astype(np.uint8)).save(root / name)
        Image.fromarray(classes).save(root / f"classes_{name}")
        truth.append({"image_id": image["id"], "file_name": name, "segments_info": segments})
        records.append(
            {
                "file_name": str(toy_set.images / image["file_name"]),
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
                "pan_seg_file_name": str(root / name),
                "sem_seg_file_name": str(root / f"classes_{name}"),
                "segments_info": [{**s, "category_id": s["category_id"] - 1} for s in segments],
            }
        )
    names = [*(c["name"] for c in data["categories"]), "background"]
    categories = [{"id": i, "name": name, "isthing": int(i != BACKGROUND)} for i, name in enumerate(names, 1)]
    (root / "panoptic.json").write_text(json.dumps({**data, "annotations": truth, "categories": categories}))
    DatasetCatalog.register("painted", lambda: records)
    MetadataCatalog.get("painted").set(
        evaluator_type="coco_panoptic_seg",
        json_file=str(toy_set.json),
        panoptic_json=str(root / "panoptic.json"),
        panoptic_root=str(root),
        thing_classes=names[:-1],
        stuff_classes=names,
        thing_dataset_id_to_contiguous_id={i: i - 1 for i in range(1, BACKGROUND)},
        stuff_dataset_id_to_contiguous_id={i: i - 1 for i in range(1, BACKGROUND + 1)},
        ignore_label=255,
        label_divisor=1000,
    )
    return "painted"


def by_hand(cfg: Any, model: torch.nn.Module) -> tuple[float, float]:
    """The mean IoU of the classes' pixels, and the background's panoptic quality, in per cent."""
    records = {record["image_id"]: record for record in DatasetCatalog.get(cfg.DATASETS.TEST[0])}
    pixels, matched, missed = np.zeros((BACKGROUND, BACKGROUND)), [], 0.0
    for [record] in build_test_loader(cfg, cfg.DATASETS.TEST[0]):
        with torch.no_grad():
            output = model.eval()([record])[0]
        truth = np.asarray(Image.open(records[record["image_id"]]["sem_seg_file_name"]))
        np.add.at(pixels, (truth, output["sem_seg"].argmax(0).numpy()), 1)
        ids, segments = output.get("panoptic_seg", (torch.zeros(truth.shape), []))
        found = [(ids == s["id"]).numpy() for s in segments if s["category_id"] == BACKGROUND - 1]
        background = truth == BACKGROUND - 1
        overlaps = [(background & mask).sum() / (background | mask).sum() for mask in found]
        matched += [overlap for overlap in overlaps if overlap > 0.5]
        missed += 0.5 * sum(overlap <= 0.5 for overlap in overlaps) + 0.5 * (not any(o > 0.5 for o in overlaps))
    ious = np.diag(pixels) / (pixels.sum(0) + pixels.sum(1) - np.diag(pixels))
    return 100 * ious.mean(), 100 * sum(matched) / (len(matched) + missed)


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
@pytest.mark.parametrize(("config", "node"), [(TINY, "MASK_FORMER"), (DINO, "MaskDINO")], ids=["m2f", "mask_dino"])
def test_train_and_evaluate(
    make_cfg: Callable[..., Any], painted: str, tmp_path: Path, config: Path, node: str, task: str
) -> None:
    cfg = make_cfg("INPUT.DATASET_MAPPER_NAME", f"mask_former_{task}", "SOLVER.MAX_ITER", 2, peft=True, config=config)
    cfg.DATASETS.REGISTER = []
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (painted,)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = BACKGROUND
    test = cfg.MODEL[node].TEST
    test.SEMANTIC_ON, test.PANOPTIC_ON, test.INSTANCE_ON = True, task == "panoptic", task == "panoptic"
    mean_iou, quality = by_hand(cfg, train(cfg).model)
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    figures = {key: value for row in rows for key, value in row.items()}
    assert figures["sem_seg/mIoU"] == pytest.approx(mean_iou)
    assert ("panoptic_seg/PQ" in figures) == ("segm/AP" in figures) == (task == "panoptic")
    if task == "panoptic":
        assert figures["panoptic_seg/PQ_st"] == pytest.approx(quality)
