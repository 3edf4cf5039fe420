"""A data set of one's own that is in no known format: a function that lists it, registered with Detectron2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

CLASSES = ["object"]


def load(folder: str) -> list[dict[str, Any]]:
    """One dict an image, in Detectron2's format; here from pairs ``x.png`` and ``x_mask.png``, a number an object."""
    records = []
    for number, path in enumerate(sorted(Path(folder).glob("*_mask.png"))):
        labels = np.asarray(Image.open(path))
        objects = []
        for value in np.unique(labels[labels > 0]):
            rows, columns = np.nonzero(labels == value)
            x0, y0, x1, y1 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            mask = pycocotools.mask.encode(np.asfortranarray(labels == value))
            box = [float(x0), float(y0), float(x1), float(y1)]
            objects.append(
                {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "segmentation": mask, "category_id": 0, "iscrowd": 0}
            )
        image = path.with_name(path.name.replace("_mask", ""))
        size = {"height": labels.shape[0], "width": labels.shape[1]}
        records.append({"file_name": str(image), "image_id": number, **size, "annotations": objects})
    return records


def register(name: str, folder: str) -> None:
    """Afterwards ``DATASETS.TRAIN '("mine",)'`` is all; ``evaluator_type`` chooses the evaluator: COCO's."""
    DatasetCatalog.register(name, lambda: load(folder))
    MetadataCatalog.get(name).set(thing_classes=CLASSES, evaluator_type="coco")
