"""Cut a COCO-format set into enlarged tiles: many small objects become a few large ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from peft_d2.data.coco_json import read_json
from peft_d2.data.images import path_inside
from peft_d2.data.pictures import read_rgb
from peft_d2.data.segmentation import mask_box, mask_to_compressed_rle, segmentation_to_mask


def tile_starts(length: int, tile: int, overlap: int = 0) -> list[int]:
    """Starts of the fewest evenly spaced tiles that cover ``length`` px and overlap by at least ``overlap`` px.

    Raises:
        ValueError: the overlap is not smaller than the tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tile overlap {overlap}: expected 0 to {tile - 1}, as the tiles are {tile} px.")
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def tile_coco(
    json_path: str | Path,
    image_root: str | Path,
    output: str | Path,
    *,
    tile: int = 96,
    scale: float = 2.0,
    overlap: int = 0,
    min_area: float = 12.0,
) -> Path:
    """Write the tiles of a COCO-format set as ``output/annotations.json`` and ``output/images/``.

    Args:
        json_path: the set's json; polygons and run lengths alike.
        image_root: the folder that its file names are relative to.
        output: folder to write to.
        tile: side of a tile in px of the source. Smaller images give one smaller tile.
        scale: factor by which the tiles are enlarged (or reduced).
        overlap: least overlap of neighbouring tiles in px of the source.
        min_area: cut-off parts of objects below this area, in px of the source, are dropped; whole objects stay.

    Raises:
        OSError, ValueError: a file that is missing, cannot be read, or lies outside the image folder.

    Returns:
        The path of the new json. Its images carry ``tile: {image_id, x, y, scale}``, its masks are run lengths.
    """
    source = read_json(json_path)
    output = Path(output)
    (output / "images").mkdir(parents=True, exist_ok=True)
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for annotation in source["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    result: dict[str, Any] = {"images": [], "annotations": [], "categories": source["categories"]}
    for record in source["images"]:
        picture = Image.fromarray(read_rgb(path_inside(image_root, record["file_name"])))
        tiles = _cut_image(picture, record, output, tile, scale, overlap, first_id=len(result["images"]) + 1)
        result["images"] += tiles
        for annotation in by_image.get(record["id"], []):
            for part in _cut_annotation(annotation, picture.size, tiles, scale, min_area):
                result["annotations"].append({**part, "id": len(result["annotations"]) + 1})
    path = output / "annotations.json"
    path.write_text(json.dumps(result))
    return path


def enlarge(picture: Image.Image, scale: float) -> Image.Image:
    """The picture resized by ``scale``, as tiles are for training and for evaluation."""
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BILINEAR)


def _cut_image(
    picture: Image.Image, record: dict[str, Any], output: Path, tile: int, scale: float, overlap: int, first_id: int
) -> list[dict[str, Any]]:
    tiles: list[dict[str, Any]] = []
    for y in tile_starts(picture.height, tile, overlap):
        for x in tile_starts(picture.width, tile, overlap):
            box = (x, y, min(x + tile, picture.width), min(y + tile, picture.height))
            enlarged = enlarge(picture.crop(box), scale)
            stem = record["id"] if isinstance(record["id"], int) else f"{first_id}t"  # text might be no file name
            name = f"{stem}_{x}_{y}.png"
            enlarged.save(output / "images" / name)
            tiles.append(
                {
                    "id": first_id + len(tiles),
                    "file_name": name,
                    "height": enlarged.height,
                    "width": enlarged.width,
                    "tile": {"image_id": record["id"], "x": x, "y": y, "scale": scale},
                }
            )
    return tiles


def _cut_annotation(
    annotation: dict[str, Any], size: tuple[int, int], tiles: list[dict[str, Any]], scale: float, min_area: float
) -> list[dict[str, Any]]:
    """The parts of one object in the tiles of its image; ``size`` is the image's (width, height)."""
    mask = _scaled_mask(annotation["segmentation"], *size, scale)
    whole = int(mask.sum())
    parts = []
    for tile in tiles:
        x, y = round(tile["tile"]["x"] * scale), round(tile["tile"]["y"] * scale)
        part = np.zeros((tile["height"], tile["width"]), dtype=bool)
        window = mask[y : y + tile["height"], x : x + tile["width"]]
        part[: window.shape[0], : window.shape[1]] = window
        area = int(part.sum())
        if area == 0 or (area < whole and area < min_area * scale * scale):
            continue
        parts.append(
            {
                "image_id": tile["id"],
                "category_id": annotation["category_id"],
                "iscrowd": annotation.get("iscrowd", 0),
                "bbox": mask_box(part),
                "area": area,
                "segmentation": mask_to_compressed_rle(part),
            }
        )
    return parts


def _scaled_mask(segmentation: Any, width: int, height: int, scale: float) -> np.ndarray:
    """The object's mask on the enlarged image: polygons are enlarged before they are drawn."""
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    if not isinstance(segmentation, dict):
        return segmentation_to_mask([np.asarray(p, dtype=np.float64) * scale for p in segmentation], rows, columns)
    mask = segmentation_to_mask(segmentation, height, width)
    ys = np.minimum(((np.arange(rows) + 0.5) / scale).astype(int), height - 1)
    xs = np.minimum(((np.arange(columns) + 0.5) / scale).astype(int), width - 1)
    return mask[ys[:, None], xs]
