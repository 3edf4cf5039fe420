"""Mask DINO for instance, panoptic and semantic segmentation, with boxes (Li et al., CVPR 2023)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from peft_d2.models.checks import ModelConfigError
from peft_d2.models.layers.boxes import to_corners
from peft_d2.models.layers.mask_classifier import MaskClassifier
from peft_d2.models.layers.matcher import BoxMaskMatcher
from peft_d2.models.layers.postprocess import Canvas, class_maps, paint_segments, ranked_instances
from peft_d2.models.layers.targets import Target, add_boxes
from peft_d2.models.mask2former.head import MaskFormerHead
from peft_d2.models.mask_dino.criterion import BoxMaskCriterion
from peft_d2.models.mask_dino.transformer_decoder import softmax_classes

_LABELS = "sem_seg_head.predictor.label_enc.weight"
logger = logging.getLogger(__name__)


class MaskDINOHead(MaskFormerHead):
    """Pixel decoder, then transformer decoder, which takes the targets too and gets all of the encoder's maps."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Build both parts from their names in the config."""
        return cls.parts(cfg, input_shape, cfg.MODEL.MaskDINO.TRANSFORMER_DECODER_NAME)

    def forward(
        self, features: dict[str, Tensor], mask: Tensor | None = None, targets: list[Target] | None = None
    ) -> dict[str, Any]:
        """The backbone's maps by name -> the predictor's outputs."""
        mask_features, _, multi_scale_features = self.pixel_decoder.forward_features(features)
        return self.predictor(multi_scale_features, mask_features, mask, targets=targets)


