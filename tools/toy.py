"""A small COCO-format world in two domains that differ in look and in classes.

"day": plain, brightly coloured circles, squares and triangles on light paper.
"night": dim outlined, hatched stars, rings and crosses on dark, noisy ground.
Sizes, numbers and overlaps follow the same law in both, so that only look and classes separate them.
Every picture depends on (seed, domain, index) alone.
"""

from __future__ import annotations

import colorsys
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from mask_shapes import mask_to_polygons, mask_to_rle
from PIL import Image, ImageDraw

from peft_d2.data.segmentation import mask_box

_OVERSAMPLE = 4
_MIN_VISIBLE = 0.6  # of an object after later ones are painted over it


class ToySet(NamedTuple):
    """Where a generated set lies."""

    json: Path
    images: Path


class Domain(NamedTuple):
    """Classes and look: ranges of saturation and brightness, strength of texture and noise."""

    classes: tuple[str, ...]
    ground: tuple[tuple[float, float], tuple[float, float]]
    objects: tuple[tuple[float, float], tuple[float, float]]
    texture: float
    noise: float
    hatched: bool


DOMAINS = {
    "day": Domain(("circle", "square", "triangle"), ((0, 0.15), (0.85, 1)), ((0.6, 1), (0.5, 0.95)), 10, 2, False),
    "night": Domain(("star", "ring", "cross"), ((0.2, 0.6), (0.08, 0.2)), ((0.1, 0.5), (0.5, 0.8)), 14, 16, True),
}


def generate(
    folder: str | Path, domain: str, images: int, seed: int, *,
    size: int = 128, objects: tuple[int, int] = (2, 6), masks: Literal["polygon", "rle"] = "polygon",
) -> ToySet:  # fmt: skip
    """Write pictures with the masks of what is visible, pixel for pixel, to ``annotations.json`` and ``images/``.

    Args:
        folder: made if missing.
        domain: "day" or "night".
        images: number of pictures.
        seed: different seeds give different pictures; train and validation sets need different ones.
        size: side in px.
        objects: smallest and largest number of objects in a picture.
        masks: the segmentation form in the json.

    Raises:
        ValueError: unknown domain or mask form.
    """
    forms = {"polygon": mask_to_polygons, "rle": mask_to_rle}
    for what, value, known in (("domain", domain, DOMAINS), ("masks", masks, forms)):
        if value not in known:
            raise ValueError(f"toy {what} {value!r}: expected one of {sorted(known)}")
    made = ToySet(Path(folder) / "annotations.json", Path(folder) / "images")
    made.images.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {"images": [], "annotations": []}
    data["categories"] = [{"id": i, "name": name} for i, name in enumerate(DOMAINS[domain].classes, 1)]
    for index in range(images):
        picture, visible, classes = draw(domain, seed, index, size=size, objects=objects)
        name = f"{index:05d}.png"
        Image.fromarray(picture).save(made.images / name, compress_level=1)
        data["images"].append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for mask, category in zip(visible, classes, strict=True):
            data["annotations"].append({
                "id": len(data["annotations"]) + 1, "image_id": index + 1, "category_id": category + 1,
                "bbox": mask_box(mask), "area": int(mask.sum()), "iscrowd": 0, "segmentation": forms[masks](mask),
            })  # fmt: skip
    made.json.write_text(json.dumps(data))
    return made


def draw(
    domain: str, seed: int, index: int, *, size: int = 128, objects: tuple[int, int] = (2, 6)
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """One picture: (size, size, 3) uint8, (N, size, size) bool visible masks, N class indices."""
    look = DOMAINS[domain]
    rng = np.random.default_rng([seed, sorted(DOMAINS).index(domain), index])
    picture = _colour(rng, *look.ground)
    waves = Image.fromarray(rng.uniform(-1, 1, size=(8, 8)).astype(np.float32))
    picture = picture + look.texture * np.asarray(waves.resize((size, size), Image.Resampling.BICUBIC))[..., None]
    layers: list[np.ndarray] = []
    classes: list[int] = []
    visible = np.zeros((0, size, size), dtype=bool)
    for _ in range(int(rng.integers(objects[0], objects[1] + 1))):
        for _attempt in range(20):
            category = int(rng.integers(len(look.classes)))
            coverage = _coverage(rng, look.classes[category], size)
            covered = np.concatenate([visible & (coverage < 0.5), coverage[None] >= 0.5])
            whole = [np.count_nonzero(layer >= 0.5) for layer in [*layers, coverage]]
            if all(np.count_nonzero(m) >= _MIN_VISIBLE * area for m, area in zip(covered, whole, strict=True)):
                layers.append(coverage)
                classes.append(category)
                visible = covered
                break
    for coverage in layers:
        shade = _hatching(rng, coverage) if look.hatched else np.ones_like(coverage)
        picture += coverage[..., None] * (_colour(rng, *look.objects) * shade[..., None] - picture)
    if look.hatched:
        picture = picture * rng.uniform(0.85, 1.1)
    picture = picture + rng.normal(0, look.noise, size=picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8), visible, classes


def _coverage(rng: np.random.Generator, shape: str, size: int) -> np.ndarray:
    """(size, size) share of each pixel that a shape at a random place covers, 0 to 1."""
    radius = size * rng.uniform(0.09, 0.2)
    centre = rng.uniform(0.7 * radius, size - 0.7 * radius, size=2)
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    squeeze = np.array([1.0, rng.uniform(0.8, 1.0)])
    loops = {  # a second loop is a hole
        "circle": [_polar(40)], "square": [_polar(4)], "triangle": [_polar(3) * 1.15],
        "star": [_polar(10, np.where(np.arange(10) % 2, 0.45, 1.15))], "ring": [_polar(40), _polar(40) * 0.5],
        "cross": [_cross(0.36)],
    }[shape]  # fmt: skip
    canvas = Image.new("L", (size * _OVERSAMPLE, size * _OVERSAMPLE))
    painter = ImageDraw.Draw(canvas)
    for loop, value in zip(loops, (255, 0), strict=False):
        points = (centre + radius * (loop * squeeze) @ rotation) * _OVERSAMPLE
        painter.polygon([tuple(point) for point in points.tolist()], fill=value)
    return np.asarray(canvas.reduce(_OVERSAMPLE), dtype=np.float32) / 255


def _polar(points: int, radius: np.ndarray | float = 1.0) -> np.ndarray:
    angle = 2 * np.pi * np.arange(points) / points
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.broadcast_to(radius, points)[:, None]


def _cross(arm: float) -> np.ndarray:
    quarter = np.array([[1.0, -arm], [1.0, arm], [arm, arm]])
    turns = [np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return np.concatenate([quarter @ turn for turn in turns]) * 1.05


def _colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    return 255 * np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(*saturation), rng.uniform(*value)))


def _hatching(rng: np.random.Generator, coverage: np.ndarray) -> np.ndarray:
    """Brightness of a bright rim around stripes that are little brighter than the ground."""
    size = coverage.shape[0]
    inner = coverage >= 0.5
    for _ in range(max(1, size // 96)):
        padded = np.pad(inner, 1)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    angle, ys, xs = rng.uniform(0, np.pi), *np.mgrid[:size, :size]
    stripes = np.sin((xs * np.cos(angle) + ys * np.sin(angle)) * rng.uniform(0.9, 1.4)) > 0
    return np.where(inner, np.where(stripes, 0.75, 0.35), 1.0)
