"""Mask2Former for instance, panoptic and semantic segmentation (Cheng et al., CVPR 2022): model, head, decoders.

A pixel decoder is an encoder over the backbone's coarse maps, then a pyramid down to the finest. Mask2Former and Mask
DINO encode several maps by deformable attention, MaskFormer and SEEM the coarsest one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.structures import Instances
from torch import Tensor, nn

from peft_d2.models.checks import (
    ModelConfigError,
    expect,
    expect_heads,
    expect_multiple,
    expect_norm,
    expect_numbers,
    expect_some_of,
    expect_width,
)
from peft_d2.models.layers.boxes import mask_boxes
from peft_d2.models.layers.criterion import HungarianMatcher, SetCriterion, autocast_type, masks_of, predicted
from peft_d2.models.layers.mask_classifier import MaskClassifier
from peft_d2.models.layers.postprocess import Canvas
from peft_d2.models.layers.transformer import (
    MLP,
    AttentionLayer,
    FFNLayer,
    MultiScaleDeformableTransformer,
    SinePosition2d,
    TransformerEncoder,
    init_transformer,
    input_projections,
)
from peft_d2.models.registration import TRANSFORMER_DECODER_REGISTRY, entry, registered
from peft_d2.storage.names import renamed

_GROUPS = 32  # of the norms behind the projections
_LEVELS = 3  # maps that the transformer decoder takes
_FEATURES = "multi_scale_pixel_decoder"
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
    {MASK_DIM: 256, TRANSFORMER_ENC_LAYERS: 0, PIXEL_DECODER_NAME: BasePixelDecoder,
     DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES: [res3, res4, res5], DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS: 4,
     DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS: 8,
     # Hidden channels of the encoder: 1024 in the published models, whatever MASK_FORMER says.
     DIM_FEEDFORWARD: 1024,
     # True computes the encoder's activations again in the backward pass instead of keeping them.
     USE_CHECKPOINT: false,
     # True runs the pixel decoder in the autocast type with SOLVER.AMP; the published models keep it in float32.
     PIXEL_DECODER_AUTOCAST: false,
     # Boxes of instances are computed from their masks; False leaves them zero, as the published code does.
     INSTANCE_BOXES: true}
"""


