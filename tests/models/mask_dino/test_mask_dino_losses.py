"""The training losses of Mask DINO are the published ones, in expectation."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.structures import Boxes, Instances


def test_losses_agree_with_the_published_in_expectation(
    build: Any, golden: Any, filler: Any, two_threads: None
) -> None:
    """Points, matching and noise are random: means over seeds are compared, each by its own spread."""
    recipe = golden("maskdino_losses")
    model = build("mask_dino/coco/instance_r50.yaml", {"MODEL.WEIGHTS": "", **recipe["config_overrides"]}).train()
    filler.fill(model, skip=("criterion",))
    inputs = []
    for item in recipe["inputs"]:
        instances = Instances((item["height"], item["width"]))
        masks = torch.zeros(len(item["objects"]), item["height"], item["width"], dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, item["objects"], strict=True):
            mask[y0:y1, x0:x1] = True
        instances.gt_classes = torch.arange(len(masks))
        instances.gt_masks = masks
        instances.gt_boxes = Boxes(torch.tensor(item["objects"], dtype=torch.float32))
        inputs.append({"image": filler.image(item["seed"], item["height"], item["width"]), "instances": instances})
    seeds = 12
    with torch.no_grad():
        runs = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            runs.append({name: loss.item() for name, loss in model(inputs).items()})
    assert runs[0].keys() == recipe["losses"].keys()
    for name, (mean, deviation) in recipe["losses"].items():
        found = sum(run[name] for run in runs) / seeds
        error = deviation * (1 / seeds + 1 / recipe["seeds"]) ** 0.5
        assert abs(found - mean) <= 5 * error + 1e-4 * abs(mean), name
