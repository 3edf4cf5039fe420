#!/usr/bin/env python3
"""Cut a COCO-format data set into enlarged tiles.

an example:
  %(prog)s --json train.json --images train/ --output tiles/train --tile 96 --scale 2
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from peft_d2.data.images import image_size, path_inside, read_rgb, set_pixel_limit
from peft_d2.data.pictures import enlarge, tile_starts
from peft_d2.data.registration import read_json
from peft_d2.data.segmentation import mask_box, mask_to_compressed_rle, segmentation_to_mask
from peft_d2.engine.errors import bounded, one_line_errors

_LARGEST = 2**15  # px of a tile's side


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="COCO-format json")
    parser.add_argument("--images", required=True, help="folder of its images")
    parser.add_argument("--output", required=True, help="folder to write annotations.json and images/ to")
    parser.add_argument("--tile", type=bounded(int, 1), default=96, help="side of a tile in px of the source")
    parser.add_argument("--scale", type=float, default=2.0, help="factor by which tiles are enlarged")
    parser.add_argument("--overlap", type=bounded(int, 0), default=0, help="least overlap of neighbouring tiles in px")
    parser.add_argument(
        "--min-area", type=bounded(float, 0), default=12.0, help="drop cut-off parts below this many source px"
    )
    parser.add_argument(
        "--max-pixels", type=bounded(int, 0), default=0, help="of an image, where Pillow's limit is too low"
    )
    args = parser.parse_args()
    if args.max_pixels:
        set_pixel_limit(args.max_pixels)
    cut = {"tile": args.tile, "scale": args.scale, "overlap": args.overlap, "min_area": args.min_area}
    try:
        path = tile_coco(args.json, args.images, args.output, **cut)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {path}")
    return 0


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
        OSError, ValueError: a file that is missing, cannot be read, lies outside the image folder, or would be lost.

    Returns:
        The path of the new json. Its images carry ``tile: {image_id, x, y, scale}``, its masks are run lengths.
    """
    if tile < 1 or not 0 < scale * tile <= _LARGEST:
        raise ValueError(
            f"tiles of {tile} px and scale {scale:g}: expected 1 or more, a factor above 0, and {_LARGEST} px at most."
        )
    if not os.fspath(output):
        raise ValueError("the folder to write to has no name: give one.")
    source = read_json(json_path)
    output = Path(output)
    path = output / "annotations.json"
    if path.exists() and (path.samefile(json_path) or '"tile": {' not in path.read_text(encoding="utf-8")):
        raise ValueError(f"{path} holds no tiles of an earlier call and would be written over: choose another folder.")
    if Path(image_root).resolve() in (output.resolve(), (output / "images").resolve()):
        raise ValueError(f"the tiles would come among the images of {image_root}: choose another folder for them.")
    for record in source["images"]:
        image_size(path_inside(image_root, record["file_name"]))  # whatever is missing or none, before the first tile
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
    path.write_text(json.dumps(result))
    return path


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


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
