"""Mask DINO for instance, panoptic and semantic segmentation, with boxes (Li et al., CVPR 2023)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import Tensor

from peft_d2.models.checks import expect
from peft_d2.models.layers.boxes import mask_boxes, to_centres, to_corners
from peft_d2.models.layers.criterion import Target
from peft_d2.models.layers.mask_classifier import MaskClassifier
from peft_d2.models.layers.postprocess import Canvas
from peft_d2.models.mask2former.model import MaskFormerHead
from peft_d2.models.mask2former.pixel_decoder import MSDeformAttnPixelDecoder
from peft_d2.models.mask_dino.criterion import BoxMaskCriterion, BoxMaskMatcher
from peft_d2.models.mask_dino.transformer_decoder import softmax_classes
from peft_d2.models.registration import entry

_LABELS = "sem_seg_head.predictor.label_enc.weight"
_FINEST_FIRST = {"low2high": True, "high2low": False}  # the published words tell strides, not resolutions
_logger = logging.getLogger(__name__)

# What add_maskdino_config adds to Mask2Former's keys. Some do nothing; published yaml files set them all the same.
KEYS = """
Default_loading: true
MODEL:
  MaskDINO:
    {LEARN_TGT: false, PANO_BOX_LOSS: false, SEMANTIC_CE_LOSS: false, DEEP_SUPERVISION: true, NO_OBJECT_WEIGHT: 0.1,
     CLASS_WEIGHT: 4.0, DICE_WEIGHT: 5.0, MASK_WEIGHT: 5.0, BOX_WEIGHT: 5.0, GIOU_WEIGHT: 2.0, COST_CLASS_WEIGHT: 4.0,
     COST_DICE_WEIGHT: 5.0, COST_MASK_WEIGHT: 5.0, COST_BOX_WEIGHT: 5.0, COST_GIOU_WEIGHT: 2.0, NHEADS: 8, DROPOUT: 0.1,
     DIM_FEEDFORWARD: 2048, ENC_LAYERS: 0, DEC_LAYERS: 6, INITIAL_PRED: true, PRE_NORM: false, BOX_LOSS: true,
     HIDDEN_DIM: 256, NUM_OBJECT_QUERIES: 100, ENFORCE_INPUT_PROJ: false, TWO_STAGE: true, INITIALIZE_BOX_TYPE: "no",
     DN: seg, DN_NOISE_SCALE: 0.4, DN_NUM: 100, PRED_CONV: false, EVAL_FLAG: 1, SIZE_DIVISIBILITY: 32,
     TRANSFORMER_DECODER_NAME: MaskDINODecoder, TRAIN_NUM_POINTS: 12544, OVERSAMPLE_RATIO: 3.0,
     IMPORTANCE_SAMPLE_RATIO: 0.75, TEST: {TEST_FOUCUS_ON_BOX: false, SEMANTIC_ON: true, INSTANCE_ON: false,
     PANOPTIC_ON: false, OBJECT_MASK_THRESHOLD: 0.0, OVERLAP_THRESHOLD: 0.0,
     SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE: false, PANO_TRANSFORM_EVAL: true, PANO_TEMPERATURE: 0.06}}
  SEM_SEG_HEAD:
    {NUM_FEATURE_LEVELS: 3, TOTAL_NUM_FEATURE_LEVELS: 4, FEATURE_ORDER: high2low,
     # Target boxes are relative to the padded batch, as masks and results are; False: to the image without padding, as
     # in the published code. Both agree where nothing is padded, as with large-scale jitter.
     PADDED_BOXES: false}
