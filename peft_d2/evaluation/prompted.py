"""mIoU and Dice of masks that were predicted from the ground truth's boxes: each belongs to one object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from peft_d2.data.prompts import prompted_objects
from peft_d2.data.segmentation import segmentation_to_mask
from peft_d2.evaluation.mask_metrics import MaskMetrics


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
