"""Mask DINO for instance, panoptic and semantic segmentation, with boxes (Li et al., CVPR 2023): model and losses.

The losses are of classes, masks and boxes of matched queries, and the same of denoising queries (section 3.4).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from peft_d2.models.checks import expect
from peft_d2.models.layers.boxes import generalized_iou, mask_boxes, to_centres, to_corners
from peft_d2.models.layers.criterion import (
    Counts,
    HungarianMatcher,
    Matched,
    SetCriterion,
    Target,
    average_count,
    pair_up,
)
from peft_d2.models.layers.mask_classifier import MaskClassifier
from peft_d2.models.layers.postprocess import Canvas
from peft_d2.models.mask2former.model import MaskFormerHead, MSDeformAttnPixelDecoder
from peft_d2.models.mask_dino.transformer_decoder import DenoisingQueries, softmax_classes
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
    """Mask2Former's pixel decoder with further, coarser maps; the transformer decoder gets all maps (section 3)."""

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
    """Pixel decoder, then transformer decoder, which gets all of the encoder's maps, and ``targets``."""

    config_node = "MaskDINO"


class BoxMaskMatcher(HungarianMatcher):
    """Also matches by boxes (L1 distance, generalised IoU); its class cost is of sigmoids, like the focal loss.

    Predictions have ``pred_boxes`` (N, Q, 4) too. ``options``: see :class:`HungarianMatcher`.
    """

    def __init__(self, *, cost_box: float, cost_giou: float, **options: Any) -> None:
        super().__init__(**options)
        self.cost_box, self.cost_giou = cost_box, cost_giou

    def costs(self, predictions: Sequence[dict[str, Any]], image: int, target: Target) -> Tensor:
        boxes = torch.stack([p["pred_boxes"][image] for p in predictions]).float()[..., None, :]
        wanted = target.centre_boxes()
        return (
            super().costs(predictions, image, target)
            + self.cost_box * (boxes - wanted).abs().sum(-1)
            - self.cost_giou * generalized_iou(to_corners(boxes), to_corners(wanted))
        )

    def class_cost(self, logits: Tensor) -> Tensor:
        """Focal loss as a positive minus focal loss as a negative (Deformable DETR): alpha 0.25, gamma 2."""
        probability = logits.sigmoid()
        positive = -0.25 * (1 - probability) ** 2 * (probability + 1e-8).log()
        negative = -0.75 * probability**2 * (1 - probability + 1e-8).log()
        return positive - negative


