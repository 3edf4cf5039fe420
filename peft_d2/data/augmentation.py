"""The augmentation recipes of the published configs, on Detectron2's transforms."""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform
from PIL import Image

from peft_d2.data.images import DatasetError

_CROPS = ("relative_range", "relative", "absolute", "absolute_range")


class KeepsAPixel(T.Augmentation):
    """Another resizing augmentation whose result is at least one pixel wide and high (5000 x 1 images exist)."""

    def __init__(self, resize: T.Augmentation) -> None:
        super().__init__()
        self.resize = resize

    def get_transform(self, image: np.ndarray) -> Transform:
        """The other one's transform of an image (H, W, C); a side of zero becomes one pixel."""
        transform = self.resize.get_transform(image)
        if isinstance(transform, T.ResizeTransform) and min(transform.new_h, transform.new_w) < 1:
            height, width = max(1, int(transform.new_h)), max(1, int(transform.new_w))
            return T.ResizeTransform(transform.h, transform.w, height, width, transform.interp)
        return transform

    def __repr__(self) -> str:
        return repr(self.resize)


class LongestSide(T.Augmentation):
    """Resize so that the longer side is ``size`` px; the other one is rounded, and at least a pixel."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def get_transform(self, image: np.ndarray) -> Transform:
        """The resize of an image (H, W, C), bilinear."""
        height, width = image.shape[:2]
        scale = self.size / max(height, width)
        size = (max(1, int(side * scale + 0.5)) for side in (height, width))
        return T.ResizeTransform(height, width, *size, Image.Resampling.BILINEAR)


def keep_a_pixel(augmentations: list[Any]) -> list[Any]:
    """The same list with every resizing kept from rounding a side down to nothing."""
    resizing = (T.ResizeShortestEdge, T.ResizeScale)
    return [KeepsAPixel(a) if isinstance(a, resizing) else a for a in augmentations]


class SSDColour(T.Augmentation):
    """Photometric distortion of SSD (Liu et al. 2016, section 2.2): each step with probability one half.

    Brightness +-32, contrast and saturation x 0.5 to 1.5, hue +-18 degrees of 180; contrast before or after the
    other two with equal chance.
    """

    def __init__(self, image_format: str = "BGR") -> None:
        super().__init__()
        self.image_format = image_format

    def get_transform(self, image: np.ndarray) -> Transform:
        """One draw from NumPy's random numbers, for images (H, W, 3), uint8; coordinates stay."""

        def draw(low: float, high: float) -> float | None:
            value, applied = np.random.uniform(low, high), np.random.rand() < 0.5
            return float(value) if applied else None

        brightness, contrast, saturation = draw(-32, 32), draw(0.5, 1.5), draw(0.5, 1.5)
        hue, contrast_first = draw(-18, 18), bool(np.random.rand() < 0.5)
        swap = slice(None, None, -1 if self.image_format == "BGR" else 1)

        def affine(pixels: np.ndarray, factor: float | None, offset: float = 0.0) -> np.ndarray:
            if factor is None:
                return pixels
            return np.clip(pixels.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)

        def distort(pixels: np.ndarray) -> np.ndarray:
            """(H, W, 3) uint8 -> the same; each step ends in uint8, as in the published recipe."""
            pixels = affine(pixels, None if brightness is None else 1.0, brightness or 0.0)
            pixels = affine(pixels, contrast if contrast_first else None)
            if saturation is not None or hue is not None:
                rgb = np.ascontiguousarray(pixels[..., swap])
                hsv = np.array(Image.fromarray(rgb).convert("HSV")).astype(np.int16)
                hsv[..., 0] = (hsv[..., 0] + round((hue or 0.0) * 256 / 180)) % 256  # the recipe's wheel has 180 steps
                hsv[..., 1] = np.clip(hsv[..., 1] * (1.0 if saturation is None else saturation), 0, 255)
                rgb = np.asarray(Image.fromarray(hsv.astype(np.uint8), mode="HSV").convert("RGB"))
                pixels = np.ascontiguousarray(rgb[..., swap])
            return affine(pixels, None if contrast_first else contrast)

        return T.ColorTransform(distort)


