#!/usr/bin/env python3
"""Check a data set before training, and picture it; exit code 0: no errors, 1: errors.

an example:
  %(prog)s --data export/ --preview seen.jpg
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from picturing import sheet
from PIL import Image

from peft_d2 import add_config
from peft_d2.data.formats import READERS, map_classes, read_class_map, read_folder, store
from peft_d2.data.images import DatasetError, read_rgb, set_pixel_limit
from peft_d2.data.labels import Problem
from peft_d2.data.pictures import overlay
from peft_d2.data.registration import read_json, register_builtin, require_registered
from peft_d2.data.segmentation import segmentation_to_mask
from peft_d2.data.validation import Rules, check_coco, check_registered, summary
from peft_d2.engine.errors import bounded, one_line_errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="COCO-format json")
    parser.add_argument("--images", metavar="DIR", help="folder that its file names are relative to")
    parser.add_argument("--data", metavar="DIR", help=f"instead: a folder of one of {', '.join(READERS)}")
    parser.add_argument("--name", help="instead: a set that is built in or registered by Detectron2")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="which part of --data")
    parser.add_argument("--class-map", default="", metavar="MAP", help="old=new,other=new,unwanted= or a yaml of these")
    parser.add_argument("--save-json", metavar="DIR", help="keep what was understood there, as a COCO-format json")
    parser.add_argument("--preview", "--sheet", dest="sheet", metavar="FILE", help="picture the first images there")
    parser.add_argument("--sheet-images", type=bounded(int, 1), default=24, help="how many images the preview shows")
    parser.add_argument("--statistics", action="store_true", help="print MODEL.PIXEL_MEAN and PIXEL_STD of the images")
    parser.add_argument("--test", action="store_true", help="a test set: its annotations may be missing")
    parser.add_argument("--outside", action="store_true", help="images may lie outside the folder")
    parser.add_argument(
        "--max-pixels", type=bounded(int, 0), default=0, help="of an image, where Pillow's limit is too low"
    )
    parser.add_argument(
        "--per-kind", type=bounded(int, 0), default=1_000_000, help="list only so many problems of a kind"
    )
    args = parser.parse_args()
    if [bool(args.name), bool(args.data), bool(args.json and args.images)].count(True) != 1:
        parser.error("give --json and --images, or --data, or --name")
    if args.max_pixels:
        set_pixel_limit(args.max_pixels)
    if args.name:
        try:
            kind = evaluator_type(args.name)
        except ValueError as error:
            parser.error(str(error))
        if kind != "coco":
            if args.sheet or args.save_json or args.class_map:
                parser.error(f"--preview, --save-json and --class-map are for COCO-format sets of objects, not {kind}")
            return _check_other(args)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            json_path, images = _files(args, Path(args.save_json or scratch))
        except (ValueError, OSError) as error:
            parser.error(str(error))
        return _check(args, json_path, images)


def _files(args: argparse.Namespace, target: Path) -> tuple[str, str]:
    """The json and the image folder of what the command line names; what has another form is written to ``target``."""
    json_path, images = coco_files(args.name) if args.name else (args.json, args.images)
    if not (args.data or args.class_map or args.save_json):
        return json_path, images
    if args.data:
        understood, data, folder = read_folder(args.data, args.split)
        images = str(folder)
        print(understood)
    else:
        data = read_json(json_path)
    if args.class_map:
        (data,) = map_classes(read_class_map(args.class_map), data)
    path = store(data, target, args.split)
    if args.save_json:
        print(f"--train-json {path} --train-images {images}".replace("train", args.split))
    return str(path), images


def evaluator_type(name: str) -> str:
    """The kind of a registered or built-in set, by which Detectron2 chooses its evaluator.

    Raises:
        ValueError: there is no such set.
    """
    from detectron2.data import MetadataCatalog

    register_builtin([name])
    require_registered(name)
    return str(MetadataCatalog.get(name).get("evaluator_type", "without a kind"))


def coco_files(name: str) -> tuple[str, str]:
    """The json and the image folder of a COCO-format set that is registered."""
    from detectron2.data import MetadataCatalog

    meta = MetadataCatalog.get(name)
    return meta.json_file, meta.image_root


def _check_other(args: argparse.Namespace) -> int:
    """A registered set of another format: LVIS's, panoptic and semantic label images, what a function returns."""
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog, MetadataCatalog

    add_config(cfg := get_cfg())
    cfg.MODEL.META_ARCHITECTURE = "PD2MaskFormer"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(MetadataCatalog.get(args.name).get("stuff_classes", ()))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ((), (args.name,)) if args.test else ((args.name,), ())
    cfg.DATASETS.ALLOW_FILES_OUTSIDE = args.outside
    try:
        _, problems = check_registered(cfg, args.name)
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    errors = _print(problems, args.per_kind)
    if args.statistics and not errors:
        _print_statistics([record["file_name"] for record in DatasetCatalog.get(args.name)])
    return _count(problems, errors)