@entry(META_ARCH_REGISTRY, "PD2MaskFormer", upstream="MaskFormer", keys=KEYS)
class MaskFormer(MaskClassifier):
    """Mask2Former: see :class:`MaskClassifier`."""

    config_node = "MASK_FORMER"

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.instance_boxes = cfg.MODEL.SEM_SEG_HEAD.INSTANCE_BOXES

    def scores(self, logits: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
        """The scores of logits (Q, K + 1), whose last class is no-object."""
        scores = logits.softmax(-1)
        best, classes = scores.max(-1)
        keep = (classes != logits.shape[1] - 1) & (best > self.object_mask_threshold)
        return scores[:, :-1], (best, classes, keep), scores[:, :-1]

    def boxes(self, prediction: dict[str, Tensor], instances: Instances, chosen: Tensor, canvas: Canvas) -> Tensor:
        """The boxes around the masks."""
        return mask_boxes(instances.pred_masks) if self.instance_boxes else torch.zeros(len(instances), 4)

    def upgrade_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole model's state dict with the names of earlier releases replaced; ``load_state_dict`` does the same.

        A backbone that can be loaded from another model's whole checkpoint takes its part out of that here.
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


class GroupNorm(nn.GroupNorm):
    """torch's group norm, which also takes maps with one value per group, as of an image of one pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def _norm(name: str, channels: int) -> nn.Module | None:
    """The norm that Detectron2 has under this name, but with the group norm above."""
    return GroupNorm(_GROUPS, channels) if name == "GN" else get_norm(name, channels)


class Pyramid(nn.Module):
    """Convolutions named ``adapter_<n>`` and ``layer_<n>`` as published; number 1 is the finest level.

    ``head`` is ``MODEL.SEM_SEG_HEAD``, with their CONVS_DIM and NORM; ``input_shape`` describes the backbone's maps.
    """

    mask_features: nn.Module

    def __init__(self, head: CfgNode, input_shape: Collection[str]) -> None:
        super().__init__()
        path = "MODEL.SEM_SEG_HEAD"
        expect_some_of(f"{path}.IN_FEATURES", head.IN_FEATURES, input_shape, "the backbone's maps")
        expect_numbers(path, head, CONVS_DIM=1, MASK_DIM=1, TRANSFORMER_ENC_LAYERS=0)
        expect_norm(f"{path}.NORM", head.NORM)
        self._channels, self._norm = head.CONVS_DIM, head.NORM

    def add_level(self, number: int, in_channels: int = 0) -> None:
        """Add ``layer_<n>`` (3 x 3, norm, ReLU) and, where a map of ``in_channels`` enters, ``adapter_<n>`` (1 x 1)."""
        channels, norm = self._channels, self._norm
        if in_channels:
            lateral = Conv2d(in_channels, channels, kernel_size=1, bias=norm == "", norm=_norm(norm, channels))
            weight_init.c2_xavier_fill(lateral)
            self.add_module(f"adapter_{number}", lateral)
        output = Conv2d(
            channels, channels, 3, padding=1, bias=norm == "", norm=_norm(norm, channels), activation=F.relu
        )
        weight_init.c2_xavier_fill(output)
        self.add_module(f"layer_{number}", output)

    def require_float32(self, or_float64: bool = False) -> None:
        """Refuse weights of other types, such as those after ``model.half()``."""
        kind = self.mask_features.weight.dtype
        if kind != torch.float32 and not (or_float64 and kind == torch.float64):
            raise ModelConfigError(
                f"the pixel decoder computes in float32, as published, and its weights are {kind}: keep the "
                "model in float32, model.float(), and run it under torch.autocast"
            )

    def merge(self, number: int, feature: Tensor, coarse: Tensor, mode: str) -> Tensor:
        """The level's map: from the backbone's ``feature`` and the next coarser level's map, resized by ``mode``."""
        side = self.get_submodule(f"adapter_{number}")(feature)
        return self.get_submodule(f"layer_{number}")(side + F.interpolate(coarse, size=side.shape[-2:], mode=mode))


@entry(SEM_SEG_HEADS_REGISTRY, "PD2MSDeformAttnPixelDecoder", upstream="MSDeformAttnPixelDecoder")
class MSDeformAttnPixelDecoder(Pyramid):
    """Deformable encoder and feature pyramid (Cheng et al., CVPR 2022, section 4.1), as Mask2Former configures them.

    Args:
        cfg: ``MODEL.SEM_SEG_HEAD`` describes it; NHEADS and DROPOUT come from the decoder's node, ``config_node``.
        decoder_levels: maps that the transformer decoder gets.
        extra_levels: how many more maps the encoder sees: from the coarsest one on, each half the size of the last.
        finest_first: the order of maps in the encoder and for the transformer decoder; otherwise coarsest first.
        least_pyramid_levels: how many maps enter the pyramid at least, even if the encoder reaches the common stride.
    """

    config_node = "MASK_FORMER"

    def __init__(
        self,
        cfg: CfgNode,
        input_shape: dict[str, ShapeSpec],
        decoder_levels: int = _LEVELS,
        extra_levels: int = 0,
        finest_first: bool = False,
        least_pyramid_levels: int = 0,
    ) -> None:
        head, node = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL[self.config_node]
        super().__init__(head, input_shape)
        self._check(head, node)
        channels = head.CONVS_DIM
        names = sorted((name for name in input_shape if name in head.IN_FEATURES), key=lambda n: input_shape[n].stride)
        encoded = [name for name in names if name in head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES]
        self.encoder_features = encoded if finest_first else encoded[::-1]
        self.finest_first = finest_first
        self.decoder_levels = decoder_levels
        self.autocast = head.PIXEL_DECODER_AUTOCAST
        self.coarsest = encoded[-1]
        self.input_proj = nn.ModuleList(_projection(input_shape[n].channels, channels) for n in self.encoder_features)
        sources = [input_shape[self.coarsest].channels, *[channels] * extra_levels]
        self.input_proj.extend(_projection(source, channels, halve=True) for source in sources[:extra_levels])
        # As published, position codes of extra maps are finest first, whereas the maps are coarsest first.
        self.code_order = list(range(len(encoded) + extra_levels))
        start = len(encoded) if finest_first else 0
        self.code_order[start : start + extra_levels] = reversed(self.code_order[start : start + extra_levels])
        self.transformer = MultiScaleDeformableTransformer(
            channels,
            head.DIM_FEEDFORWARD,
            head.TRANSFORMER_ENC_LAYERS,
            len(self.input_proj),
            node.NHEADS,  # as published, not DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS
            head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS,
            node.DROPOUT,
        )
        self.transformer.encoder.use_checkpoint = head.USE_CHECKPOINT
        self.mask_features = Conv2d(channels, head.MASK_DIM, kernel_size=1)
        weight_init.c2_xavier_fill(self.mask_features)
        finest = input_shape[encoded[0]].stride
        enter = sum(head.COMMON_STRIDE <= input_shape[name].stride < finest for name in names)
        self.pyramid_features = names[: max(enter, least_pyramid_levels)]
        for number, name in enumerate(self.pyramid_features, start=1):
            self.add_level(number, input_shape[name].channels)

    def _check(self, head: CfgNode, node: CfgNode) -> None:
        path, encoded = "MODEL.SEM_SEG_HEAD", "DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
        expect_some_of(f"{path}.{encoded}", head[encoded], head.IN_FEATURES, "which IN_FEATURES names")
        expect_numbers(path, head, DIM_FEEDFORWARD=1, DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS=1, COMMON_STRIDE=1)
        expect_multiple(f"{path}.CONVS_DIM", head.CONVS_DIM, _GROUPS, "{}, the groups of its norms")
        expect_heads(f"{path}.CONVS_DIM", head.CONVS_DIM, f"MODEL.{self.config_node}.NHEADS", node.NHEADS)
        expect_numbers(f"MODEL.{self.config_node}", node, DROPOUT=(0, 1))

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Encode the backbone's maps (N, C_l, H_l, W_l), and add finer ones to the finest of them.

        Mask features (N, mask_dim, H, W) come at the common stride, then the first encoded map, and the first
        ``decoder_levels`` maps (N, conv_dim, H_l, W_l), in the encoder's order.
        """
        self.require_float32(or_float64=self.autocast)
        device_type = features[self.coarsest].device.type
        with nullcontext() if self.autocast else torch.autocast(device_type, enabled=False):
            if not self.autocast:
                features = {name: feature.float() for name, feature in features.items()}
            maps = self.transformer(self._encoder_maps(features), self.code_order)
            finest = maps[0] if self.finest_first else maps[-1]
            for number in range(len(self.pyramid_features), 0, -1):
                maps.append(self.merge(number, features[self.pyramid_features[number - 1]], finest, "bilinear"))
                if not self.finest_first:  # otherwise each level adds the encoder's own map, as published
                    finest = maps[-1]
            return self.mask_features(maps[-1]), maps[0], maps[: self.decoder_levels]

    forward = forward_features

    def _encoder_maps(self, features: dict[str, Tensor]) -> list[Tensor]:
        """The encoder's input; extra maps are coarsest first in both orders, as published."""
        count, projections = len(self.encoder_features), list(self.input_proj)
        maps = [project(features[n]) for n, project in zip(self.encoder_features, projections[:count], strict=True)]
        extra: list[Tensor] = []
        source = features[self.coarsest]
        for projection in projections[count:]:
            source = projection(source)
            extra.insert(0, source)
        return maps + extra if self.finest_first else extra + maps


def _projection(in_channels: int, channels: int, halve: bool = False) -> nn.Sequential:
    """A 1 x 1 convolution, or one that halves the size, and a group norm."""
    kernel, stride, padding = (3, 2, 1) if halve else (1, 1, 0)
    convolution = nn.Conv2d(in_channels, channels, kernel, stride, padding)
    nn.init.xavier_uniform_(convolution.weight)
    nn.init.zeros_(convolution.get_parameter("bias"))
    return nn.Sequential(convolution, GroupNorm(_GROUPS, channels))


class MapTransformer(nn.Module):
    """A transformer encoder over the pixels of one map (N, C, H, W), with sine positions."""

    def __init__(self, d_model: int, n_heads: int, d_ffn: int, n_layers: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.encoder = TransformerEncoder(n_layers, d_model, n_heads, d_ffn, dropout, pre_norm)
        self.position = SinePosition2d(d_model)
        init_transformer(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        position = self.position(x.shape[-2], x.shape[-1], x.device)[:, None]
        encoded = self.encoder(x.flatten(2).permute(2, 0, 1).contiguous(), position)
        return encoded.permute(1, 2, 0).view(x.shape)


@entry(SEM_SEG_HEADS_REGISTRY, "PD2TransformerEncoderPixelDecoder", upstream="TransformerEncoderPixelDecoder")
class TransformerEncoderPixelDecoder(Pyramid):
    """Encoder and feature pyramid (Cheng et al., MaskFormer, NeurIPS 2021, section 3.2), as SEEM uses them.

    Padding is not masked. Upsampling is to the nearest pixel. All maps that ``MODEL.SEM_SEG_HEAD`` names enter the
    pyramid; the encoder has the heads, dropout and hidden channels of ``MODEL.MASK_FORMER``.
    """

    def __init__(self, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> None:
        head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        super().__init__(head, input_shape)
        names, channels = list(head.IN_FEATURES), head.CONVS_DIM
        enough = f"{_LEVELS} maps or more, which the transformer decoder takes"
        expect(len(names) >= _LEVELS, "MODEL.SEM_SEG_HEAD.IN_FEATURES", names, enough)
        expect_multiple("MODEL.SEM_SEG_HEAD.CONVS_DIM", channels, 4)
        expect_heads("MODEL.SEM_SEG_HEAD.CONVS_DIM", channels, "MODEL.MASK_FORMER.NHEADS", former.NHEADS)
        expect_numbers("MODEL.MASK_FORMER", former, DROPOUT=(0, 1))
        self.in_features = sorted(names, key=lambda name: input_shape[name].stride)
        *finer, coarsest = self.in_features
        for number, name in enumerate(finer, start=1):
            self.add_level(number, input_shape[name].channels)
        self.mask_features = Conv2d(channels, head.MASK_DIM, kernel_size=3, padding=1)
        self.input_proj = Conv2d(input_shape[coarsest].channels, channels, kernel_size=1)
        for convolution in (self.mask_features, self.input_proj):
            weight_init.c2_xavier_fill(convolution)
        layers = head.TRANSFORMER_ENC_LAYERS
        self.transformer = MapTransformer(
            channels, former.NHEADS, former.DIM_FEEDFORWARD, layers, former.DROPOUT, former.PRE_NORM
        )
        self.transformer.encoder.use_checkpoint = head.USE_CHECKPOINT
        self.add_level(len(self.in_features))

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Encode the coarsest of the backbone's maps (N, C_l, H_l, W_l), and add the finer ones to it one by one.

        Mask features are at the finest map's stride; of the pyramid, the three coarsest maps come out, coarsest first.
        """
        self.require_float32()
        *finer, coarsest = self.in_features
        encoded = self.transformer(self.input_proj(features[coarsest]))
        maps = [self.get_submodule(f"layer_{len(self.in_features)}")(encoded)]
        for number in range(len(finer), 0, -1):
            maps.append(self.merge(number, features[finer[number - 1]], maps[-1], "nearest"))
        return self.mask_features(maps[-1]), encoded, maps[:_LEVELS]

    forward = forward_features


@entry(SEM_SEG_HEADS_REGISTRY, "PD2MaskFormerHead", upstream="MaskFormerHead")
class MaskFormerHead(nn.Module):
    """Pixel decoder, then transformer decoder, as the config names them; semantic maps have ``ignore_value``.

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


def upgrade_head(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """``state`` in its order, the head at ``prefix`` with today's names instead of those of earlier releases.

    Early files hold the pixel decoder's weights directly in the head, and call the query features ``static_query``.
    Each key is judged by itself, not by version metadata, so that files without metadata, or with both forms, load as
    well. If the new name is taken, the old key stays, and loading reports it as unexpected.
    """
    head = "^" + re.escape(prefix)
    rules = (
        (head + r"(?!pixel_decoder\.|predictor\.)", prefix + "pixel_decoder."),
        (head + r"predictor\.static_query\.", prefix + "predictor.query_feat."),
    )
    names = {key: renamed(key, rules) for key in state}
    return {key if name != key and name in state else name: state[key] for key, name in names.items()}


class MaskedTransformerDecoder(nn.Module):
    """Queries attend to one scale after the other, each only within the mask that it predicts.

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
        values = []
        for project, feature, code in zip(self.input_proj, features, self.level_embed.weight.unbind(), strict=True):
            values.append((project(feature).flatten(2) + code[:, None]).permute(2, 0, 1).contiguous())
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
        """For one pass: the function from normalised hidden states (N, Q, C) to class logits (N, Q, K + 1)."""
        raise NotImplementedError

    def predict(self, x: Tensor, mask_features: Tensor, classify: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Class and mask logits of hidden states (Q, N, C)."""
        hidden = self.decoder_norm(x).transpose(0, 1)
        logits = classify(hidden)
        return predicted(self.mask_embed(hidden), mask_features, kept=not self.training, pred_logits=logits)

    @torch.no_grad()
    def attention_mask(self, prediction: dict[str, Any], size: tuple[int, int]) -> Tensor:
        """(N * heads, Q, h * w): -inf outside of a query's mask, where it must not attend; all 0 if it is empty."""
        resized = F.interpolate(masks_of(prediction), size=size, mode="bilinear", align_corners=False)
        blocked = resized.sigmoid().flatten(2) < 0.5
        blocked &= ~blocked.all(-1, keepdim=True)
        # Torch would make such numbers of bools for each head anew, which takes longer than attending itself.
        bias = torch.zeros_like(blocked, dtype=self.level_embed.weight.dtype).masked_fill_(blocked, -torch.inf)
        return bias[:, None].expand(-1, self.num_heads, -1, -1).flatten(0, 1)  # of one image: the same memory


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
