#!/usr/bin/env python3
"""Nuclei of the Data Science Bowl 2018 (stage 1 training set, CC0) as COCO-format splits in two domains.

python tools/prepare_dsb2018.py --source stage1_train --output datasets/nuclei
python tools/prepare_dsb2018.py --source stage1_train --output datasets/nuclei --tile 96 --scale 2

The published stage 1 training set holds a folder per image: ``<id>/images/<id>.png`` and one mask per nucleus in
``<id>/masks/*.png``. Fluorescence is its colourless 256 x 256 images, histology its coloured ones of 256 x 320.
``dsb2018_splits.json`` lists the first 12 characters of the ids of each split. Corrected masks in the same layout work
as well.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from converting import CocoJson, write_coco
from mask_shapes import mask_to_polygons
from PIL import Image
from tile_dataset import tile_coco

_ID_LENGTH = 12
_SPLITS_FILE = Path(__file__).with_name("dsb2018_splits.json")


def read_splits() -> dict[str, list[str]]:
    """First 12 characters of the image ids of each split, in the splits' order."""
    return json.loads(_SPLITS_FILE.read_text())


def convert(
    source: str | Path, output: str | Path, *, splits: Mapping[str, Sequence[str]] | None = None, polygons: bool = False
) -> dict[str, int]:
    """Write ``output/<split>.json`` and ``output/<split>/<id>.png`` for every split.

    Args:
        source: folder of the published stage 1 training set.
        output: folder to write to.
        splits: id beginnings per split, those of the package when None.
        polygons: polygons along the pixel edges instead of run lengths; both are exact.

    Returns:
        Number of objects in each split.

    Raises:
        FileNotFoundError: the source is no such folder, or lacks images of a split.
        ValueError: an image that does not look like its split, or whose masks are of another size.
    """
    source, output = Path(source), Path(output)
    splits = read_splits() if splits is None else splits
    folders = {folder.name[:_ID_LENGTH]: folder for folder in sorted(source.glob("*")) if (folder / "images").is_dir()}
    for split, ids in splits.items():
        missing = [i for i in ids if i not in folders]
        if missing:
            raise FileNotFoundError(
                f"{source}: {len(missing)} of the {len(ids)} images of {split} are not there, {missing[0]}... for one. "
                "Expected the unpacked stage1_train folder, with <id>/images/<id>.png and <id>/masks/*.png."
            )
    return {split: _write_split(split, [folders[i] for i in ids], output, polygons) for split, ids in splits.items()}


def _write_split(split: str, folders: Sequence[Path], output: Path, polygons: bool) -> int:
    (output / split).mkdir(parents=True, exist_ok=True)
    coco = CocoJson([(1, "nucleus")])
    for folder in folders:
        picture = _read_image(folder, coloured=split.startswith("histology"))
        name = f"{folder.name[:_ID_LENGTH]}.png"
        picture.save(output / split / name)
        image_id = coco.add_image(name, picture.size)
        for mask in _read_masks(folder, picture.height, picture.width):
            coco.add(image_id, 1, mask=mask, polygons=mask_to_polygons(mask) if polygons else ())
    return write_coco(output / f"{split}.json", coco.data)


def _read_image(folder: Path, coloured: bool) -> Image.Image:
    with Image.open(folder / "images" / f"{folder.name}.png") as opened:
        picture = opened.convert("RGB")
    pixels = np.asarray(picture).astype(int)
    has_colour = bool((pixels.max(axis=2) - pixels.min(axis=2)).mean() > 1)
    if has_colour != coloured:
        raise ValueError(
            f"{folder}: the image is {'coloured' if has_colour else 'colourless'}, which its split is not. "
            "Is this the published stage 1 training set?"
        )
    return picture


def _read_masks(folder: Path, height: int, width: int) -> list[np.ndarray]:
    masks = []
    for path in sorted((folder / "masks").glob("*.png")):
        with Image.open(path) as opened:
            mask = np.asarray(opened.convert("L")) > 127
        if mask.shape != (height, width):
            raise ValueError(f"{path}: the mask is {mask.shape[1]} x {mask.shape[0]} px, the image {width} x {height}.")
        if mask.any():
            masks.append(mask)
    return masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="the unpacked stage1_train folder")
    parser.add_argument("--output", required=True, help="folder to write the splits to")
    parser.add_argument("--polygons", action="store_true", help="write polygons instead of run lengths")
    parser.add_argument("--tile", type=int, default=0, help="also cut tiles of so many px, into <split>_tiles/")
    parser.add_argument("--scale", type=float, default=2.0, help="factor by which tiles are enlarged")
    args = parser.parse_args()
    output = Path(args.output)
    for split, objects in convert(args.source, output, polygons=args.polygons).items():
        print(f"{output / split}.json: {objects} objects")
        if args.tile:
            path = tile_coco(
                output / f"{split}.json", output / split, output / f"{split}_tiles", tile=args.tile, scale=args.scale
            )
            print(path)


if __name__ == "__main__":
    main()
