"""A small COCO-format world in two domains that differ in look and in classes.

"day": plain, brightly coloured circles, squares and triangles on light paper.
"night": dim outlined, hatched stars, rings and crosses on dark, noisy ground.
Sizes, numbers and overlaps follow the same law in both, so that only look and classes separate them.
Every picture depends on (seed, domain, index) alone.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from peft_d2.data.coco_json import CocoJson
from peft_d2.data.segmentation import mask_to_polygons, mask_to_rle

_OVERSAMPLE = 4
_MIN_VISIBLE = 0.6  # of an object after later ones are painted over it


class ToySet(NamedTuple):
    """Where a generated set lies."""

    json: Path
    images: Path


@dataclass(frozen=True)
class _Domain:
    classes: tuple[str, ...]
    background: Callable[[np.random.Generator, int], np.ndarray]
    fill: Callable[[np.random.Generator, np.ndarray], np.ndarray]
    finish: Callable[[np.random.Generator, np.ndarray], np.ndarray]


def generate(
    folder: str | Path,
    domain: str,
    images: int,
    seed: int,
    *,
    size: int = 128,
    objects: tuple[int, int] = (2, 6),
    masks: Literal["polygon", "rle"] = "polygon",
) -> ToySet:
    """Write ``images`` pictures of ``size`` px with their masks to ``folder``.

    Args:
        folder: made if missing; gets ``annotations.json`` and ``images/``.
        domain: "day" or "night".
        images: number of pictures.
        seed: different seeds give different pictures; train and validation sets need different ones.
        size: side in px.
        objects: smallest and largest number of objects in a picture.
        masks: the segmentation form in the json. Masks are of what is visible, pixel for pixel.

    Returns:
        Paths of the json and of the image folder.

    Raises:
        ValueError: unknown domain or mask form.
    """
    if domain not in DOMAINS:
        raise ValueError(f"toy domain {domain!r}: expected one of {sorted(DOMAINS)}")
    if masks not in ("polygon", "rle"):
        raise ValueError(f"toy masks {masks!r}: expected 'polygon' or 'rle'")
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    coco = CocoJson(enumerate(DOMAINS[domain].classes, 1))
    form = mask_to_polygons if masks == "polygon" else mask_to_rle
    for index in range(images):
        picture, visible, classes = draw(domain, seed, index, size=size, objects=objects)
        name = f"{index:05d}.png"
        Image.fromarray(picture).save(folder / "images" / name, compress_level=1)
        image_id = coco.add_image(name, (size, size))
        for mask, category in zip(visible, classes, strict=True):
            coco.add_mask(image_id, category + 1, mask, form(mask))
    coco.write(folder / "annotations.json")
    return ToySet(folder / "annotations.json", folder / "images")


def draw(
    domain: str, seed: int, index: int, *, size: int = 128, objects: tuple[int, int] = (2, 6)
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """One picture: (size, size, 3) uint8, (N, size, size) bool visible masks, N class indices."""
    look = DOMAINS[domain]
    rng = np.random.default_rng([seed, sorted(DOMAINS).index(domain), index])
    picture = look.background(rng, size)
    layers: list[tuple[np.ndarray, int]] = []
    visible = np.zeros((0, size, size), dtype=bool)
    for _ in range(int(rng.integers(objects[0], objects[1] + 1))):
        for _attempt in range(20):
            category = int(rng.integers(len(look.classes)))
            coverage = _coverage(_outline(rng, look.classes[category], size), size)
            covered = np.concatenate([visible & (coverage < 0.5), coverage[None] >= 0.5])
            if _all_visible(covered, layers, coverage):
                layers.append((coverage, category))
                visible = covered
                break
    for coverage, _ in layers:
        picture += coverage[..., None] * (look.fill(rng, coverage) - picture)
    picture = look.finish(rng, picture)
    return np.clip(picture, 0, 255).astype(np.uint8), visible, [category for _, category in layers]


def _all_visible(covered: np.ndarray, layers: list[tuple[np.ndarray, int]], new: np.ndarray) -> bool:
    whole = [np.count_nonzero(coverage >= 0.5) for coverage, _ in layers] + [np.count_nonzero(new >= 0.5)]
    return all(np.count_nonzero(mask) >= _MIN_VISIBLE * area for mask, area in zip(covered, whole, strict=True))


def _outline(rng: np.random.Generator, shape: str, size: int) -> list[np.ndarray]:
    """Loops of (P, 2) points in px; the second one, if any, is a hole."""
    radius = size * rng.uniform(0.09, 0.2)
    centre = rng.uniform(0.7 * radius, size - 0.7 * radius, size=2)
    turn = rng.uniform(0, 2 * np.pi)
    loops = {
        "circle": lambda: [_polar(40)],
        "square": lambda: [_polar(4)],
        "triangle": lambda: [_polar(3) * 1.15],
        "star": lambda: [_polar(10, np.where(np.arange(10) % 2, 0.45, 1.15))],
        "ring": lambda: [_polar(40), _polar(40) * 0.5],
        "cross": lambda: [_cross(0.36)],
    }[shape]()
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    squeeze = np.array([1.0, rng.uniform(0.8, 1.0)])
    return [centre + radius * (loop * squeeze) @ rotation.T for loop in loops]


def _polar(points: int, radius: np.ndarray | float = 1.0) -> np.ndarray:
    angle = 2 * np.pi * np.arange(points) / points
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.broadcast_to(radius, points)[:, None]


def _cross(arm: float) -> np.ndarray:
    quarter = np.array([[1.0, -arm], [1.0, arm], [arm, arm]])
    turns = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return np.concatenate([quarter @ turn.T for turn in turns]) * 1.05


def _coverage(loops: list[np.ndarray], size: int) -> np.ndarray:
    """(size, size) share of each pixel that the shape covers, 0 to 1."""
    canvas = Image.new("L", (size * _OVERSAMPLE, size * _OVERSAMPLE))
    painter = ImageDraw.Draw(canvas)
    for loop, value in zip(loops, (255, 0), strict=False):
        painter.polygon([tuple(point) for point in (loop * _OVERSAMPLE).tolist()], fill=value)
    return np.asarray(canvas.reduce(_OVERSAMPLE), dtype=np.float32) / 255


def _waves(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size) smooth texture between about -1 and 1."""
    coarse = rng.uniform(-1, 1, size=(8, 8)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def _colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    return 255 * np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(*saturation), rng.uniform(*value)))