"""


@entry(SEM_SEG_HEADS_REGISTRY, "PD2MaskDINOEncoder", upstream="MaskDINOEncoder")
class MaskDINOEncoder(MSDeformAttnPixelDecoder):
    """Mask2Former's pixel decoder with coarser maps besides, of which the transformer decoder gets all (section 3)."""

    config_node = "MaskDINO"

    def __init__(self, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> None:
        head, path = cfg.MODEL.SEM_SEG_HEAD, "MODEL.SEM_SEG_HEAD"
        order, total = head.FEATURE_ORDER, head.TOTAL_NUM_FEATURE_LEVELS
        expect(order in _FINEST_FIRST, f"{path}.FEATURE_ORDER", order, f"one of {list(_FINEST_FIRST)}")
        encoded = list(head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES)
        enough = (
            f"{len(encoded)} or more, as many as DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES {encoded} and the coarser "
            "maps besides"
        )
        expect(total >= len(encoded), f"{path}.TOTAL_NUM_FEATURE_LEVELS", total, enough)
        super().__init__(cfg, input_shape, total, total - len(encoded), _FINEST_FIRST[order], least_pyramid_levels=1)


@entry(SEM_SEG_HEADS_REGISTRY, "PD2MaskDINOHead", upstream="MaskDINOHead")
class MaskDINOHead(MaskFormerHead):
    """Pixel decoder, then transformer decoder, which takes ``targets`` too and gets all of the encoder's maps."""

    config_node = "MaskDINO"


@entry(META_ARCH_REGISTRY, "PD2MaskDINO", upstream="MaskDINO", keys=KEYS)
class MaskDINO(MaskClassifier):
    """Mask DINO: see :class:`MaskClassifier`.

    ``softmax_classes``: classes compete and the last one is no-object; else each has a sigmoid. ``temperature``: of a
    softmax over these sigmoids, which sharpens semantic and panoptic results, or None.
    """

    config_node = "MaskDINO"
    by_class_in_training = (_LABELS,)  # has a row for each class, and is not used in inference

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        dino = cfg.MODEL.MaskDINO
        if dino.PANO_BOX_LOSS:
            self.criterion.box_classes = self.known_things("PANO_BOX_LOSS")  # type: ignore[assignment]
        self.softmax_classes = softmax_classes(cfg)
        self.temperature = dino.TEST.PANO_TEMPERATURE if dino.TEST.PANO_TRANSFORM_EVAL else None
        self.mask_quality = not dino.TEST.TEST_FOUCUS_ON_BOX
        self.padded_boxes = cfg.MODEL.SEM_SEG_HEAD.PADDED_BOXES

    def predict(self, features: dict[str, Tensor], targets: list[Target] | None = None) -> dict[str, Any]:
        return self.sem_seg_head(features, targets=targets)

    def targets(self, batched_inputs: list[dict[str, Any]], batch: ImageList) -> list[Target]:
        targets = super().targets(batched_inputs, batch)
        add_boxes(targets, batched_inputs, batch, self.padded_boxes)
        return targets

    def scores(self, logits: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
        """From (Q, K), or (Q, K + 1) with ``softmax_classes``."""
        sigmoids = sharpened = logits.sigmoid()
        if self.temperature is not None:  # for results where classes compete
            sharpened = (sigmoids / self.temperature).softmax(-1)
        panoptic = *sharpened.max(-1), sigmoids.amax(-1) > self.object_mask_threshold
        if not self.softmax_classes:
            return sharpened, panoptic, sigmoids
        softmax = logits.softmax(-1)[:, :-1]
        return softmax, panoptic, softmax

    def boxes(self, prediction: dict[str, Tensor], instances: Instances, chosen: Tensor, canvas: Canvas) -> Tensor:
        """As predicted, not clipped: relative to the padded image, of which the output is the part without padding."""
        sizes = zip(canvas.padded, canvas.image, canvas.output, strict=True)
        height, width = (padded / image * output for padded, image, output in sizes)
        boxes = to_corners(prediction["pred_boxes"].float()[chosen])
        return boxes * boxes.new_tensor([width, height, width, height])

    def upgrade_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole model's state dict, whose label embeddings are dealt out to as many classes as this model has.

        Denoising tells classes apart by these; the decoder has learned to read them, so another's serve better than
        random ones, which a run that trains few parameters would keep. Past the last one they begin again.
        """
        state = dict(state)
        stored, wanted = state.get(_LABELS), self.get_parameter(_LABELS)
        if stored is not None and len(stored) and len(stored) != len(wanted) and stored.shape[1:] == wanted.shape[1:]:
            _logger.info("%s: the embeddings of %d classes serve %d others.", _LABELS, len(stored), len(wanted))
            state[_LABELS] = stored[torch.arange(len(wanted)) % len(stored)]
        return state

    def make_criterion(self, cfg: CfgNode, num_classes: int) -> BoxMaskCriterion:
        """From ``MODEL.MaskDINO``; losses and matching costs have weights of their own."""
        dino = cfg.MODEL.MaskDINO
        costs = {f"cost_{name}": dino[f"COST_{name.upper()}_WEIGHT"] for name in ("class", "mask", "dice", "giou")}
        return BoxMaskCriterion(
            num_classes=num_classes,
            matcher=BoxMaskMatcher(**costs, cost_box=dino.COST_BOX_WEIGHT, num_points=dino.TRAIN_NUM_POINTS),
            weight_dict=loss_weights(dino),
            softmax_classes=softmax_classes(cfg),
            no_object_weight=dino.NO_OBJECT_WEIGHT,
            points=(dino.TRAIN_NUM_POINTS, dino.OVERSAMPLE_RATIO, dino.IMPORTANCE_SAMPLE_RATIO),
        )


def add_boxes(targets: list[Target], inputs: list[dict[str, Any]], images: ImageList, of_padded: bool) -> None:
    """Set the targets' boxes, in place: ``gt_boxes`` where the inputs have them, else those around the masks.

    They are relative to the padded batch, as masks are; without ``of_padded`` to each image's own size, as published.
    """
    for target, item, size in zip(targets, inputs, images.image_sizes, strict=True):
        instances = item.get("instances")
        if instances is not None and instances.has("gt_boxes"):
            corners, size = instances.gt_boxes.tensor.to(target.labels.device), instances.image_size
        else:
            corners = mask_boxes(target.masks > 0)
        height, width = images.tensor.shape[-2:] if of_padded else size
        target.boxes = to_centres(corners.float()) / corners.new_tensor([width, height, width, height])


def loss_weights(dino: CfgNode) -> dict[str, float]:
    """Names and weights of all losses that ``MODEL.MaskDINO`` asks for."""
    masks = {"loss_ce": dino.CLASS_WEIGHT, "loss_mask": dino.MASK_WEIGHT, "loss_dice": dino.DICE_WEIGHT}
    boxes = {"loss_bbox": dino.BOX_WEIGHT, "loss_giou": dino.GIOU_WEIGHT}
    matched = {**masks, **boxes} if dino.BOX_LOSS else masks
    restored = {"no": {}, "standard": {"loss_ce": dino.CLASS_WEIGHT, **boxes}, "seg": {**masks, **boxes}}[dino.DN]
    weights = dict(matched)
    weights.update({f"{name}_dn": weight for name, weight in restored.items()})
    if dino.TWO_STAGE:
        weights.update({f"{name}_interm": weight for name, weight in matched.items()})
    if dino.DEEP_SUPERVISION:
        layers = range(dino.DEC_LAYERS if dino.INITIAL_PRED else dino.DEC_LAYERS - 1)
        weights.update({f"{name}_{i}": weight for i in layers for name, weight in matched.items()})
        # Without two stages the first prediction is not denoised, as published.
        denoised = layers if dino.TWO_STAGE else layers[1:]
        weights.update({f"{name}_dn_{i}": weight for i in denoised for name, weight in restored.items()})
    return weights
