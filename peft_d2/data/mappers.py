"""From one dataset dict to what a model trains on, under the names of the published configs.

Samples of the mask mappers: ``image`` (3, H, W) uint8, ``instances`` with ``gt_classes`` (N,), ``gt_boxes`` (N, 4)
and ``gt_masks`` (N, H, W) bool tensor (``BitMasks`` in Detectron2's own format). Objects that a crop cut away
are left out; an image may be left without any.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper, MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, Instances
from torch.nn import functional as F

from peft_d2.compat import accept_empty_polygons
from peft_d2.data.augmentation import (
    detectron2_recipe,
    keep_a_pixel,
    large_scale_jitter_recipe,
    longest_side_recipe,
    resize_recipe,
)
from peft_d2.data.config import base_architecture
from peft_d2.data.images import DatasetError, image_size, read_image
from peft_d2.data.labels import read_labels
from peft_d2.data.prompts import Detections, prompt_detections, prompted_objects, widened
from peft_d2.data.segmentation import panoptic_ids, segmentation_to_mask

MAPPERS = {  # what each needs in the data set's records
    "mask_former_instance": "annotations",
    "mask_former_panoptic": "pan_seg_file_name",
    "mask_former_semantic": "sem_seg_file_name",
    "coco_instance_lsj": "annotations",
    "coco_panoptic_lsj": "pan_seg_file_name",
    "sam_prompts": "annotations",
    "detectron2": "annotations",
}
_DETECTRON2_NEEDS = {  # what its own models are trained on
    **dict.fromkeys(("GeneralizedRCNN", "ProposalNetwork", "RetinaNet", "FCOS"), ("annotations",)),
    "PanopticFPN": ("annotations", "sem_seg_file_name"),
    "SemanticSegmentor": ("sem_seg_file_name",),
}
_IMAGE_PADDING = 128
logger = logging.getLogger(__name__)


def build_mapper(cfg: Any, records: Sequence[dict[str, Any]]) -> Any:
    """The training mapper that ``INPUT.DATASET_MAPPER_NAME`` names.

    An empty name chooses by what the records hold for the models of this project, and Detectron2's own format
    for all others. Detectron2's own models always get Detectron2's format.

    Raises:
        DatasetError: an unknown name, or one that the data set's records cannot feed; augmentations that there are not.
    """
    if uses_detectron2_mapper(cfg):
        return _detectron2_mapper(cfg, records)
    by_content = "mask_former_instance"
    if "sem_seg_file_name" in records[0] or "pan_seg_file_name" in records[0]:
        by_content = f"mask_former_{'panoptic' if 'pan_seg_file_name' in records[0] else 'semantic'}"
    name = cfg.INPUT.get("DATASET_MAPPER_NAME", "") or by_content
    if name not in MAPPERS:
        raise DatasetError(f"INPUT.DATASET_MAPPER_NAME {name!r} is not known. Expected one of {list(MAPPERS)}.")
    if MAPPERS[name] not in records[0]:
        other = f"For this data set set it to {by_content!r}." if MAPPERS[by_content] in records[0] else "Add them."
        raise DatasetError(
            f"INPUT.DATASET_MAPPER_NAME {name!r} needs {MAPPERS[name]!r} in the data set's records, which hold "
            f"{sorted(records[0])}. {other}"
        )
    if name == "sam_prompts":
        node = cfg.INPUT.PROMPTS
        return PromptMapper(longest_side_recipe(cfg, train=True), cfg.INPUT.FORMAT, node.BOX_NOISE, node.MAX_BOXES)
    recipe = large_scale_jitter_recipe(cfg) if name.endswith("_lsj") else resize_recipe(cfg, "instance" not in name)
    divisor = 0 if name.endswith("_lsj") else cfg.INPUT.get("SIZE_DIVISIBILITY", -1)
    ignore = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("ignore_label", cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)
    kinds = {"annotations": InstanceMapper, "pan_seg_file_name": PanopticMapper, "sem_seg_file_name": SemanticMapper}
    return kinds[MAPPERS[name]](recipe, cfg.INPUT.FORMAT, divisor, ignore)


def uses_detectron2_mapper(cfg: Any) -> bool:
    """Whether a config's model is trained in Detectron2's own format."""
    name, origin = cfg.INPUT.get("DATASET_MAPPER_NAME", ""), _architecture_module(cfg)
    return name == "detectron2" or origin.startswith("detectron2.") or not (name or origin.startswith("peft_d2."))


def trains_on_masks(cfg: Any) -> bool:
    """Whether a config's model is trained on the masks of instances."""
    if uses_detectron2_mapper(cfg):
        return cfg.MODEL.MASK_ON and _architecture_module(cfg) != "detectron2.modeling.meta_arch.retinanet"
    name = cfg.INPUT.get("DATASET_MAPPER_NAME", "")
    return not name or "instance" in name or name == "sam_prompts"


