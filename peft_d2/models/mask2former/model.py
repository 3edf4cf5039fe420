"""Mask2Former for instance, panoptic and semantic segmentation (Cheng et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes
from torch import Tensor

from peft_d2.models.layers.criterion import SetCriterion
from peft_d2.models.layers.mask_classifier import MaskClassifier
from peft_d2.models.layers.matcher import HungarianMatcher
from peft_d2.models.layers.postprocess import (
    Canvas,
    instance_inference,
    mask_boxes,
    panoptic_inference,
    semantic_inference,
)
from peft_d2.models.mask2former.head import upgrade_head
from peft_d2.models.registration import entry

# What add_maskformer2_config adds, and of add_deeplab_config what published yaml files set. Ours sit under Detectron2's
# own nodes, as upstream's functions replace MODEL.MASK_FORMER as a whole.
KEYS = """
INPUT:
  {DATASET_MAPPER_NAME: mask_former_semantic, COLOR_AUG_SSD: false, CROP: {SINGLE_CATEGORY_MAX_AREA: 1.0},
   SIZE_DIVISIBILITY: -1, IMAGE_SIZE: 1024, MIN_SCALE: 0.1, MAX_SCALE: 2.0}
SOLVER:
  {OPTIMIZER: ADAMW, WEIGHT_DECAY_EMBED: 0.0, BACKBONE_MULTIPLIER: 0.1, POLY_LR_POWER: 0.9,
   POLY_LR_CONSTANT_ENDING: 0.0}
MODEL:
  RESNETS: {RES4_DILATION: 1, RES5_MULTI_GRID: [1, 2, 4], STEM_TYPE: deeplab}
  MASK_FORMER:
    {DEEP_SUPERVISION: true, NO_OBJECT_WEIGHT: 0.1, CLASS_WEIGHT: 1.0, DICE_WEIGHT: 1.0, MASK_WEIGHT: 20.0, NHEADS: 8,
     DROPOUT: 0.1, DIM_FEEDFORWARD: 2048, ENC_LAYERS: 0, DEC_LAYERS: 6, PRE_NORM: false, HIDDEN_DIM: 256,
     NUM_OBJECT_QUERIES: 100, TRANSFORMER_IN_FEATURE: res5, ENFORCE_INPUT_PROJ: false, SIZE_DIVISIBILITY: 32,
     TRANSFORMER_DECODER_NAME: MultiScaleMaskedTransformerDecoder, TRAIN_NUM_POINTS: 12544, OVERSAMPLE_RATIO: 3.0,
     IMPORTANCE_SAMPLE_RATIO: 0.75, TEST: {SEMANTIC_ON: true, INSTANCE_ON: false, PANOPTIC_ON: false,
     OBJECT_MASK_THRESHOLD: 0.0, OVERLAP_THRESHOLD: 0.0, SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE: false}}
  SEM_SEG_HEAD:
    # Boxes of instances are computed from their masks; False leaves them zero, as the published code does.
    INSTANCE_BOXES: true
"""


@entry(META_ARCH_REGISTRY, "PD2MaskFormer", upstream="MaskFormer", keys=KEYS)
class MaskFormer(MaskClassifier):
    """Mask2Former: see :class:`MaskClassifier`."""

    config_node = "MASK_FORMER"

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.instance_boxes = cfg.MODEL.SEM_SEG_HEAD.INSTANCE_BOXES

    def inference(self, prediction: dict[str, Tensor], canvas: Canvas) -> dict[str, Any]:
        """Results of one image from ``pred_logits`` (Q, K + 1) and ``pred_masks`` (Q, h, w)."""
        scores, mask_logits = prediction["pred_logits"].float().softmax(-1), prediction["pred_masks"]
        probability = scores[:, :-1]
        result: dict[str, Any] = {}
        if self.semantic_on:
            result["sem_seg"] = semantic_inference(probability, mask_logits, canvas, self.resize_semantic_last)
        things = self.known_things() if self.panoptic_on else None
        if things is not None:
            best, classes = scores.max(-1)
            keep = (classes != probability.shape[1]) & (best > self.object_mask_threshold)
            queries = best[keep], classes[keep], mask_logits[keep]
            result["panoptic_seg"] = panoptic_inference(*queries, canvas, things, self.overlap_threshold)
        if self.instance_on:
            instances, _ = instance_inference(probability, mask_logits, canvas, self.top_k, things)
            boxes = mask_boxes(instances.pred_masks) if self.instance_boxes else torch.zeros(len(instances), 4)
            instances.pred_boxes = Boxes(boxes)
            result["instances"] = instances
        return result

    def upgrade_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole model's state dict with the names of earlier releases replaced; ``load_state_dict`` does the same.

        A backbone that other models' checkpoints hold takes its part out of them here.
        """
        upgrade_backbone = getattr(self.backbone, "upgrade_state_dict", None)
        if upgrade_backbone is not None:
            state = upgrade_backbone(state, "backbone.")
        return upgrade_head(state, "sem_seg_head.")

    def make_criterion(self, cfg: CfgNode, num_classes: int) -> SetCriterion:
        """From ``MODEL.MASK_FORMER``; the loss weights are the weights of the matching costs too."""
        former = cfg.MODEL.MASK_FORMER
        weights = {"loss_ce": former.CLASS_WEIGHT, "loss_mask": former.MASK_WEIGHT, "loss_dice": former.DICE_WEIGHT}
        auxiliary = range(former.DEC_LAYERS - 1) if former.DEEP_SUPERVISION else ()
        return SetCriterion(
            num_classes,
            matcher=HungarianMatcher(
                former.CLASS_WEIGHT, former.MASK_WEIGHT, former.DICE_WEIGHT, former.TRAIN_NUM_POINTS
            ),
            weight_dict={**weights, **{f"{name}_{i}": weight for i in auxiliary for name, weight in weights.items()}},
            no_object_weight=former.NO_OBJECT_WEIGHT,
            points=(former.TRAIN_NUM_POINTS, former.OVERSAMPLE_RATIO, former.IMPORTANCE_SAMPLE_RATIO),
        )
