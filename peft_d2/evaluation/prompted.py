"""IoU and Dice of masks that belong together, as in segmentation with box prompts: no matching, no scores.

Per class and as the mean over the classes that occur: a class without objects is left out, it does not count as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from peft_d2.data.prompts import prompted_objects
from peft_d2.data.segmentation import segmentation_to_mask


@dataclass
class MaskMetrics:
    """Collects pairs of masks and gives their metrics.

    Attributes:
        classes: names, the mean is over those that occur.
        smoothing: added to intersections and unions of the per-object measures; 1 is what COBOT's evaluation of
            remote-sensing images uses. Without it, two empty masks agree (1.0).
        columns: (first, last) columns of the masks that are compared, the last one exclusive; None compares all.
    """

    classes: Sequence[str]
    smoothing: float = 0.0
    columns: tuple[int, int] | None = None
    # Of each class: how many objects, the sums of their IoU and Dice, of intersections, and of both areas in px.
    _sums: dict[int, np.ndarray] = field(default_factory=dict)

    def add(self, truth: np.ndarray | torch.Tensor, found: np.ndarray | torch.Tensor, label: int) -> None:
        """One object: (H, W) masks, or the (D, H, W) stack of a volume, and its class index.

        Raises:
            ValueError: masks of different sizes, or a class that is not listed.
        """
        if tuple(truth.shape) != tuple(found.shape):
            raise ValueError(f"the masks are of {tuple(truth.shape)} and {tuple(found.shape)} px: they must agree.")
        if not 0 <= label < len(self.classes):
            raise ValueError(f"class {label} is not listed, there are {len(self.classes)} classes.")
        columns = slice(*(self.columns or (None,)))
        one, other = (np.asarray(torch.as_tensor(m).cpu()).astype(bool)[..., columns] for m in (truth, found))
        shared, areas = int((one & other).sum()), int(one.sum()) + int(other.sum())
        ratios = [
            (part + self.smoothing) / (whole + self.smoothing) if whole + self.smoothing else 1.0
            for part, whole in ((shared, areas - shared), (2 * shared, areas))
        ]
        self._sums[label] = self._sums.get(label, 0) + np.array([1, *ratios, shared, areas], dtype=np.float64)

    def merge(self, other: MaskMetrics) -> None:
        """Take over what another process collected."""
        for label, theirs in other._sums.items():
            self._sums[label] = self._sums.get(label, 0) + theirs

    def results(self) -> dict[str, float]:
        """In per cent: ``mIoU``, ``mDice`` (means over classes of the means over their objects), ``DSC`` (mean over
        classes of the Dice of all their pixels together, as volumes are measured), and each by class, ``IoU-<name>``.

        nan where nothing was added, and for the ``DSC`` of a class whose masks are all empty.
        """
        by_class: dict[str, float] = {}
        for label, (count, iou, dice, shared, areas) in sorted(self._sums.items()):
            values = {"IoU": iou / count, "Dice": dice / count, "DSC": 2 * shared / areas if areas else float("nan")}
            by_class |= {f"{key}-{self.classes[label]}": 100 * float(value) for key, value in values.items()}
        figures = {}
        for name, key in (("mIoU", "IoU-"), ("mDice", "Dice-"), ("DSC", "DSC-")):
            values_of = [v for k, v in by_class.items() if k.startswith(key) and not np.isnan(v)]
            figures[name] = float(np.mean(values_of)) if values_of else float("nan")
        return figures | by_class


class PromptedMaskEvaluator(DatasetEvaluator):
    """Compares the prediction of each box with its object, in the image's own size; results under ``masks``.

    Args:
        dataset_name: its metadata names the classes.
    """

    def __init__(self, dataset_name: str) -> None:
        self._classes = list(MetadataCatalog.get(dataset_name).thing_classes)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._metrics = MaskMetrics(self._classes)

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Records with their annotations, and a prediction per annotation that is no crowd, in order.

        Raises:
            ValueError: another number of predictions than of objects, or an object without a mask.
        """
        for record, output in zip(inputs, outputs, strict=True):
            objects, instances = prompted_objects(record), output["instances"]
            if len(objects) != len(instances):
                raise ValueError(
                    f"{record.get('file_name')}: {len(instances)} predictions for {len(objects)} objects. Masks are "
                    "compared one to one: set INPUT.DATASET_MAPPER_NAME sam_prompts."
                )
            for thing, mask in zip(objects, instances.pred_masks, strict=True):
                if "segmentation" not in thing:
                    raise ValueError(f"{record.get('file_name')}: an annotation has no segmentation to compare with.")
                truth = segmentation_to_mask(thing["segmentation"], *mask.shape)
                self._metrics.add(truth, mask, thing["category_id"])

    def evaluate(self) -> dict[str, Any]:
        """``{"masks": ...}`` of :meth:`MaskMetrics.results` on the main process, of all processes together."""
        parts = comm.gather(self._metrics)
        if not comm.is_main_process():
            return {}
        whole = MaskMetrics(self._classes)
        for part in parts:
            whole.merge(part)
        return {"masks": whole.results()}