def build_test_mapper(cfg: Any, dataset_name: str = "") -> Any:
    """Detectron2's mapper for inference, safe for images of one pixel's width; no resizing where tiles are cut.

    With ``INPUT.DATASET_MAPPER_NAME: sam_prompts`` the one that adds boxes.

    Raises:
        DatasetError: ``INPUT.PROMPTS.DETECTIONS`` cannot be used, or tiles are to be cut for prompts.
    """
    if cfg.INPUT.get("DATASET_MAPPER_NAME", "") == "sam_prompts":
        detections = prompt_detections(cfg, dataset_name)
        return PromptTestMapper(longest_side_recipe(cfg, train=False), cfg.INPUT.FORMAT, detections)
    mapper = Detectron2Mapper(cfg, is_train=False)
    tiled = "TILES" in cfg.TEST and cfg.TEST.TILES.ENABLED
    mapper.augmentations = T.AugmentationList([] if tiled else keep_a_pixel(mapper.augmentations.augs))
    return mapper


class Detectron2Mapper(DatasetMapper):
    """Detectron2's own, which refuses files that it would misread."""

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """As :class:`detectron2.data.DatasetMapper`."""
        if os.path.isfile(record["file_name"]):
            image_size(record["file_name"])
        return super().__call__(record)


class _Mapper:
    """Base of the mask mappers: reads, augments and pads images, and makes instances of masks.

    A sample is a new dict that shares what it takes over from its record: copying polygons took longer than drawing.

    Args:
        augmentations: Detectron2's, in order.
        image_format: as ``INPUT.FORMAT``.
        size_divisibility: images are padded right and bottom to multiples of it; 0 or less: not at all.
        ignore_label: the value of label images that means "no label".
        bit_masks: in Detectron2's own format, in which a detector needs no masks.
    """

    def __init__(
        self, augmentations: Sequence[Any], image_format: str, size_divisibility: int = 0, ignore_label: int = 255,
        bit_masks: bool = False,
    ) -> None:  # fmt: skip
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format, self.size_divisibility = image_format, size_divisibility
        self.ignore_label, self.bit_masks = ignore_label, bit_masks

    def _augmented(self, record: dict[str, Any], sem_seg: np.ndarray | None = None) -> tuple[Any, Any]:
        """The augmented image (and labels) and its transforms; ``record["image"]`` is set."""
        image = read_image(record["file_name"], self.image_format)
        detection_utils.check_image_size(record, image)
        if sem_seg is not None and sem_seg.shape != image.shape[:2]:
            raise DatasetError(f"the label image is of {sem_seg.shape} px, the image of {image.shape[:2]}.")
        picture = T.AugInput(image, sem_seg=sem_seg)
        transforms = self.augmentations(picture)
        pixels = torch.from_numpy(np.array(picture.image.transpose(2, 0, 1), order="C"))
        record["image"] = self._pad(pixels, _IMAGE_PADDING)
        return picture, transforms

    def _pad(self, pixels: torch.Tensor, value: float) -> torch.Tensor:
        """(..., H, W) filled up with ``value`` right and bottom to multiples of ``size_divisibility``."""
        if self.size_divisibility <= 0:
            return pixels
        height, width = pixels.shape[-2:]
        return F.pad(pixels, (0, -width % self.size_divisibility, 0, -height % self.size_divisibility), value=value)

    def _instances(self, masks: Sequence[np.ndarray], classes: Sequence[int], shape: tuple[int, int]) -> Instances:
        """Instances of the objects of which something is left; ``shape`` is the unpadded (H, W)."""
        kept = [i for i, mask in enumerate(masks) if mask.any()]
        stacked = np.stack([masks[i] for i in kept]) if kept else np.zeros((0, *shape), dtype=bool)
        tensor = self._pad(torch.from_numpy(stacked.astype(bool)), 0)
        instances = Instances((tensor.shape[-2], tensor.shape[-1]))
        instances.gt_classes = torch.tensor([int(classes[i]) for i in kept], dtype=torch.int64)
        instances.gt_boxes = BitMasks(tensor).get_bounding_boxes()
        instances.gt_masks = BitMasks(tensor) if self.bit_masks else tensor
        return instances


