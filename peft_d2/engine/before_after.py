"""One picture that shows what an adaptation changed: image, truth, the base's predictions, the adapted model's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from peft_d2.data.pictures import overlay
from peft_d2.data.segmentation import segmentation_to_mask
from peft_d2.engine.demo import Predictor
from peft_d2.engine.launch import prepare_config

_TITLES = ("image", "truth", "before", "after")
_GAP, _HEADER = 6, 22


def draw_before_after(
    before: tuple[str, Sequence[str]],
    after: tuple[str, Sequence[str]],
    target: str | Path,
    *,
    before_classes: Sequence[str] | None = None,
    images: Sequence[int] = (0, 1, 2, 3),
    width: int = 320,
    threshold: float = 0.5,
) -> None:
    """Write a picture with a row per image of the adapted model's evaluation set.

    Args:
        before: config file and ``KEY VALUE`` pairs of the base.
        after: the same of the adapted model; its first ``DATASETS.TEST`` gives the images and the truth.
        target: file to write.
        before_classes: the base's class names, where they differ from the data set's.
        images: which images of the data set.
        width: of each column, in pixels.
        threshold: predictions of a lower score are not drawn.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    adapted, base = _predictor(*after), _predictor(*before)
    name = adapted.cfg.DATASETS.TEST[0]
    classes = MetadataCatalog.get(name).thing_classes
    samples = DatasetCatalog.get(name)
    rows = []
    for index in images:
        sample = samples[index]
        picture, adapted_output = adapted(Path(sample["file_name"]))
        _, base_output = base(Path(sample["file_name"]))
        rows.append(
            [
                _overlaid(picture, [], [], (), width),
                _overlaid(picture, *_truth(sample, picture), classes, width),
                _overlaid(picture, *_predicted(base_output, threshold), before_classes or classes, width),
                _overlaid(picture, *_predicted(adapted_output, threshold), classes, width),
            ]
        )
    _sheet(rows, width).save(target)


def _predictor(config_file: str, opts: Sequence[str]) -> Predictor:
    return Predictor(prepare_config(argparse.Namespace(config_file=config_file, peft_config="", opts=list(opts))))


def _truth(sample: dict[str, Any], picture: np.ndarray) -> tuple[list[np.ndarray], list[int]]:
    height, width = picture.shape[:2]
    objects = sample["annotations"]
    masks = [segmentation_to_mask(thing["segmentation"], height, width) for thing in objects]
    return masks, [thing["category_id"] for thing in objects]


def _predicted(output: dict[str, Any], threshold: float) -> tuple[list[np.ndarray], list[int]]:
    instances = output["instances"].to("cpu")
    kept = instances[instances.scores >= threshold]
    return list(kept.pred_masks.numpy().astype(bool)), kept.pred_classes.tolist()


def _overlaid(
    picture: np.ndarray, masks: Sequence[np.ndarray], labels: Sequence[int], names: Sequence[str], width: int
) -> np.ndarray:
    size = (width, round(width * picture.shape[0] / picture.shape[1]))
    enlarged = np.asarray(Image.fromarray(picture).resize(size))
    large = [np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
    return overlay(enlarged, large, labels, names)


def _sheet(rows: Sequence[Sequence[np.ndarray]], width: int) -> Image.Image:
    height = _HEADER + sum(max(cell.shape[0] for cell in row) + _GAP for row in rows)
    sheet = Image.new("RGB", (len(_TITLES) * (width + _GAP) - _GAP, height - _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(_TITLES):
        pen.text((column * (width + _GAP) + 4, 5), title, fill="black", font_size=14)
    top = _HEADER
    for row in rows:
        for column, cell in enumerate(row):
            sheet.paste(Image.fromarray(cell), (column * (width + _GAP), top))
        top += max(cell.shape[0] for cell in row) + _GAP
    return sheet