class MaskDINO(MaskClassifier):
    """Mask DINO: see :class:`MaskClassifier`.

    Args:
        softmax_classes: classes compete and the last one is no-object; otherwise each has a sigmoid of its own.
        temperature: of a softmax over the classes' sigmoids, which sharpens semantic and panoptic results; None uses
            the sigmoids as they are.
        focus_on_box: an instance's score is its class's alone, without the quality of its mask.
        padded_boxes: see :func:`peft_d2.models.layers.targets.add_boxes`.
        parts: of :class:`MaskClassifier`.
    """

    config_node = "MaskDINO"

    @configurable
    def __init__(
        self, *, softmax_classes: bool, temperature: float | None, focus_on_box: bool, padded_boxes: bool, **parts: Any
    ) -> None:
        super().__init__(**parts)
        self.softmax_classes = softmax_classes
        self.temperature = temperature
        self.focus_on_box = focus_on_box
        self.padded_boxes = padded_boxes

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts; see the config nodes in :mod:`peft_d2.models.config`."""
        test = cfg.MODEL.MaskDINO.TEST
        parts = super().from_config(cfg)
        if cfg.MODEL.MaskDINO.PANO_BOX_LOSS:
            parts["criterion"].box_classes = _thing_classes(parts["metadata"])
        return {
            **parts,
            "softmax_classes": softmax_classes(cfg),
            "temperature": test.PANO_TEMPERATURE if test.PANO_TRANSFORM_EVAL else None,
            "focus_on_box": test.TEST_FOUCUS_ON_BOX,
            "padded_boxes": cfg.MODEL.SEM_SEG_HEAD.PADDED_BOXES,
        }

    def predict(self, features: dict[str, Tensor], targets: list[Target] | None = None) -> dict[str, Any]:
        """What the head predicts; ``targets`` in training."""
        return self.sem_seg_head(features, targets=targets)

    def targets(self, batched_inputs: list[dict[str, Any]], batch: ImageList) -> list[Target]:
        """The ground truth of a batch, with boxes."""
        targets = super().targets(batched_inputs, batch)
        add_boxes(targets, batched_inputs, batch, self.padded_boxes)
        return targets

    def inference(self, prediction: dict[str, Tensor], canvas: Canvas) -> dict[str, Any]:
        """Results of one image from ``pred_logits`` (Q, K), ``pred_masks`` (Q, h, w) and ``pred_boxes`` (Q, 4)."""
        class_logits, mask_logits = prediction["pred_logits"].float(), prediction["pred_masks"]
        result: dict[str, Any] = {}
        if self.semantic_on:
            probability = class_logits.softmax(-1)[:, :-1] if self.softmax_classes else self.sharpened(class_logits)
            result["sem_seg"] = class_maps(probability, mask_logits, canvas, self.resize_semantic_last)
        if self.panoptic_on:
            result["panoptic_seg"] = self.panoptic(class_logits, mask_logits, canvas)
        if self.instance_on:
            result["instances"] = self.instances(class_logits, mask_logits, prediction["pred_boxes"].float(), canvas)
        return result

    def sharpened(self, class_logits: Tensor) -> Tensor:
        """Class probabilities (Q, K) for results where classes compete."""
        probability = class_logits.sigmoid()
        return probability if self.temperature is None else (probability / self.temperature).softmax(-1)

    def panoptic(self, class_logits: Tensor, mask_logits: Tensor, canvas: Canvas) -> tuple[Tensor, list[dict]]:
        """As :func:`peft_d2.models.layers.postprocess.panoptic_inference`; the threshold is that of the sigmoids."""
        keep = class_logits.sigmoid().amax(-1) > self.object_mask_threshold
        scores, classes = self.sharpened(class_logits[keep]).max(-1)
        return paint_segments(scores, classes, mask_logits[keep], canvas, self.known_things(), self.overlap_threshold)

    def instances(self, class_logits: Tensor, mask_logits: Tensor, boxes: Tensor, canvas: Canvas) -> Instances:
        """As :func:`~peft_d2.models.layers.postprocess.instance_inference`, with the predicted boxes, not clipped."""
        things = self.known_things() if self.panoptic_on else None
        probability = class_logits.softmax(-1)[:, :-1] if self.softmax_classes else class_logits.sigmoid()
        result, queries = ranked_instances(
            probability, mask_logits, canvas, self.top_k, things, mask_quality=not self.focus_on_box
        )
        # Boxes are relative to the padded image, the output is its part without padding.
        height, width = (
            padded / image * output
            for padded, image, output in zip(canvas.padded, canvas.image, canvas.output, strict=True)
        )
        result.pred_boxes = Boxes(to_corners(boxes[queries]) * boxes.new_tensor([width, height, width, height]))
        return result

    def upgrade_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole model's state dict, whose label embeddings are dealt out to as many classes as this model has.

        Denoising tells classes apart by these; the decoder has learned to read them, so another's serve better than
        random ones, which a run that trains few parameters would keep. Past the last one they begin again.
        """
        state = dict(state)
        found, wanted = state.get(_LABELS), self.get_parameter(_LABELS)
        if found is not None and len(found) and len(found) != len(wanted) and found.shape[1:] == wanted.shape[1:]:
            logger.info("%s: the embeddings of %d classes serve %d others.", _LABELS, len(found), len(wanted))
            state[_LABELS] = found[torch.arange(len(wanted)) % len(found)]
        return state

    @classmethod
    def make_criterion(cls, cfg: CfgNode, num_classes: int) -> BoxMaskCriterion:
        """From ``MODEL.MaskDINO``; losses and matching costs have weights of their own."""
        dino = cfg.MODEL.MaskDINO
        matcher = BoxMaskMatcher(
            cost_class=dino.COST_CLASS_WEIGHT,
            cost_mask=dino.COST_MASK_WEIGHT,
            cost_dice=dino.COST_DICE_WEIGHT,
            cost_box=dino.COST_BOX_WEIGHT,
            cost_giou=dino.COST_GIOU_WEIGHT,
            num_points=dino.TRAIN_NUM_POINTS,
        )
        return BoxMaskCriterion(
            num_classes=num_classes,
            matcher=matcher,
            weight_dict=loss_weights(dino),
            softmax_classes=softmax_classes(cfg),
            no_object_weight=dino.NO_OBJECT_WEIGHT,
            num_points=dino.TRAIN_NUM_POINTS,
            oversample_ratio=dino.OVERSAMPLE_RATIO,
            importance_sample_ratio=dino.IMPORTANCE_SAMPLE_RATIO,
        )


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


def _thing_classes(metadata: Any) -> set[int]:
    ids = getattr(metadata, "thing_dataset_id_to_contiguous_id", None)
    if ids is None:
        raise ModelConfigError(
            f"MODEL.MaskDINO.PANO_BOX_LOSS needs the thing classes, but data set {getattr(metadata, 'name', 'none')!r} "
            "(DATASETS.TRAIN) has no 'thing_dataset_id_to_contiguous_id' in its metadata; register it, or set it False"
        )
    return set(ids.values())