class InstanceMapper(_Mapper):
    """Instance masks from annotations; polygons, run lengths and arrays alike; crowds are left out."""

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        record = dict(record)
        picture, transforms = self._augmented(record)
        shape = picture.image.shape[:2]
        objects = [a for a in record.pop("annotations", []) if not a.get("iscrowd", 0)]
        masked = [a for a in objects if "segmentation" in a]
        if objects and not masked and self.bit_masks:
            boxes = transforms.apply_box(_corners(objects))
            annotations = [
                {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": thing["category_id"]}
                for box, thing in zip(boxes, objects, strict=True)
            ]
            instances = detection_utils.annotations_to_instances(annotations, shape)
            return {**record, "instances": detection_utils.filter_empty_instances(instances)}
        if len(masked) < len(objects):
            raise DatasetError(
                f"{record['file_name']}: {len(objects) - len(masked)} of {len(objects)} annotations have no "
                "segmentation. Masks are trained on, so every object needs one."
            )
        source = (record["height"], record["width"]) if "height" in record else None
        masks = [transformed_mask(a["segmentation"], transforms, shape, source) for a in masked]
        return {**record, "instances": self._instances(masks, [a["category_id"] for a in masked], shape)}


class PromptMapper(InstanceMapper):
    """Training: ``instances`` with masks, and ``boxes`` (N, 4), one for each, each side moved outwards.

    Args:
        augmentations, image_format: as for all mappers.
        noise: most px of the resized image by which a side is moved.
        limit: most objects of one image; of more, as many are drawn.
    """

    def __init__(self, augmentations: Sequence[Any], image_format: str, noise: float, limit: int) -> None:
        super().__init__(augmentations, image_format)
        self.noise, self.limit = noise, limit

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        sample = super().__call__(record)
        instances = sample["instances"]
        if len(instances) > self.limit:
            chosen = np.sort(np.random.permutation(len(instances))[: self.limit])
            instances = sample["instances"] = instances[torch.from_numpy(chosen)]
        sample["boxes"] = widened(instances.gt_boxes.tensor, self.noise, instances.image_size)
        return sample


class PromptTestMapper(_Mapper):
    """Inference: ``boxes`` (N, 4) in px of the resized image, ``box_classes`` (N,), and of a detector ``box_scores``.

    ``detections`` are a detector's boxes by image id; None takes the ground truth's, in order, crowds left out.
    """

    def __init__(self, augmentations: Sequence[Any], image_format: str, detections: Detections | None = None) -> None:
        super().__init__(augmentations, image_format)
        self.detections = detections

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        record = dict(record)
        if self.detections is None:
            found = [{**a, "class": a["category_id"]} for a in prompted_objects(record)]
        else:
            found = [{**d, "bbox_mode": BoxMode.XYWH_ABS} for d in self.detections.get(record["image_id"], ())]
            record["box_scores"] = torch.tensor([float(d["score"]) for d in found])
        _, transforms = self._augmented(record)
        record["boxes"] = torch.as_tensor(transforms.apply_box(_corners(found)), dtype=torch.float32)
        record["box_classes"] = torch.tensor([int(f["class"]) for f in found], dtype=torch.int64)
        return record


class PanopticMapper(_Mapper):
    """One mask per segment of a panoptic label image, things and stuff; crowds are left out."""

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        record = dict(record)
        sem_seg = read_labels(record.pop("sem_seg_file_name")) if "sem_seg_file_name" in record else None
        picture, transforms = self._augmented(record, sem_seg)
        colours = detection_utils.read_image(record.pop("pan_seg_file_name"), "RGB")
        segments = panoptic_ids(transforms.apply_segmentation(colours))
        kept = [s for s in record["segments_info"] if not s.get("iscrowd", 0)]
        masks = [segments == s["id"] for s in kept]
        record["instances"] = self._instances(masks, [s["category_id"] for s in kept], segments.shape)
        if sem_seg is not None:
            inside = transforms.apply_segmentation(np.ones(sem_seg.shape, dtype=np.uint8)) == 1
            labels = np.where(inside, picture.sem_seg.astype(np.int64), self.ignore_label)
            record["sem_seg"] = self._pad(torch.from_numpy(labels), self.ignore_label)
        return record


class SemanticMapper(_Mapper):
    """One mask per class of a semantic label image."""

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        record = dict(record)
        picture, _ = self._augmented(record, read_labels(record.pop("sem_seg_file_name")))
        labels = np.ascontiguousarray(picture.sem_seg.astype(np.int64))
        classes = [int(c) for c in np.unique(labels) if c != self.ignore_label]
        record["sem_seg"] = self._pad(torch.from_numpy(labels), self.ignore_label)
        record["instances"] = self._instances([labels == c for c in classes], classes, labels.shape)
        return record


def _corners(objects: Sequence[dict[str, Any]]) -> np.ndarray:
    """(N, 4) boxes x0, y0, x1, y1 of annotations."""
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def transformed_mask(
    segmentation: Any, transforms: Any, shape: tuple[int, int], source: tuple[int, int] | None
) -> np.ndarray:
    """(H, W) bool mask of a segmentation after the transforms.

    The corners of polygons are moved and the result is drawn on a canvas of ``shape``, which does the cropping:
    no polygon is clipped, none is lost. Run lengths and arrays are moved as label images.

    Args:
        segmentation: polygons in source px, COCO run lengths, or an array of the source's (H, W).
        transforms: Detectron2 transforms of the image.
        shape: (H, W) of the transformed image.
        source: (H, W) of the image before the transforms, checked against run lengths.
    """
    if isinstance(segmentation, list):
        polygons = [transforms.apply_coords(np.array(p, dtype=np.float64).reshape(-1, 2)) for p in segmentation]
        return segmentation_to_mask(polygons, *shape)
    mask = segmentation_to_mask(segmentation, 0, 0) if isinstance(segmentation, dict) else np.asarray(segmentation)
    if source is not None and mask.shape != tuple(source):
        raise DatasetError(f"a mask of {mask.shape} px belongs to an image of {tuple(source)} px: they must agree.")
    # Where a crop pads, label images get a value that is neither 0 nor 1 in some versions of Detectron2.
    return transforms.apply_segmentation(np.ascontiguousarray(mask, dtype=np.uint8)) == 1


def _detectron2_mapper(cfg: Any, records: Sequence[dict[str, Any]]) -> Any:
    """Detectron2's own mapper, or ours in its format where its polygons cannot hold what the data set has."""
    _refuse_other_labels(cfg, records)
    augmentations = detectron2_recipe(cfg)
    plain = cfg.MODEL.MASK_ON and not cfg.MODEL.KEYPOINT_ON and not cfg.MODEL.LOAD_PROPOSALS
    plain = plain and "sem_seg_file_name" not in records[0] and "annotations" in records[0]
    bit_masks = cfg.INPUT.MASK_FORMAT == "bitmask"
    reason = ""
    if any(isinstance(a.get("segmentation"), dict) for r in records for a in r.get("annotations", ())):
        reason = "the data set has run-length masks"
    elif cfg.INPUT.CROP.ENABLED and importlib.util.find_spec("shapely") is None:
        reason = "cropping polygons needs the package shapely, which is not installed"
    if plain and (bit_masks or reason):
        if not bit_masks:
            logger.warning("INPUT.MASK_FORMAT polygon: masks are fed as bit masks instead, as %s.", reason)
        return InstanceMapper(augmentations, cfg.INPUT.FORMAT, bit_masks=True)
    accept_empty_polygons()
    mapper = Detectron2Mapper(cfg, is_train=True)
    mapper.augmentations = T.AugmentationList(augmentations)
    return mapper


def _refuse_other_labels(cfg: Any, records: Sequence[dict[str, Any]]) -> None:
    """Detectron2's models answer records without the labels that they are trained on with bare assertions."""
    name = base_architecture(cfg)
    needs = _DETECTRON2_NEEDS.get(name, ()) if _architecture_module(cfg).startswith("detectron2.") else ()
    if missing := [key for key in needs if not all(key in record for record in records)]:
        lacking = next(record for record in records if missing[0] not in record)
        raise DatasetError(
            f"{name} is trained on {' and '.join(needs)}, and records of {list(cfg.DATASETS.TRAIN)} hold "
            f"{sorted(lacking)}. Name sets with {' and '.join(missing)}, or another MODEL.META_ARCHITECTURE."
        )


def _architecture_module(cfg: Any) -> str:
    """The module that defines the config's model; "" where that is not registered (yet)."""
    from detectron2.modeling import META_ARCH_REGISTRY

    name = base_architecture(cfg)
    return META_ARCH_REGISTRY.get(name).__module__ if name in META_ARCH_REGISTRY else ""
