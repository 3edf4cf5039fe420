"""Mask2Former for instance, panoptic and semantic segmentation (Cheng et al., CVPR 2022): model, head, decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.structures import Instances
from torch import Tensor, nn

from peft_d2.models.checks import expect, expect_numbers, expect_width
from peft_d2.models.layers.boxes import mask_boxes
from peft_d2.models.layers.criterion import HungarianMatcher, SetCriterion, autocast_type, masks_of, predicted
from peft_d2.models.layers.mask_classifier import MaskClassifier
from peft_d2.models.layers.postprocess import Canvas
from peft_d2.models.layers.transformer import MLP, AttentionLayer, FFNLayer, SinePosition2d, input_projections
from peft_d2.models.registration import TRANSFORMER_DECODER_REGISTRY, entry, registered

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
_LEVELS = 3
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
        key = f"MODEL.{self.config_node}.TRANSFORMER_DECODER_NAME"
        decoder = registered(TRANSFORMER_DECODER_REGISTRY, key, node.TRANSFORMER_DECODER_NAME)
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


class MaskedTransformerDecoder(nn.Module):
    """Queries attend to one scale after the other, each only where it predicts its mask to be.

    ``MODEL.MASK_FORMER`` describes it: DEC_LAYERS counts the prediction made from the queries themselves, before any
    layer. A decoder derives from it: it adds what its :meth:`classifier` needs. ``in_channels`` are of the features.
    """

    mask_embed: nn.Module

    def __init__(self, cfg: CfgNode, in_channels: int, mask_classification: bool = True) -> None:
        super().__init__()
        former, path = cfg.MODEL.MASK_FORMER, "MODEL.MASK_FORMER"
        expect_numbers(path, former, DEC_LAYERS=1, NUM_OBJECT_QUERIES=1, DIM_FEEDFORWARD=1)
        expect_width(path, former)
        channels, layers = former.HIDDEN_DIM, range(former.DEC_LAYERS - 1)
        attention = {"d_model": channels, "n_heads": former.NHEADS, "pre_norm": former.PRE_NORM}
        self.num_heads = former.NHEADS
        self.position = SinePosition2d(channels)
        self.transformer_self_attention_layers = nn.ModuleList(AttentionLayer(**attention) for _ in layers)
        self.transformer_cross_attention_layers = nn.ModuleList(
            AttentionLayer(**attention, name="multihead_attn") for _ in layers
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FFNLayer(channels, former.DIM_FEEDFORWARD, pre_norm=former.PRE_NORM) for _ in layers
        )
        self.decoder_norm = nn.LayerNorm(channels)
        self.query_feat = nn.Embedding(former.NUM_OBJECT_QUERIES, channels)
        self.query_embed = nn.Embedding(former.NUM_OBJECT_QUERIES, channels)
        self.level_embed = nn.Embedding(_LEVELS, channels)
        self.input_proj = input_projections(in_channels, channels, _LEVELS, former.ENFORCE_INPUT_PROJ)

    def forward(self, features: Sequence[Tensor], mask_features: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """``pred_logits`` (N, Q, K + 1) and ``pred_masks`` (N, Q, H, W) of the last layer, and of all before it.

        The latter, ``aux_outputs``, begin with the raw queries'. In training masks are made when somebody asks for
        them. ``features`` are three maps (N, C, H_l, W_l), coarsest first; ``mask_features`` (N, mask_dim, H, W).
        ``mask`` is ignored: padding is attended to.
        """
        if len(features) != _LEVELS:
            raise ValueError(f"the transformer decoder got {len(features)} feature maps; it needs {_LEVELS}")
        sizes = [(f.shape[-2], f.shape[-1]) for f in features]
        values = [self._flatten(level, feature) for level, feature in enumerate(features)]
        keys = [value + self.position(*size, value.device)[:, None] for value, size in zip(values, sizes, strict=True)]
        batch, mask_features = mask_features.shape[0], autocast_type(mask_features)
        position = self.query_embed.weight[:, None].expand(-1, batch, -1)
        x = self.query_feat.weight[:, None].expand(-1, batch, -1)
        classify = self.classifier()
        predictions = [self.predict(x, mask_features, classify)]
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for number, (cross_attention, self_attention, ffn) in enumerate(layers):
            level = number % _LEVELS
            bias = self.attention_mask(predictions[-1], sizes[level])
            x = cross_attention(x, position, (keys[level], values[level]), bias)
            x = ffn(self_attention(x, position))
            predictions.append(self.predict(x, mask_features, classify))
        predictions[-1]["aux_outputs"] = predictions[:-1]
        return predictions[-1]

    def classifier(self) -> Callable[[Tensor], Tensor]:
        """What scores the normalised hidden states (N, Q, C) in one pass: a function to logits (N, Q, K + 1)."""
        raise NotImplementedError

    def predict(self, x: Tensor, mask_features: Tensor, classify: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Class and mask logits of hidden states (Q, N, C)."""
        hidden = self.decoder_norm(x).transpose(0, 1)
        logits = classify(hidden)
        return predicted(self.mask_embed(hidden), mask_features, kept=not self.training, pred_logits=logits)

    @torch.no_grad()
    def attention_mask(self, prediction: dict[str, Any], size: tuple[int, int]) -> Tensor:
        """(N * heads, Q, h * w), -inf where a query must not attend, outside of its mask if it has any; else 0."""
        resized = F.interpolate(masks_of(prediction), size=size, mode="bilinear", align_corners=False)
        blocked = resized.sigmoid().flatten(2) < 0.5
        blocked &= ~blocked.all(-1, keepdim=True)
        # Torch would make such numbers of bools for each head anew, which takes longer than attending itself.
        bias = torch.zeros_like(blocked, dtype=self.level_embed.weight.dtype).masked_fill_(blocked, -torch.inf)
        return bias[:, None].expand(-1, self.num_heads, -1, -1).flatten(0, 1)  # of one image: the same memory

    def _flatten(self, level: int, feature: Tensor) -> Tensor:
        x = self.input_proj[level](feature).flatten(2) + self.level_embed.weight[level][:, None]
        return x.permute(2, 0, 1).contiguous()


@entry(
    TRANSFORMER_DECODER_REGISTRY, "PD2MultiScaleMaskedTransformerDecoder", upstream="MultiScaleMaskedTransformerDecoder"
)
class MultiScaleMaskedTransformerDecoder(MaskedTransformerDecoder):
    """Mask2Former's: one linear layer scores the classes, of which the last is no-object."""

    # The published code tells old keys from new ones by this number in a state dict's metadata.
    _version = 2

    def __init__(self, cfg: CfgNode, in_channels: int, mask_classification: bool = True) -> None:
        super().__init__(cfg, in_channels, mask_classification)
        channels, head = cfg.MODEL.MASK_FORMER.HIDDEN_DIM, cfg.MODEL.SEM_SEG_HEAD
        self.class_embed = nn.Linear(channels, head.NUM_CLASSES + 1)
        self.mask_embed = MLP(channels, channels, head.MASK_DIM, 3)

    def classifier(self) -> Callable[[Tensor], Tensor]:
        return self.class_embed