def resize_recipe(cfg: Any, semantic: bool) -> list[Any]:
    """Shortest-edge resize, crop, colour, flip. ``semantic``: crops are limited to one class's largest area."""
    _check_sizes(cfg.INPUT)
    augmentations: list[Any] = [
        T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING)
    ]
    crop = cfg.INPUT.CROP
    if crop.ENABLED and semantic:
        augmentations.append(
            T.RandomCrop_CategoryAreaConstraint(
                crop.TYPE, crop.SIZE, crop.get("SINGLE_CATEGORY_MAX_AREA", 1.0), cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
            )
        )
    elif crop.ENABLED:
        augmentations.append(T.RandomCrop(crop.TYPE, crop.SIZE))
    return keep_a_pixel([*augmentations, *_colour(cfg), *_flip(cfg)])


def large_scale_jitter_recipe(cfg: Any) -> list[Any]:
    """Flip, jittered scale, crop or pad to a square of ``INPUT.IMAGE_SIZE`` (Ghiasi et al. 2021, section 3)."""
    size = cfg.INPUT.IMAGE_SIZE
    scale = T.ResizeScale(cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE, size, size)
    return keep_a_pixel([*_flip(cfg), scale, T.FixedSizeCrop(crop_size=(size, size)), *_colour(cfg)])


def longest_side_recipe(cfg: Any, train: bool) -> list[Any]:
    """Longer side to ``MODEL.SAM.IMAGE_SIZE``; in training flips and, where ``COLOR_AUG_SSD``, colours too."""
    return [LongestSide(cfg.MODEL.SAM.IMAGE_SIZE), *(_colour(cfg) + _flip(cfg) if train else [])]


def detectron2_recipe(cfg: Any) -> list[Any]:
    """What Detectron2's own mapper does: crop, shortest-edge resize, flip."""
    _check_sizes(cfg.INPUT)
    augmentations = detection_utils.build_augmentation(cfg, is_train=True)
    if cfg.INPUT.CROP.ENABLED:
        augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    return keep_a_pixel(augmentations)


def _check_sizes(node: Any) -> None:
    """Refuse what Detectron2's transforms answer with a bare assertion, or with an error at some image."""
    sizes, kind, crop = node.MIN_SIZE_TRAIN, node.MIN_SIZE_TRAIN_SAMPLING, node.CROP
    sides = list(crop.SIZE) if isinstance(crop.SIZE, list | tuple) else [crop.SIZE] * 2
    positive = len(sides) == 2 and min(sides) > 0
    fits = all(type(side) is int for side in sides) if "absolute" in crop.TYPE else max(sides, default=0) <= 1
    for holds, key, value, expected in (
        (kind in ("choice", "range"), "MIN_SIZE_TRAIN_SAMPLING", kind, "'choice' or 'range'"),
        (len(sizes) == 2 or (kind == "choice" and sizes), "MIN_SIZE_TRAIN", sizes,
         "two sizes for MIN_SIZE_TRAIN_SAMPLING 'range', at least one for 'choice'"),
        (min(sizes, default=0) >= 0 and node.MAX_SIZE_TRAIN > 0, "MIN_SIZE_TRAIN and MAX_SIZE_TRAIN",
         (sizes, node.MAX_SIZE_TRAIN), "sizes above 0"),
        (not crop.ENABLED or crop.TYPE in _CROPS, "CROP.TYPE", crop.TYPE, f"one of {list(_CROPS)}"),
        (not crop.ENABLED or (positive and fits), "CROP.SIZE", crop.SIZE,
         f"two {'whole numbers of px' if 'absolute' in crop.TYPE else 'shares above 0, up to 1'} for {crop.TYPE!r}"),
    ):  # fmt: skip
        if not holds:
            raise DatasetError(f"INPUT.{key} is {value!r}; expected {expected}.")


def _colour(cfg: Any) -> list[Any]:
    return [SSDColour(cfg.INPUT.FORMAT)] if cfg.INPUT.get("COLOR_AUG_SSD", False) else []


def _flip(cfg: Any) -> list[Any]:
    kind = cfg.INPUT.RANDOM_FLIP
    if kind not in ("horizontal", "vertical", "none"):
        raise DatasetError(f"INPUT.RANDOM_FLIP is {kind!r}; expected one of ['horizontal', 'vertical', 'none'].")
    return [] if kind == "none" else [T.RandomFlip(horizontal=kind == "horizontal", vertical=kind == "vertical")]
