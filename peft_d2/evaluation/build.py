"""Which evaluators a data set gets, by its metadata's ``evaluator_type`` and what the model puts out."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from detectron2 import evaluation
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, PascalVOCDetectionEvaluator, SemSegEvaluator

from peft_d2.compat import require_cityscapes
from peft_d2.data.classes import category_indices, check_classes
from peft_d2.data.config import PROMPTED, published_name
from peft_d2.data.registration import register_from_config
from peft_d2.evaluation.coco import FastCOCOEvaluator
from peft_d2.evaluation.lvis import FastLVISEvaluator
from peft_d2.evaluation.panoptic import PanopticQualityEvaluator
from peft_d2.evaluation.prompted import PromptedMaskEvaluator

_INSTANCE = {"coco", "coco_panoptic_seg", "ade20k_panoptic_seg"}
_SEMANTIC = {"sem_seg", "coco_panoptic_seg", "ade20k_panoptic_seg", "mapillary_vistas_panoptic_seg"}
_PANOPTIC = {"coco_panoptic_seg", "ade20k_panoptic_seg", "cityscapes_panoptic_seg", "mapillary_vistas_panoptic_seg"}

_DETECTRON2_OUTPUTS = {  # of its own models, see `_outputs`
    **dict.fromkeys(("GeneralizedRCNN", "ProposalNetwork", "RetinaNet", "FCOS"), (True, False, False)),
    "SemanticSegmentor": (False, True, False),
}


class _Cityscapes(evaluation.DatasetEvaluator):
    """Base of both evaluators of Cityscapes, beside Detectron2's: makes cityscapesscripts run with today's NumPy.

    Raises:
        ModuleNotFoundError: cityscapesscripts is not installed; the message names the extra.
    """

    def __init__(self, dataset_name: str) -> None:
        require_cityscapes()
        super().__init__(dataset_name)

    def evaluate(self) -> Any:
        """Detectron2's figures, None on all but the main process."""
        import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as instances

        # cityscapesscripts 2.3 calls np.in1d, which NumPy 2.4 has no more; for it np.isin is the same.
        replaced = mock.patch.object(np, "in1d", np.isin, create=True)
        with replaced, mock.patch.object(instances, "writeDict2JSON", _write_json):
            return super().evaluate()


class CityscapesInstanceEvaluator(_Cityscapes, evaluation.CityscapesInstanceEvaluator):
    """AP and AP50 of instances, by cityscapesscripts."""


class CityscapesSemSegEvaluator(_Cityscapes, evaluation.CityscapesSemSegEvaluator):
    """IoU of the semantic classes and categories, by cityscapesscripts."""


def _write_json(content: Any, path: str) -> None:
    """Write a json as cityscapesscripts does, but with NumPy's numbers, and no matches.json in the current folder."""
    if Path(path).is_absolute():
        Path(path).write_text(json.dumps(content, default=lambda o: o.item() if hasattr(o, "item") else vars(o)))


def build_evaluator(cfg: Any, dataset_name: str, output_folder: str | None) -> DatasetEvaluator:
    """The evaluators of a data set, several in one where its metadata and the model's outputs say so.

    Args:
        cfg: ``MODEL.MASK_FORMER.TEST`` or ``MODEL.MaskDINO.TEST`` tells which outputs there are; for other models, all
            that the data set can be evaluated on.
        dataset_name: a registered name.
        output_folder: for predictions and result files; None writes none.

    Raises:
        ValueError: no evaluator is known for the data set.
    """
    register_from_config(cfg)
    found = [make() for make in _makers(cfg, dataset_name, output_folder)]
    return found[0] if len(found) == 1 else DatasetEvaluators(found)


def check_evaluators(cfg: Any) -> None:
    """Refuse test sets that :func:`build_evaluator` would refuse, or whose classes the model does not have.

    Raises:
        ValueError: no evaluator is known for a data set, or see :func:`peft_d2.data.classes.check_classes`.
    """
    check_classes(cfg)
    for name in cfg.DATASETS.TEST:
        _makers(cfg, name, None)


def _makers(cfg: Any, name: str, folder: str | None) -> list[Callable[[], DatasetEvaluator]]:
    """Functions that make the evaluators of a data set: most of them read the set when they are made."""
    kind, classes = MetadataCatalog.get(name).get("evaluator_type", ""), category_indices(cfg, name)
    instance, semantic, panoptic = _outputs(cfg)
    prompted = published_name(cfg) in PROMPTED and not cfg.INPUT.PROMPTS.DETECTIONS
    shared = {
        "output_dir": folder, "classes": classes, "report": cfg.TEST.get("REPORT", False),
        "outside": cfg.DATASETS.get("ALLOW_FILES_OUTSIDE", False),
    }  # fmt: skip
    coco = partial(
        FastCOCOEvaluator, **shared, kpt_oks_sigmas=tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS),
        max_detections=cfg.TEST.get("MAX_DETECTIONS", 100),
    )  # fmt: skip
    cityscapes = kind == "cityscapes_panoptic_seg"
    rows: tuple[tuple[bool, Callable[[str], DatasetEvaluator]], ...] = (
        (kind in _SEMANTIC and (semantic or kind == "sem_seg"),
         partial(SemSegEvaluator, distributed=True, output_dir=folder)),
        (kind == "coco" and prompted, PromptedMaskEvaluator),
        (kind in _INSTANCE and (instance or kind == "coco"), coco),
        (kind in _PANOPTIC and panoptic,
         partial(PanopticQualityEvaluator, output_dir=folder, report=cfg.TEST.get("REPORT", False))),
        (kind == "cityscapes_instance" or (cityscapes and instance), CityscapesInstanceEvaluator),
        (kind == "cityscapes_sem_seg" or (cityscapes and semantic), CityscapesSemSegEvaluator),
        (kind == "lvis", partial(FastLVISEvaluator, **shared)),
        (kind == "pascal_voc", PascalVOCDetectionEvaluator),
    )  # fmt: skip
    found: list[Callable[[], DatasetEvaluator]] = [partial(make, name) for wanted, make in rows if wanted]
    if not found:
        raise ValueError(
            f"data set {name!r}: no evaluator for its evaluator_type {kind!r}. Set it with "
            f"MetadataCatalog.get({name!r}).set(evaluator_type=...), 'coco' for COCO-format instances."
        )
    return found


def _outputs(cfg: Any) -> tuple[bool, bool, bool]:
    """Whether there are results of instances, of pixels' classes, and of panoptic segments; all of models not known."""
    name, test = published_name(cfg), outputs_node(cfg)
    if test is not None:
        return test.INSTANCE_ON, test.SEMANTIC_ON, test.PANOPTIC_ON
    if name == "PanopticFPN":
        return True, True, cfg.MODEL.PANOPTIC_FPN.COMBINE.ENABLED
    return _DETECTRON2_OUTPUTS.get(name, (True, True, True))


def outputs_node(cfg: Any) -> Any:
    """The config node that says which results the model gives; None for models without such a node."""
    name = published_name(cfg)
    node = "MaskDINO" if name == "MaskDINO" else "MASK_FORMER" if name in ("MaskFormer", "SEEM", "EoMT") else ""
    return cfg.MODEL[node].TEST if node in cfg.MODEL else None