def _print_statistics(paths: Sequence[str | Path]) -> None:
    mean, std = pixel_statistics(paths)
    print(f"MODEL.PIXEL_MEAN {mean} MODEL.PIXEL_STD {std}  # INPUT.FORMAT RGB; reversed for BGR")


def _count(problems: Sequence[Problem], errors: int) -> int:
    """Print how many problems there are; the exit code."""
    print(f"{errors} error(s), {len(problems) - errors} warning(s)")
    return 1 if errors else 0


def _print(problems: Sequence[Problem], per_kind: int) -> int:
    """Print the problems; how many of them are errors."""
    for line in summary(problems, per_kind):
        print(line)
    return sum(problem.level == "error" for problem in problems)


def _check(args: argparse.Namespace, json_path: str, images: str) -> int:
    problems = check_coco(json_path, images, Rules(test=args.test, outside=args.outside))
    errors = _print(problems, args.per_kind)
    if not errors:
        data = read_json(json_path)
        annotations = data.get("annotations", [])
        busy = len({annotation["image_id"] for annotation in annotations})
        print(f"{len(data['images'])} images ({len(data['images']) - busy} without objects), "
              f"{len(annotations)} objects, {len(data['categories'])} classes")  # fmt: skip
        if args.statistics:
            _print_statistics([Path(images) / image["file_name"] for image in data["images"]])
        if args.sheet:
            if Path(args.sheet).resolve() in {
                (Path(images) / image["file_name"]).resolve() for image in data["images"]
            }:
                print(f"error: --preview {args.sheet} is an image of the set. Choose another name.", file=sys.stderr)
                return 1
            try:
                contact_sheet(data, images, args.sheet_images).save(args.sheet)
            except (OSError, ValueError) as error:
                print(f"error: --preview {args.sheet}: {error}. Give a .jpg or .png file.", file=sys.stderr)
                return 1
            print(f"wrote {args.sheet}: the first images with their masks")
        else:
            print("To see what was understood, add --preview seen.jpg")
    return _count(problems, errors)


def contact_sheet(data: dict[str, Any], image_root: str | Path, images: int = 24, cell: int = 192) -> Image.Image:
    """The first images of a COCO-format set with their masks, or boxes, in cells of ``cell`` px, six in a row."""
    categories = sorted(data["categories"], key=lambda c: c["id"])
    order, names = {c["id"]: i for i, c in enumerate(categories)}, [c["name"] for c in categories]
    chosen = data["images"][:images]
    objects: dict[Any, list[dict[str, Any]]] = {record["id"]: [] for record in chosen}
    for annotation in data.get("annotations", ()):
        if annotation["image_id"] in objects:
            objects[annotation["image_id"]].append(annotation)
    pictures = []
    for record in chosen:
        image, masks = read_rgb(Path(image_root) / record["file_name"]), []
        for annotation in objects[record["id"]]:
            x, y, w, h = annotation["bbox"]
            form = annotation.get("segmentation") or [[x, y, x + w, y, x + w, y + h, x, y + h]]
            masks.append(segmentation_to_mask(form, *image.shape[:2]))
        labels = [order[annotation["category_id"]] for annotation in objects[record["id"]]]
        pictures.append(Image.fromarray(overlay(image, masks, labels, names if len(names) > 1 else ())))
    return sheet(pictures, cell)


def pixel_statistics(paths: Sequence[str | Path], limit: int = 1000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of red, green and blue over all pixels, 0 to 255.

    Of more than ``limit`` images, as many are taken, evenly spaced. Each is reduced to about 256 px a side first, as
    training reduces them: the deviation of single pixels would count their noise.
    """
    step = max(1, math.ceil(len(paths) / limit))
    count, total, squares = 0, np.zeros(3), np.zeros(3)
    for path in paths[::step]:
        picture = Image.fromarray(read_rgb(path))
        picture.thumbnail((256, 256), Image.Resampling.BOX)
        pixels = np.asarray(picture, dtype=np.float64).reshape(-1, 3)
        count += len(pixels)
        total += pixels.sum(axis=0)
        squares += (pixels**2).sum(axis=0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return [round(float(v), 3) for v in mean], [round(float(v), 3) for v in deviation]


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
