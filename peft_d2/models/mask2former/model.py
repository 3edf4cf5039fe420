"""Mask2Former for instance, panoptic and semantic segmentation (Cheng et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, configurable
from torch import Tensor

from peft_d2.models.layers.criterion import SetCriterion
from peft_d2.models.layers.mask_classifier import MaskClassifier
from peft_d2.models.layers.matcher import HungarianMatcher
from peft_d2.models.layers.postprocess import Canvas, instance_inference, panoptic_inference, semantic_inference
from peft_d2.models.mask2former.old_keys import upgrade_head


class MaskFormer(MaskClassifier):
    """Mask2Former: see :class:`MaskClassifier`.

    Args:
        instance_boxes: compute boxes from masks; the published code leaves them zero.
        parts: of :class:`MaskClassifier`.
    """

    config_node = "MASK_FORMER"

    @configurable
    def __init__(self, *, instance_boxes: bool = True, **parts: Any) -> None:
        super().__init__(**parts)
        self.instance_boxes = instance_boxes

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts; see the config nodes in :mod:`peft_d2.models.config`."""
        return {**super().from_config(cfg), "instance_boxes": cfg.MODEL.SEM_SEG_HEAD.INSTANCE_BOXES}

    def inference(self, prediction: dict[str, Tensor], canvas: Canvas) -> dict[str, Any]:
        """Results of one image from ``pred_logits`` (Q, K + 1) and ``pred_masks`` (Q, h, w)."""
        class_logits, mask_logits = prediction["pred_logits"], prediction["pred_masks"]
        result: dict[str, Any] = {}
        if self.semantic_on:
            result["sem_seg"] = semantic_inference(class_logits, mask_logits, canvas, self.resize_semantic_last)
        if self.panoptic_on:
            result["panoptic_seg"] = panoptic_inference(
                class_logits,
                mask_logits,
                canvas,
                self.known_things(),
                self.object_mask_threshold,
                self.overlap_threshold,
            )
        if self.instance_on:
            things = self.known_things() if self.panoptic_on else None
            result["instances"] = instance_inference(
                class_logits, mask_logits, canvas, self.top_k, things, self.instance_boxes
            )
        return result

    def upgrade_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole model's state dict with the names of earlier releases replaced; ``load_state_dict`` does the same.

        A backbone that other models' checkpoints hold takes its part out of them here.
        """
        upgrade_backbone = getattr(self.backbone, "upgrade_state_dict", None)
        if upgrade_backbone is not None:
            state = upgrade_backbone(state, "backbone.")
        return upgrade_head(state, "sem_seg_head.")

    @classmethod
    def make_criterion(cls, cfg: CfgNode, num_classes: int) -> SetCriterion:
        """From ``MODEL.MASK_FORMER``; the loss weights are the weights of the matching costs too."""
        former = cfg.MODEL.MASK_FORMER
        matcher = HungarianMatcher(
            cost_class=former.CLASS_WEIGHT,
            cost_mask=former.MASK_WEIGHT,
            cost_dice=former.DICE_WEIGHT,
            num_points=former.TRAIN_NUM_POINTS,
        )
        weights = {"loss_ce": former.CLASS_WEIGHT, "loss_mask": former.MASK_WEIGHT, "loss_dice": former.DICE_WEIGHT}
        auxiliary = range(former.DEC_LAYERS - 1) if former.DEEP_SUPERVISION else ()
        return SetCriterion(
            num_classes,
            matcher=matcher,
            weight_dict={**weights, **{f"{name}_{i}": weight for i in auxiliary for name, weight in weights.items()}},
            no_object_weight=former.NO_OBJECT_WEIGHT,
            num_points=former.TRAIN_NUM_POINTS,
            oversample_ratio=former.OVERSAMPLE_RATIO,
            importance_sample_ratio=former.IMPORTANCE_SAMPLE_RATIO,
        )
