"""Mask2Former for instance, panoptic and semantic segmentation (Cheng et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import Backbone, build_backbone, build_sem_seg_head
from detectron2.structures import ImageList
from torch import Tensor, nn

from peft_d2.models.criterion import SetCriterion
from peft_d2.models.matcher import HungarianMatcher
from peft_d2.models.old_keys import upgrade_head
from peft_d2.models.postprocess import Canvas, instance_inference, panoptic_inference, semantic_inference
from peft_d2.models.targets import prepare_targets


class MaskFormer(nn.Module):
    """Backbone, head, and the losses or the inference that the config asks for.

    Args:
        backbone: its maps go to the head.
        sem_seg_head: gives ``pred_logits``, ``pred_masks`` and ``aux_outputs``.
        criterion: the losses and their weights (``weight_dict``).
        metadata: of the data set; panoptic inference takes the thing classes from it.
        size_divisibility: batches are padded to a multiple of it; negative takes the backbone's.
        pixel_mean, pixel_std: of the input's channels.
        semantic_on, instance_on, panoptic_on: which results inference gives.
        object_mask_threshold, overlap_threshold: see :func:`peft_d2.models.postprocess.panoptic_inference`.
        resize_semantic_last: see :func:`peft_d2.models.postprocess.semantic_inference`.
        top_k: instances per image.
        instance_boxes: compute boxes from masks; the published code leaves them zero.
    """

    criterion: SetCriterion
    sem_seg_head: Any  # ours, or one registered by someone else
    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        criterion: SetCriterion,
        metadata: Any,
        size_divisibility: int,
        pixel_mean: list[float],
        pixel_std: list[float],
        semantic_on: bool,
        instance_on: bool,
        panoptic_on: bool,
        object_mask_threshold: float,
        overlap_threshold: float,
        resize_semantic_last: bool,
        top_k: int,
        instance_boxes: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.criterion = criterion
        self.metadata = metadata
        self.size_divisibility = size_divisibility if size_divisibility >= 0 else backbone.size_divisibility
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.semantic_on = semantic_on
        self.instance_on = instance_on
        self.panoptic_on = panoptic_on
        self.object_mask_threshold = object_mask_threshold
        self.overlap_threshold = overlap_threshold
        self.resize_semantic_last = resize_semantic_last
        self.top_k = top_k
        self.instance_boxes = instance_boxes

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts; see the config nodes in :mod:`peft_d2.models.config`."""
        backbone = build_backbone(cfg)
        sem_seg_head = build_sem_seg_head(cfg, backbone.output_shape())
        test = cfg.MODEL.MASK_FORMER.TEST
        return {
            "backbone": backbone,
            "sem_seg_head": sem_seg_head,
            "criterion": build_criterion(cfg, sem_seg_head.num_classes),
            "metadata": MetadataCatalog.get(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else None,
            "size_divisibility": cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "semantic_on": test.SEMANTIC_ON,
            "instance_on": test.INSTANCE_ON,
            "panoptic_on": test.PANOPTIC_ON,
            "object_mask_threshold": test.OBJECT_MASK_THRESHOLD,
            "overlap_threshold": test.OVERLAP_THRESHOLD,
            # With the other two tasks on, masks are resized first for all three, as published.
            "resize_semantic_last": not (
                test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE or test.PANOPTIC_ON or test.INSTANCE_ON
            ),
            "top_k": cfg.TEST.DETECTIONS_PER_IMAGE,
            "instance_boxes": cfg.MODEL.SEM_SEG_HEAD.INSTANCE_BOXES,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is and inputs are taken to."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Losses in training, results otherwise.

        Args:
            batched_inputs: dicts with ``image`` (C, H, W), not normalised; in training ``instances`` (``gt_classes``,
                ``gt_masks``) or ``sem_seg`` (H, W); in inference ``height`` and ``width`` of the wanted output, by
                default the image's.

        Returns:
            In training the weighted losses by name. Otherwise a dict per image with ``sem_seg`` (K, H, W),
            ``panoptic_seg`` (ids (H, W), segments) and ``instances``, as far as they are on.
        """
        images = [(item["image"].to(self.device) - self.pixel_mean) / self.pixel_std for item in batched_inputs]
        batch = ImageList.from_tensors(images, self.size_divisibility)
        outputs = self.sem_seg_head(self.backbone(batch.tensor))
        if self.training:
            return self.losses(outputs, batched_inputs, batch)
        padded = (batch.tensor.shape[-2], batch.tensor.shape[-1])
        results = []
        with torch.autocast(self.device.type, enabled=False):
            rows = zip(outputs["pred_logits"], outputs["pred_masks"], batched_inputs, batch.image_sizes, strict=True)
            for class_logits, mask_logits, item, size in rows:
                wanted = (item.get("height", size[0]), item.get("width", size[1]))
                results.append(self.inference(class_logits, mask_logits, Canvas(padded, tuple(size), wanted)))
        return results

    def losses(
        self, outputs: dict[str, Any], batched_inputs: list[dict[str, Any]], batch: ImageList
    ) -> dict[str, Tensor]:
        """The weighted losses of a batch."""
        targets = prepare_targets(batched_inputs, batch, self.sem_seg_head.ignore_value)
        weights = self.criterion.weight_dict
        losses = self.criterion(outputs, targets)
        return {name: weights[name] * value for name, value in losses.items() if name in weights}

    def inference(self, class_logits: Tensor, mask_logits: Tensor, canvas: Canvas) -> dict[str, Any]:
        """Results of one image from logits (Q, K + 1) and (Q, h, w)."""
        result: dict[str, Any] = {}
        if self.semantic_on:
            result["sem_seg"] = semantic_inference(class_logits, mask_logits, canvas, self.resize_semantic_last)
        if self.panoptic_on:
            result["panoptic_seg"] = panoptic_inference(
                class_logits,
                mask_logits,
                canvas,
                self.thing_classes,
                self.object_mask_threshold,
                self.overlap_threshold,
            )
        if self.instance_on:
            things = self.thing_classes if self.panoptic_on else None
            result["instances"] = instance_inference(
                class_logits, mask_logits, canvas, self.top_k, things, self.instance_boxes
            )
        return result

    @property
    def thing_classes(self) -> set[int]:
        """Contiguous ids of the classes whose objects are told apart.

        Raises:
            ValueError: if the data set's metadata does not say.
        """
        ids = getattr(self.metadata, "thing_dataset_id_to_contiguous_id", None)
        if ids is None:
            name = getattr(self.metadata, "name", "none")
            raise ValueError(
                f"panoptic inference needs the thing classes, but data set {name!r} (DATASETS.TRAIN) has no "
                "'thing_dataset_id_to_contiguous_id' in its metadata; register it, or set "
                "MODEL.MASK_FORMER.TEST.PANOPTIC_ON to False"
            )
        return set(ids.values())

    def upgrade_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole model's state dict with the names of earlier releases replaced; ``load_state_dict`` does the same.

        A backbone that other models' checkpoints hold takes its part out of them here.
        """
        upgrade_backbone = getattr(self.backbone, "upgrade_state_dict", None)
        if upgrade_backbone is not None:
            state = upgrade_backbone(state, "backbone.")
        return upgrade_head(state, "sem_seg_head.")


def build_criterion(cfg: CfgNode, num_classes: int) -> SetCriterion:
    """Criterion and matcher from ``MODEL.MASK_FORMER``; the loss weights are the weights of the matching costs too."""
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
