"""From one dataset dict to what a model trains on, under the names of the published configs.

Samples of the mask mappers: ``image`` (3, H, W) uint8, ``instances`` with ``gt_classes`` (N,), ``gt_boxes`` (N, 4)
and ``gt_masks`` (N, H, W) bool tensor (``BitMasks`` in Detectron2's own format). Objects that a crop cut away
are left out; an image may be left without any.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper, MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from torch.nn import functional as F

from peft_d2.compat import accept_empty_polygons
from peft_d2.data.augmentation import detectron2_recipe, keep_a_pixel, large_scale_jitter_recipe, resize_recipe
from peft_d2.data.images import DatasetError
from peft_d2.data.segmentation import segmentation_to_mask

MAPPERS = (
    "mask_former_instance",
    "mask_former_panoptic",
    "mask_former_semantic",
    "coco_instance_lsj",
    "coco_panoptic_lsj",
    "sam_prompts",
    "detectron2",
)
_IMAGE_PADDING = 128
logger = logging.getLogger(__name__)


def build_mapper(cfg: Any, records: Sequence[dict[str, Any]]) -> Any:
    """The training mapper that ``INPUT.DATASET_MAPPER_NAME`` names.

    An empty name chooses by what the records hold for the models of this project, and Detectron2's own format
    for all others. Detectron2's own models always get Detectron2's format.

    Raises:
        DatasetError: an unknown name, or one that the data set's records cannot feed; augmentations that there are not.
    """
    name = cfg.INPUT.get("DATASET_MAPPER_NAME", "")
    origin = _architecture_module(cfg)
    if origin.startswith("detectron2.") or (not name and not origin.startswith("peft_d2.")):
        name = "detectron2"
    elif not name:
        name = _name_by_content(records[0])
    if name not in MAPPERS:
        raise DatasetError(f"INPUT.DATASET_MAPPER_NAME {name!r} is not known. Expected one of {list(MAPPERS)}.")
    if name == "detectron2":
        return _detectron2_mapper(cfg, records)
    _require(records[0], name)
    if name == "sam_prompts":
        from peft_d2.data.prompts import build_prompt_mapper  # which derives its mapper from this module's

        return build_prompt_mapper(cfg)
    recipe = large_scale_jitter_recipe(cfg) if name.endswith("_lsj") else resize_recipe(cfg, "instance" not in name)
    divisor = 0 if name.endswith("_lsj") else cfg.INPUT.get("SIZE_DIVISIBILITY", -1)
    if "instance" in name:
        return InstanceMapper(recipe, cfg.INPUT.FORMAT, divisor)
    ignore = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("ignore_label", cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)
    kind = PanopticMapper if "panoptic" in name else SemanticMapper
    return kind(recipe, cfg.INPUT.FORMAT, divisor, ignore)


def build_test_mapper(cfg: Any, dataset_name: str = "") -> Any:
    """Detectron2's mapper for inference, safe for images of one pixel's width; no resizing where tiles are cut.

    With ``INPUT.DATASET_MAPPER_NAME: sam_prompts`` the one that adds boxes, see :mod:`peft_d2.data.prompts`.
    """
    if cfg.INPUT.get("DATASET_MAPPER_NAME", "") == "sam_prompts":
        from peft_d2.data.prompts import build_prompt_test_mapper

        return build_prompt_test_mapper(cfg, dataset_name)
    mapper = DatasetMapper(cfg, is_train=False)
    tiled = "TILES" in cfg.TEST and cfg.TEST.TILES.ENABLED
    mapper.augmentations = T.AugmentationList([] if tiled else keep_a_pixel(mapper.augmentations.augs))
    return mapper


class _Mapper:
    """What the mask mappers share: reading, augmenting, padding.

    A sample is a new dict, but what it takes over from its record is not copied: copying polygons number by number took
    longer than drawing them.
    """

    def __init__(self, augmentations: Sequence[Any], image_format: str, size_divisibility: int = 0) -> None:
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format = image_format
        self.size_divisibility = size_divisibility

    def _augmented(self, record: dict[str, Any], sem_seg: np.ndarray | None) -> tuple[Any, Any]:
        image = detection_utils.read_image(record["file_name"], format=self.image_format)
        detection_utils.check_image_size(record, image)
        picture = T.AugInput(image, sem_seg=sem_seg)
        transforms = self.augmentations(picture)
        return picture, transforms

    def _pad(self, pixels: torch.Tensor, value: float) -> torch.Tensor:
        """Right and bottom to multiples of ``size_divisibility``."""
        if self.size_divisibility <= 0:
            return pixels
        height, width = pixels.shape[-2:]
        return F.pad(pixels, (0, -width % self.size_divisibility, 0, -height % self.size_divisibility), value=value)

    def _image(self, image: np.ndarray) -> torch.Tensor:
        return self._pad(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), _IMAGE_PADDING)

    def _instances(self, masks: Sequence[np.ndarray], classes: Sequence[int], shape: tuple[int, int]) -> Instances:
        """Instances of the objects of which something is left; ``shape`` is the unpadded (H, W)."""
        kept = [i for i, mask in enumerate(masks) if mask.any()]
        stacked = np.stack([masks[i] for i in kept]) if kept else np.zeros((0, *shape), dtype=bool)
        tensor = self._pad(torch.from_numpy(stacked.astype(bool)), 0)
        instances = Instances((tensor.shape[-2], tensor.shape[-1]))
        instances.gt_classes = torch.tensor([int(classes[i]) for i in kept], dtype=torch.int64)
        instances.gt_boxes = BitMasks(tensor).get_bounding_boxes()
        instances.gt_masks = tensor
        return instances


class InstanceMapper(_Mapper):
    """Instance masks from annotations; polygons, run lengths and arrays alike; crowds are left out."""

    def __init__(
        self, augmentations: Sequence[Any], image_format: str, size_divisibility: int = 0, bit_masks: bool = False
    ) -> None:
        super().__init__(augmentations, image_format, size_divisibility)
        self.bit_masks = bit_masks

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        record = dict(record)
        picture, transforms = self._augmented(record, None)
        shape = picture.image.shape[:2]
        objects = [a for a in record.pop("annotations", []) if not a.get("iscrowd", 0)]
        masked = [a for a in objects if "segmentation" in a]
        record["image"] = self._image(picture.image)
        if len(masked) < len(objects):
            if masked or not self.bit_masks:
                raise DatasetError(
                    f"{record['file_name']}: {len(objects) - len(masked)} of {len(objects)} annotations have no "
                    "segmentation. Masks are trained on, so every object needs one."
                )
            record["instances"] = self._boxes_only(objects, transforms, shape)
            return record
        source = (record["height"], record["width"]) if "height" in record else None
        masks = [transformed_mask(a["segmentation"], transforms, shape, source) for a in masked]
        record["instances"] = self._instances(masks, [a["category_id"] for a in masked], shape)
        if self.bit_masks:
            record["instances"].gt_masks = BitMasks(record["instances"].gt_masks)
        return record

    def _boxes_only(self, objects: Sequence[dict[str, Any]], transforms: Any, shape: tuple[int, int]) -> Instances:
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
        moved = Boxes(torch.as_tensor(transforms.apply_box(np.array(boxes, dtype=np.float64)), dtype=torch.float32))
        moved.clip(shape)
        kept = moved.nonempty(threshold=1e-5)
        instances = Instances(shape)
        instances.gt_boxes = moved[kept]
        instances.gt_classes = torch.tensor([int(a["category_id"]) for a in objects], dtype=torch.int64)[kept]
        return instances


class _LabelMapper(_Mapper):
    """Reads label images, in which one value means "no label"."""

    def __init__(
        self, augmentations: Sequence[Any], image_format: str, size_divisibility: int = 0, ignore_label: int = 255
    ) -> None:
        super().__init__(augmentations, image_format, size_divisibility)
        self.ignore_label = ignore_label


class PanopticMapper(_LabelMapper):
    """One mask per segment of a panoptic label image, things and stuff; crowds are left out."""

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        record = dict(record)
        sem_seg = _read_labels(record.pop("sem_seg_file_name")) if "sem_seg_file_name" in record else None
        picture, transforms = self._augmented(record, sem_seg)
        colours = detection_utils.read_image(record.pop("pan_seg_file_name"), "RGB")
        colours = transforms.apply_segmentation(colours).astype(np.int64)
        segments = colours[..., 0] + 256 * colours[..., 1] + 256 * 256 * colours[..., 2]
        kept = [s for s in record["segments_info"] if not s.get("iscrowd", 0)]
        masks = [segments == s["id"] for s in kept]
        record["image"] = self._image(picture.image)
        record["instances"] = self._instances(masks, [s["category_id"] for s in kept], segments.shape)
        if sem_seg is not None:
            inside = transforms.apply_segmentation(np.ones(sem_seg.shape, dtype=np.uint8)) == 1
            labels = np.where(inside, picture.sem_seg.astype(np.int64), self.ignore_label)
            record["sem_seg"] = self._pad(torch.from_numpy(labels), self.ignore_label)
        return record


class SemanticMapper(_LabelMapper):
    """One mask per class of a semantic label image."""

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        record = dict(record)
        picture, _ = self._augmented(record, _read_labels(record.pop("sem_seg_file_name")))
        labels = picture.sem_seg.astype(np.int64)
        classes = [int(c) for c in np.unique(labels) if c != self.ignore_label]
        record["image"] = self._image(picture.image)
        record["sem_seg"] = self._pad(torch.from_numpy(np.ascontiguousarray(labels)), self.ignore_label)
        record["instances"] = self._instances([labels == c for c in classes], classes, labels.shape)
        return record


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


def _read_labels(path: str) -> np.ndarray:
    """(H, W) label image; 16-bit labels become float, which Detectron2's transforms can resize."""
    labels = detection_utils.read_image(path)
    if labels.ndim != 2:
        raise DatasetError(f"{path}: a semantic label image of {labels.shape}; expected one channel of class numbers.")
    return labels if labels.dtype == np.uint8 else labels.astype(np.float64)