def _paper(rng: np.random.Generator, size: int) -> np.ndarray:
    return _colour(rng, (0.0, 0.15), (0.85, 1.0)) + 10 * _waves(rng, size)[..., None]


def _plain(rng: np.random.Generator, coverage: np.ndarray) -> np.ndarray:
    return np.broadcast_to(_colour(rng, (0.6, 1.0), (0.5, 0.95)), (*coverage.shape, 3))


def _darkness(rng: np.random.Generator, size: int) -> np.ndarray:
    return _colour(rng, (0.2, 0.6), (0.08, 0.2)) + 14 * _waves(rng, size)[..., None]


def _hatched(rng: np.random.Generator, coverage: np.ndarray) -> np.ndarray:
    """A bright rim around hatching that is little brighter than the ground."""
    size = coverage.shape[0]
    inner = coverage >= 0.5
    for _ in range(max(1, size // 96)):
        padded = np.pad(inner, 1)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    angle, ys, xs = rng.uniform(0, np.pi), *np.mgrid[:size, :size]
    stripes = np.sin((xs * np.cos(angle) + ys * np.sin(angle)) * rng.uniform(0.9, 1.4)) > 0
    colour = _colour(rng, (0.1, 0.5), (0.5, 0.8))
    shade = np.where(inner, np.where(stripes, 0.75, 0.35), 1.0)
    return colour * shade[..., None]


def _clean(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    return picture + rng.normal(0, 2, size=picture.shape)


def _grain(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    return picture * rng.uniform(0.85, 1.1) + rng.normal(0, 16, size=picture.shape)


DOMAINS: dict[str, _Domain] = {
    "day": _Domain(("circle", "square", "triangle"), _paper, _plain, _clean),
    "night": _Domain(("star", "ring", "cross"), _darkness, _hatched, _grain),
}
