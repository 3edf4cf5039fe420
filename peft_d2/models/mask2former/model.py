"""Mask2Former for instance, panoptic and semantic segmentation (Cheng et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.structures import Instances
from torch import Tensor, nn

from peft_d2.models.checks import expect, expect_numbers
from peft_d2.models.layers.criterion import HungarianMatcher, SetCriterion
from peft_d2.models.layers.mask_classifier import MaskClassifier
from peft_d2.models.layers.postprocess import Canvas, mask_boxes
from peft_d2.models.registration import TRANSFORMER_DECODER_REGISTRY, entry

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

    def scores(self, logits: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
        """From (Q, K + 1), of which the last class is no-object."""
        scores = logits.softmax(-1)
        best, classes = scores.max(-1)
        keep = (classes != logits.shape[1] - 1) & (best > self.object_mask_threshold)
        return scores[:, :-1], (best, classes, keep), scores[:, :-1]

    def boxes(self, prediction: dict[str, Tensor], instances: Instances, chosen: Tensor, canvas: Canvas) -> Tensor:
        """Around the masks."""
        return mask_boxes(instances.pred_masks) if self.instance_boxes else torch.zeros(len(instances), 4)

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


T = TypeVar("T")
_FEATURES = "multi_scale_pixel_decoder"
_PARTS = ("pixel_decoder.", "predictor.")
_OLD_QUERIES, _QUERIES = "predictor.static_query.", "predictor.query_feat."


@entry(SEM_SEG_HEADS_REGISTRY, "PD2MaskFormerHead", upstream="MaskFormerHead")
class MaskFormerHead(nn.Module):
    """Pixel decoder, then transformer decoder, both named in the config; ``ignore_value`` is a semantic map's.

    The pixel decoder's ``forward_features`` gives mask features, one encoded map and multi-scale maps; the predictor
    takes the multi-scale maps and the mask features.
    """

    # The published code tells old keys from new ones by this number in a state dict's metadata.
    _version = 2
    config_node = "MASK_FORMER"

    def __init__(self, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> None:
        super().__init__()
        head, node = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL[self.config_node]
        source = node.get("TRANSFORMER_IN_FEATURE", _FEATURES)
        expect(source == _FEATURES, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", source, f"{_FEATURES!r} for this head")
        expect_numbers("MODEL.SEM_SEG_HEAD", head, NUM_CLASSES=1, MASK_DIM=1)
        self.pixel_decoder: Any = SEM_SEG_HEADS_REGISTRY.get(head.PIXEL_DECODER_NAME)(cfg, input_shape)
        decoder = TRANSFORMER_DECODER_REGISTRY.get(node.TRANSFORMER_DECODER_NAME)
        self.predictor: Any = decoder(cfg, head.CONVS_DIM, mask_classification=True)
        self.num_classes = head.NUM_CLASSES
        self.ignore_value = head.IGNORE_VALUE

    def forward(self, features: dict[str, Tensor], mask: Tensor | None = None, **targets: Any) -> dict[str, Any]:
        """The backbone's maps by name -> the predictor's outputs; ``mask`` of padding is ignored."""
        mask_features, _, multi_scale_features = self.pixel_decoder.forward_features(features)
        return self.predictor(multi_scale_features, mask_features, mask, **targets)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        upgraded = upgrade_head(state_dict, prefix)
        state_dict.clear()
        state_dict.update(upgraded)
        super()._load_from_state_dict(state_dict, prefix, *args)


def upgrade_head(state: Mapping[str, T], prefix: str) -> dict[str, T]:
    """``state`` in its order, the head at ``prefix`` with today's names instead of those of earlier releases.

    Early files hold the pixel decoder's weights directly in the head, and call the query features ``static_query``.
    Each key is judged by itself, not by version metadata: files that lost theirs, or that mix both forms, load as well.
    Where a new name is taken, the old key stays, and is unexpected.
    """
    upgraded: dict[str, T] = {}
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix):
            renamed = key
        elif not name.startswith(_PARTS):
            renamed = f"{prefix}pixel_decoder.{name}"
        elif name.startswith(_OLD_QUERIES):
            renamed = prefix + _QUERIES + name.removeprefix(_OLD_QUERIES)
        else:
            renamed = key
        upgraded[key if renamed != key and renamed in state else renamed] = value
    return upgraded