def _detectron2_mapper(cfg: Any, records: Sequence[dict[str, Any]]) -> Any:
    """Detectron2's own mapper, or ours in its format where its polygons cannot hold what the data set has."""
    augmentations = detectron2_recipe(cfg)
    plain = cfg.MODEL.MASK_ON and not cfg.MODEL.KEYPOINT_ON and not cfg.MODEL.LOAD_PROPOSALS
    plain = plain and "sem_seg_file_name" not in records[0] and "annotations" in records[0]
    reason = ""
    if cfg.INPUT.MASK_FORMAT == "bitmask":
        reason = "INPUT.MASK_FORMAT is bitmask"
    elif _has_run_lengths(records):
        reason = "the data set has run-length masks"
    elif cfg.INPUT.CROP.ENABLED and importlib.util.find_spec("shapely") is None:
        reason = "cropping polygons needs the package shapely, which is not installed"
    if plain and reason:
        if cfg.INPUT.MASK_FORMAT != "bitmask":
            logger.warning("INPUT.MASK_FORMAT polygon: masks are fed as bit masks instead, as %s.", reason)
        return InstanceMapper(augmentations, cfg.INPUT.FORMAT, bit_masks=True)
    accept_empty_polygons()
    mapper = DatasetMapper(cfg, is_train=True)
    mapper.augmentations = T.AugmentationList(augmentations)
    return mapper


