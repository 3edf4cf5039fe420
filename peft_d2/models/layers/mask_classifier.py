"""Base class of the mask-classification models: from images and annotations to losses or results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_backbone, build_sem_seg_head
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from torch import Tensor, nn

from peft_d2.data.images import DatasetError, output_size
from peft_d2.models.checks import ModelConfigError, expect, expect_numbers
from peft_d2.models.layers.criterion import SetCriterion, Target
from peft_d2.models.layers.postprocess import (
    Canvas,
    instance_inference,
    panoptic_inference,
    semantic_inference,
)


class PixelModel(nn.Module):
    """A model that normalises its images by ``MODEL.PIXEL_MEAN`` and ``PIXEL_STD``."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
        one_each = f"a list as long as PIXEL_STD {std}, one for each channel"
        expect(len(mean) == len(std), "MODEL.PIXEL_MEAN", mean, one_each)
        expect(all(value > 0 for value in std), "MODEL.PIXEL_STD", std, "above 0 in each channel")
        self.input_format = cfg.INPUT.FORMAT  # as Detectron2's models say it
        self.register_buffer("pixel_mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """The model's device, to which it brings its images."""
        return self.pixel_mean.device

    def is_empty(self, batched_inputs: Any) -> bool:
        """Whether the batch is empty, which is allowed in inference only.

        Raises:
            DatasetError: it is no list of dicts with an ``image``, or an empty one to train on.
        """
        listed = isinstance(batched_inputs, list | tuple)
        if not listed or not all(isinstance(item, Mapping) and "image" in item for item in batched_inputs):
            raise DatasetError(
                f"the model takes a list of dicts with an 'image' (C, H, W), and got {type(batched_inputs).__name__}"
                f"{' of others' if listed else ''}: model([{{'image': image}}])"
            )
        if self.training and not batched_inputs:
            raise DatasetError(
                "the batch is empty: there is nothing to train on. Let the loader drop_last such batches, or skip "
                "them: of several processes in all, as the others would wait"
            )
        return not batched_inputs

    def count_objects(self, batched_inputs: list[dict[str, Any]]) -> list[int]:
        """How many targets each image has; trainers exchange it between processes and between parts of a batch.

        Targets are ``instances``, or the classes in ``sem_seg`` other than the head's ``ignore_value``.
        """
        ignored = getattr(getattr(self, "sem_seg_head", None), "ignore_value", 255)

        def count(item: Mapping[str, Any]) -> int:
            if "instances" in item:
                return len(item["instances"])
            return int((item["sem_seg"].unique() != ignored).sum()) if "sem_seg" in item else 0

        return [count(item) for item in batched_inputs]

    def normalised(self, image: Tensor, name: Any = "an image") -> Tensor:
        """``image`` (C, H, W), called ``name`` in messages; other channels would be broadcast, and are refused."""
        if not isinstance(image, Tensor):
            kind = type(image).__name__
            raise DatasetError(f"{name}: the image is a {kind}, expected a tensor (C, H, W): torch.as_tensor(image)")
        if image.dim() != 3 or len(image) != len(self.pixel_mean):
            raise DatasetError(
                f"{name}: the image is {tuple(image.shape)}, but the model takes {len(self.pixel_mean)} channels "
                "(C, H, W): as many as MODEL.PIXEL_MEAN and PIXEL_STD have. Set these and INPUT.FORMAT to fit"
            )
        # Looked at where that is free: not on a GPU, in a graph that is recorded, or in training, whose losses tell.
        eager = type(image) is Tensor and image.device.type == "cpu" and not torch.compiler.is_compiling()
        looked_at = eager and not (self.training or torch.jit.is_tracing()) and image.is_floating_point()
        if image.is_meta and self.device.type != "meta":
            raise DatasetError(f"{name}: the image is on the meta device and has no values: give it on the CPU")
        what = "empty" if not image.numel() else "bool" if image.dtype == torch.bool else ""
        if not what and looked_at and not image.sum(dtype=torch.float64).isfinite():
            what = "NaN or infinite in part"
        if what:
            raise DatasetError(f"{name}: the image {tuple(image.shape)} is {what}, expected pixels from 0 to 255")
        # In float32 and above; a model in half precision or float64 takes images as such.
        mean, std = (
            value.to(torch.promote_types(value.dtype, torch.float32)) for value in (self.pixel_mean, self.pixel_std)
        )
        return ((image.to(self.device) - mean) / std).to(self.pixel_mean.dtype)


class MaskClassifier(PixelModel):
    """Backbone, head, and the losses or the inference that the config asks for.

    A model derives from it: ``config_node`` is the name of its node below ``MODEL``, ``make_criterion`` makes its
    losses, ``scores`` and ``boxes`` read its predictions. ``metadata``, of the training set, says which are things.
    """

    config_node: str
    mask_quality = True  # the mask's mean probability is a factor of an instance's score
    bicubic_results = False  # see :class:`peft_d2.models.layers.postprocess.Canvas`
    per_image_outputs = ("sem_seg_head", "sem_seg_head.predictor")  # read image by image: they may be lists by image
    sem_seg_head: Any  # ours, or one registered by someone else

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        node, path = cfg.MODEL[self.config_node], f"MODEL.{self.config_node}"
        expect_numbers(path, node, TRAIN_NUM_POINTS=1, OVERSAMPLE_RATIO=1.0, IMPORTANCE_SAMPLE_RATIO=(0, 1))
        self.backbone: Any = build_backbone(cfg)
        self.sem_seg_head = build_sem_seg_head(cfg, self.backbone.output_shape())
        expected = "a head that classifies masks, such as 'PD2MaskFormerHead' or 'PD2MaskDINOHead'"
        expect(
            hasattr(self.sem_seg_head, "num_classes"), "MODEL.SEM_SEG_HEAD.NAME", cfg.MODEL.SEM_SEG_HEAD.NAME, expected
        )
        self.criterion = self.make_criterion(cfg, self.sem_seg_head.num_classes)
        self.metadata: Any = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else None
        divisibility = node.SIZE_DIVISIBILITY
        self.size_divisibility = divisibility if divisibility >= 0 else self.backbone.size_divisibility
        test = node.TEST
        self.semantic_on, self.instance_on, self.panoptic_on = test.SEMANTIC_ON, test.INSTANCE_ON, test.PANOPTIC_ON
        self.object_mask_threshold, self.overlap_threshold = test.OBJECT_MASK_THRESHOLD, test.OVERLAP_THRESHOLD
        # With the other two tasks on, masks are resized first for all three, as published.
        self.resize_semantic_last = not (
            test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE or test.PANOPTIC_ON or test.INSTANCE_ON
        )
        expect_numbers("TEST", cfg.TEST, DETECTIONS_PER_IMAGE=0)  # -1, "all", is of Detectron2's detectors
        self.top_k = cfg.TEST.DETECTIONS_PER_IMAGE

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """The weighted losses by name in training, otherwise the results that are on, a dict per image.

        Args:
            batched_inputs: dicts with ``image`` (C, H, W), not normalised; in training ``instances`` (``gt_classes``,
                ``gt_masks``) or ``sem_seg`` (H, W); in inference ``height`` and ``width`` of the wanted output, by
                default the image's.

        Returns:
            Results are ``sem_seg`` (K, H, W), ``panoptic_seg`` (ids (H, W), segments) and ``instances``.
        """
        if self.is_empty(batched_inputs):
            return []
        batch = self.to_batch(batched_inputs)
        features = self.backbone(batch.tensor)
        if self.training:
            targets = self.targets(batched_inputs, batch)
            weights = self.criterion.weight_dict
            objects = batched_inputs[0].get("batch_objects")
            losses = self.criterion(self.predict(features, targets), targets, objects)
            return {name: weights[name] * value for name, value in losses.items() if name in weights}
        outputs = self.predict(features)
        padded = (batch.tensor.shape[-2], batch.tensor.shape[-1])
        results = []
        with torch.autocast(self.device.type, enabled=False):
            for i, (item, size) in enumerate(zip(batched_inputs, batch.image_sizes, strict=True)):
                wanted = output_size(item, size)
                prediction = {name: value[i] for name, value in outputs.items() if name.startswith("pred_")}
                results.append(self.inference(prediction, Canvas(padded, tuple(size), wanted, self.bicubic_results)))
        return results

    def to_batch(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """The images, normalised, then padded with zeros to one size."""
        images = [self.normalised(item["image"], item.get("file_name", "an image")) for item in batched_inputs]
        return ImageList.from_tensors(images, self.size_divisibility)

    def predict(self, features: dict[str, Tensor], targets: list[Target] | None = None) -> dict[str, Any]:
        """What the head predicts; ``targets`` in training."""
        return self.sem_seg_head(features)

    def targets(self, batched_inputs: list[dict[str, Any]], batch: ImageList) -> list[Target]:
        """What each image of the padded ``batch`` holds, as the criterion takes it."""
        return prepare_targets(batched_inputs, batch, self.sem_seg_head.ignore_value, self.sem_seg_head.num_classes)

    def inference(self, prediction: dict[str, Tensor], canvas: Canvas) -> dict[str, Any]:
        """Results of one image from its ``pred_logits`` (Q, ...), ``pred_masks`` (Q, h, w) and more."""
        mask_logits = prediction["pred_masks"]
        result: dict[str, Any] = {}
        semantic, (scores, classes, keep), instance = self.scores(prediction["pred_logits"].float())
        if self.semantic_on:
            result["sem_seg"] = semantic_inference(semantic, mask_logits, canvas, self.resize_semantic_last)
        things = self.known_things() if self.panoptic_on else None
        if things is not None:
            queries = scores[keep], classes[keep], mask_logits[keep]
            result["panoptic_seg"] = panoptic_inference(*queries, canvas, things, self.overlap_threshold)
        if self.instance_on:
            found, chosen = instance_inference(instance, mask_logits, canvas, self.top_k, things, self.mask_quality)
            found.pred_boxes = Boxes(self.boxes(prediction, found, chosen, canvas))
            result["instances"] = found
        return result

    def scores(self, logits: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
        """The scores for semantic, panoptic and instance results, in this order.

        Semantic and instance results take probabilities (Q, K) each; panoptic ones a score (Q,) and a class (Q,) per
        query, and whether it competes (Q,).
        """
        raise NotImplementedError

    def boxes(self, prediction: dict[str, Tensor], instances: Instances, chosen: Tensor, canvas: Canvas) -> Tensor:
        """Corners (M, 4) of instances, which the queries ``chosen`` (M,) predict."""
        raise NotImplementedError

    def make_criterion(self, cfg: CfgNode, num_classes: int) -> SetCriterion:
        """The losses, from the model's config node."""
        raise NotImplementedError

    @property
    def thing_classes(self) -> set[int] | None:
        """Contiguous ids of the classes whose objects are told apart; None where the data set's metadata has none."""
        ids = getattr(self.metadata, "thing_dataset_id_to_contiguous_id", None)
        return None if ids is None else set(ids.values())

    def known_things(self, key: str = "TEST.PANOPTIC_ON") -> set[int]:
        """``thing_classes``; if they are unknown, a :class:`ModelConfigError` about ``key``, which needs them."""
        things = self.thing_classes
        if things is None:
            raise ModelConfigError(
                f"MODEL.{self.config_node}.{key} needs the thing classes, but data set "
                f"{getattr(self.metadata, 'name', 'none')!r} (DATASETS.TRAIN) has no "
                "'thing_dataset_id_to_contiguous_id' in its metadata; register it, or set the key to False"
            )
        return things


def bitmaps(masks: Any, height: int, width: int) -> Tensor:
    """Masks (T, H, W) from bit masks, polygons or a tensor; an instance that a crop left without polygons is empty."""
    if isinstance(masks, PolygonMasks):
        found = np.zeros((len(masks), height, width), bool)
        for bitmap, polygons in zip(found, masks.polygons, strict=True):
            bitmap[:] = polygons_to_bitmask(polygons, height, width) if len(polygons) else False
        return torch.from_numpy(found)
    tensor = masks.tensor if isinstance(masks, BitMasks) else masks
    if not isinstance(tensor, Tensor):
        raise TypeError(f"gt_masks is {type(masks).__name__}; expected BitMasks, PolygonMasks or a tensor (T, H, W)")
    return tensor


def object_masks(item: Mapping[str, Any], height: int, width: int) -> Tensor:
    """Masks (T, H, W) of a mapped dict's ``instances``, which may lack ``gt_masks`` if there are no objects."""
    instances = item["instances"]
    if not len(instances):
        return torch.zeros(0, height, width)
    if not instances.has("gt_masks"):
        raise ModelConfigError(
            f"training input {item.get('file_name', '')!r} has objects without masks (gt_masks), which this "
            "model is trained on. Detectron2's own mapper gives them with MODEL.MASK_ON True"
        )
    return bitmaps(instances.gt_masks, height, width)


def prepare_targets(
    inputs: list[dict[str, Any]], images: ImageList, ignore_value: int, num_classes: int | None = None
) -> list[Target]:
    """Targets of a batch, with float32 masks zero-padded to the size of ``images``.

    Inputs are mapped dicts with ``instances`` (``gt_classes``, and ``gt_masks`` unless there are none) or, without it,
    ``sem_seg`` (H, W) of class ids: one mask per class other than ``ignore_value``, as in MaskFormer.

    Raises:
        DatasetError: a class is not below ``num_classes``. On a GPU it is not looked at, which would wait for it.
    """
    device, (height, width) = images.tensor.device, images.tensor.shape[-2:]
    targets = []
    for item, size in zip(inputs, images.image_sizes, strict=True):
        if "instances" in item:
            labels, masks = item["instances"].gt_classes, object_masks(item, *size)
        elif "sem_seg" in item:
            classes = item["sem_seg"].unique()
            labels = classes[classes != ignore_value]
            masks = item["sem_seg"][None] == labels[:, None, None]
        else:
            raise KeyError(
                f"training input {item.get('file_name', '')!r} has neither 'instances' nor 'sem_seg'; "
                "the dataset mapper has to keep its annotations"
            )
        if num_classes is not None and labels.device.type in ("cpu", "meta") and device.type != "meta":
            _refuse_other_classes(item, labels, num_classes)
        padded = torch.zeros(len(labels), height, width, device=device)
        padded[:, : masks.shape[-2], : masks.shape[-1]] = masks.to(device)
        targets.append(Target(labels.to(device).long(), padded))
    return targets


def _refuse_other_classes(item: Mapping[str, Any], labels: Tensor, count: int) -> None:
    source = f"{item.get('file_name', 'an image')}: {'gt_classes' if 'instances' in item else 'sem_seg'}"
    if labels.is_meta:
        raise DatasetError(f"{source} is on the meta device and has no values: give it on the CPU")
    if not (wrong := [label for label in labels.unique().tolist() if not 0 <= label < count]):
        return
    raise DatasetError(
        f"{source} holds the class "
        f"{wrong[0]}, but the model has {count}, 0 to {count - 1}: set MODEL.SEM_SEG_HEAD.NUM_CLASSES, or number the "
        "classes from 0 on as Detectron2's loaders do (of semantic labels without a class, IGNORE_VALUE)"
    )
