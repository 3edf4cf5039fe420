#!/usr/bin/env python3
"""Cityscapes: label images of the training classes, and panoptic labels, by its own package cityscapesscripts.

python tools/prepare_cityscapes.py --workers 8         # $DETECTRON2_DATASETS/cityscapes, or datasets/cityscapes
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path

from converting import converter_main, in_parallel, require_folder

from peft_d2.compat import require_cityscapes
from peft_d2.storage import disk


def convert_cityscapes(source: str | Path, workers: int = 1) -> dict[str, int]:
    """Write ``*_gtFine_labelTrainIds.png`` and ``cityscapes_panoptic_{train,val}`` into ``gtFine``.

    Both are drawn by cityscapesscripts, the package of the data set's authors.

    Returns:
        How many label images and panoptic annotations each split has.

    Raises:
        ModuleNotFoundError: the package cityscapesscripts is not installed.
        FileNotFoundError: a folder is missing or empty.
    """
    require_cityscapes()
    panoptic = importlib.import_module("cityscapesscripts.preparation.createPanopticImgs")
    source = require_folder(source, "leftImg8bit/ and gtFine/ of Cityscapes")
    truth = require_folder(source / "gtFine", "train/, val/ and test/ of gtFine_trainvaltest.zip")
    counts = {}
    for split in ("train", "val"):
        polygons = sorted(require_folder(truth / split, "a folder for each city").glob("*/*_gtFine_polygons.json"))
        if not polygons:
            raise FileNotFoundError(f"{truth / split}: expected <city>/*_gtFine_polygons.json, found none.")
        in_parallel(_train_ids, polygons, workers)
        counts[f"{truth / split}/*/*_gtFine_labelTrainIds.png"] = len(polygons)
        name = f"cityscapes_panoptic_{split}"
        with tempfile.TemporaryDirectory(dir=truth, prefix=".panoptic-") as work:
            panoptic.convert2panoptic(str(truth), work, False, [split])
            with disk.folder(truth / name, ("*.png",)) as images:
                for path in Path(work, name).iterdir():
                    os.replace(path, images / path.name)
            with disk.file(truth / f"{name}.json") as annotations:
                os.replace(Path(work, f"{name}.json"), annotations)
        counts[str(truth / f"{name}.json")] = len(list((truth / name).glob("*.png")))
    return counts


def _train_ids(polygons: Path) -> None:
    drawing = importlib.import_module("cityscapesscripts.preparation.json2labelImg")
    annotation = drawing.Annotation()
    annotation.fromJsonFile(str(polygons))
    with disk.file(str(polygons).replace("_polygons.json", "_labelTrainIds.png")) as temporary:
        drawing.createLabelImage(annotation, "trainIds").save(temporary, format="PNG")


if __name__ == "__main__":
    sys.exit(converter_main(__doc__, "cityscapes", convert_cityscapes, workers=("processes", 1)))