def _has_run_lengths(records: Sequence[dict[str, Any]]) -> bool:
    return any(isinstance(a.get("segmentation"), dict) for r in records for a in r.get("annotations", ()))


def _architecture_module(cfg: Any) -> str:
    """Where the model to be trained is defined, "" when it is not registered (yet)."""
    from detectron2.modeling import META_ARCH_REGISTRY

    name = cfg.MODEL.META_ARCHITECTURE
    if name == "PEFTModel":
        name = cfg.MODEL.PEFT.META_ARCHITECTURE
    return META_ARCH_REGISTRY.get(name).__module__ if name in META_ARCH_REGISTRY else ""


def _name_by_content(record: dict[str, Any]) -> str:
    if "pan_seg_file_name" in record:
        return "mask_former_panoptic"
    return "mask_former_semantic" if "sem_seg_file_name" in record else "mask_former_instance"


def _require(record: dict[str, Any], name: str) -> None:
    needed = {"panoptic": "pan_seg_file_name", "semantic": "sem_seg_file_name"}
    key = next((key for kind, key in needed.items() if kind in name), "annotations")
    if key not in record:
        raise DatasetError(
            f"INPUT.DATASET_MAPPER_NAME {name!r} needs {key!r} in the data set's records, which hold {sorted(record)}. "
            f"For this data set set it to {_name_by_content(record)!r}."
        )
