"""SEEM for instance, panoptic and semantic segmentation by class names (Zou et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable

from peft_d2.models.class_vectors import ClassVectors
from peft_d2.models.mask2former import MaskFormer
from peft_d2.models.vocabulary import Vocabulary


class SEEM(MaskFormer):
    """Mask2Former's losses and inference, but for the last resize; classes are names, see :meth:`set_classes`.

    Args:
        parts: of :class:`peft_d2.models.mask2former.MaskFormer`; the predictor is a :class:`SEEMDecoder`.
    """

    bicubic_results = True

    @configurable
    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        # Of the published interactive training; kept so that checkpoints are loaded and written whole.
        self.register_buffer("dilation_kernel", torch.ones(1, 1, 3, 3))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts; ``MODEL.SEEM.CLASS_NAMES`` sets the number of classes, too."""
        names = cfg.MODEL.SEEM.CLASS_NAMES
        if names:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(names)
        return super().from_config(cfg)

    def set_classes(self, classes: ClassVectors | Sequence[str]) -> None:
        """Predict these classes from now on: their vectors, or names for the text encoder."""
        predictor = self.sem_seg_head.predictor
        if isinstance(classes, ClassVectors):
            predictor.vocabulary = Vocabulary((), "set_classes")
            predictor.vocabulary.give(classes)
        else:
            predictor.vocabulary = Vocabulary(classes, "set_classes", predictor.vocabulary.tokenizer)
