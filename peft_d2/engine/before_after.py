"""One picture that shows what an adaptation changed: image, truth, the base's predictions, the adapted model's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

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
    from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

    adapted = _predictor(*after)
    base = _predictor(*before)
    name = adapted.cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(name)
    base_metadata = metadata if before_classes is None else Metadata(thing_classes=list(before_classes))
    samples = DatasetCatalog.get(name)
    rows = []
    for index in images:
        sample = samples[index]
        picture, adapted_output = adapted(Path(sample["file_name"]))
        _, base_output = base(Path(sample["file_name"]))
        scale = width / picture.shape[1]
        rows.append(
            [
                np.asarray(Image.fromarray(picture).resize((width, round(picture.shape[0] * scale)))),
                _painter(picture, metadata, scale).draw_dataset_dict(sample).get_image(),
                _predicted(picture, base_output, base_metadata, scale, threshold),
                _predicted(picture, adapted_output, metadata, scale, threshold),
            ]
        )
    _sheet(rows, width).save(target)


def _predictor(config_file: str, opts: Sequence[str]) -> Predictor:
    return Predictor(prepare_config(argparse.Namespace(config_file=config_file, peft_config="", opts=list(opts))))


def _painter(picture: np.ndarray, metadata: Any, scale: float) -> Any:
    from detectron2.utils.visualizer import Visualizer

    return Visualizer(picture, metadata, scale=scale)


def _predicted(
    picture: np.ndarray, output: dict[str, Any], metadata: Any, scale: float, threshold: float
) -> np.ndarray:
    instances = output["instances"].to("cpu")
    kept = instances[instances.scores >= threshold]
    return _painter(picture, metadata, scale).draw_instance_predictions(kept).get_image()


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