class BoxMaskCriterion(SetCriterion):
    """:class:`SetCriterion` with boxes, focal class loss, the encoder's own predictions, and denoising.

    Predictions have ``pred_boxes`` (N, Q, 4) too, and targets boxes. ``interm_outputs`` is the encoder's prediction,
    whose losses end in ``_interm``; ``denoising`` the denoising queries and their predictions by layer, None where
    there is nothing to restore: ``_dn`` or, of the layers before the last, ``_dn_0`` and so on. ``softmax_classes`` has
    a cross-entropy with a no-object class in place of the focal loss; only ``box_classes``, or all, have box losses.
    """

    def __init__(self, *, softmax_classes: bool, box_classes: Collection[int] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.softmax_classes = softmax_classes
        self.box_classes = box_classes

    def matched_losses(self, outputs: dict, targets: Sequence[Target], objects: Counts) -> dict[str, Tensor]:
        """The losses of :class:`SetCriterion` and those of denoising, which are 0 if nothing was restored."""
        losses = super().matched_losses(outputs, targets, objects)
        if outputs.get("denoising") is not None:
            queries, predictions = outputs["denoising"]
            return losses | self.denoising_losses(queries, predictions, targets, average_count(objects))
        zero = outputs["pred_logits"].sum() * 0.0  # every worker has the same losses, whatever its images hold
        return losses | {name: zero for name in self.weight_dict if "_dn" in name}

    def supervised(self, outputs: dict) -> dict[str, dict[str, Any]]:
        wanted = super().supervised(outputs)
        if "interm_outputs" in outputs and "loss_ce_interm" in self.weight_dict:
            wanted["_interm"] = outputs["interm_outputs"]
        return wanted

    def denoising_losses(
        self, queries: DenoisingQueries, predictions: Sequence[dict], targets: Sequence[Target], count: float
    ) -> dict[str, Tensor]:
        """The losses of denoising queries, each of which knows its target; averaged over the groups.

        A cross-entropy of classes is divided by the weights of this worker alone: others may have no denoising
        queries, so nothing can be exchanged. The other losses are divided by ``count`` as in :meth:`layer_losses`.
        """
        matched = pair_up(targets, queries.matches(targets))
        suffixes = ["_dn", *(f"_dn_{i}" for i in range(len(predictions) - 1))]
        losses = {}
        for suffix, prediction in zip(suffixes, [predictions[-1], *predictions[:-1]], strict=True):
            if f"loss_ce{suffix}" in self.weight_dict:
                masks = f"loss_mask{suffix}" in self.weight_dict
                values = self.layer_losses(prediction, matched, count * queries.groups, None, masks)
                losses.update({name + suffix: value for name, value in values.items()})
        return losses

    def layer_losses(
        self, prediction: dict[str, Any], matched: Sequence[Matched], count: float, objects: Counts | None, masks: bool
    ) -> dict[str, Tensor]:
        """The losses of :class:`SetCriterion` and those of boxes; ``count`` divides the focal loss, too."""
        losses = super().layer_losses(prediction, matched, count, objects, masks)
        losses.update(self.box_losses(prediction["pred_boxes"].float(), matched, count))
        if not self.softmax_classes:
            losses["loss_ce"] = losses["loss_ce"] / count
        return losses

    def class_loss(self, logits: Tensor, matched: Sequence[Matched], objects: Counts | None) -> Tensor:
        """Summed focal loss (Lin et al., RetinaNet, ICCV 2017, equation 5), or the cross-entropy of the base class."""
        if self.softmax_classes:
            return super().class_loss(logits, matched, objects)
        wanted = F.one_hot(self.wanted_labels(logits, matched), self.num_classes + 1)[..., :-1]
        return sigmoid_focal_loss(logits, wanted.to(logits.dtype), alpha=0.25, gamma=2, reduction="sum")

    def box_losses(self, boxes: Tensor, matched: Sequence[Matched], count: float) -> dict[str, Tensor]:
        """L1 distance and 1 - generalised IoU of matched boxes, summed over them, divided by ``count``."""
        predicted = torch.cat([b[queries] for b, (_, queries, _) in zip(boxes, matched, strict=True)])
        wanted = torch.cat([target.centre_boxes()[objects] for target, _, objects in matched])
        if self.box_classes is not None:
            labels = torch.cat([target.labels[objects] for target, _, objects in matched])
            keep = torch.isin(labels, labels.new_tensor(sorted(self.box_classes)))
            predicted, wanted = predicted[keep], wanted[keep]
        overlap = generalized_iou(to_corners(predicted), to_corners(wanted))
        return {"loss_bbox": (predicted - wanted).abs().sum() / count, "loss_giou": (1 - overlap).sum() / count}


@entry(META_ARCH_REGISTRY, "PD2MaskDINO", upstream="MaskDINO", keys=KEYS)
class MaskDINO(MaskClassifier):
    """Mask DINO: see :class:`MaskClassifier`.

    ``softmax_classes``: a softmax over classes, the last of which is no-object, instead of a sigmoid for each.
    ``temperature``: that of a softmax over the sigmoids, which sharpens semantic and panoptic results, or None.
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
        """The scores of logits (Q, K), or (Q, K + 1) with ``softmax_classes``."""
        sigmoids = sharpened = logits.sigmoid()
        if self.temperature is not None:  # for results where classes compete
            sharpened = (sigmoids / self.temperature).softmax(-1)
        panoptic = *sharpened.max(-1), sigmoids.amax(-1) > self.object_mask_threshold
        if not self.softmax_classes:
            return sharpened, panoptic, sigmoids
        softmax = logits.softmax(-1)[:, :-1]
        return softmax, panoptic, softmax

    def boxes(self, prediction: dict[str, Tensor], instances: Instances, chosen: Tensor, canvas: Canvas) -> Tensor:
        """The predicted boxes, not clipped, from shares of the padded image to pixels of the output."""
        sizes = zip(canvas.padded, canvas.image, canvas.output, strict=True)
        height, width = (padded / image * output for padded, image, output in sizes)
        boxes = to_corners(prediction["pred_boxes"].float()[chosen])
        return boxes * boxes.new_tensor([width, height, width, height])

    def upgrade_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole model's state dict with its label embeddings repeated or cut to this model's number of classes.

        By these, denoising tells classes apart. The decoder has learned to read them, so those of other classes are a
        better start than random ones, which a run that trains few parameters would keep.
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
    """Set the targets' boxes, in place: the inputs' ``gt_boxes``, or if they have none, the boxes around the masks.

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
