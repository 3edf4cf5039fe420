#!/usr/bin/env python3
"""Check a COCO-format data set before training; exit code 0: no errors, 1: errors.

python tools/check_dataset.py --json train.json --images train/ --sheet train.jpg
python tools/check_dataset.py --name ndd20_train --statistics
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from peft_d2.data.coco_json import read_json
from peft_d2.data.pictures import contact_sheet, pixel_statistics
from peft_d2.data.registration import coco_files
from peft_d2.data.validation import check_coco, summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="COCO-format json")
    parser.add_argument("--images", help="folder that its file names are relative to")
    parser.add_argument("--name", help="instead of these, a set that is built in or registered by Detectron2")
    parser.add_argument("--sheet", help="write a picture of the first images with their masks to this file")
    parser.add_argument("--sheet-images", type=int, default=24, help="how many images it shows")
    parser.add_argument("--statistics", action="store_true", help="print MODEL.PIXEL_MEAN and PIXEL_STD of the images")
    parser.add_argument("--per-kind", type=int, default=1_000_000, help="list only so many problems of a kind")
    args = parser.parse_args()
    if bool(args.name) == bool(args.json and args.images):
        parser.error("give --json and --images, or --name")
    try:
        json_path, images = coco_files(args.name) if args.name else (args.json, args.images)
    except ValueError as error:
        parser.error(str(error))
    problems = check_coco(json_path, images)
    for line in summary(problems, args.per_kind):
        print(line)
    errors = sum(p.level == "error" for p in problems)
    if not errors:
        data = read_json(json_path)
        busy = len({annotation["image_id"] for annotation in data["annotations"]})
        print(f"{len(data['images'])} images ({len(data['images']) - busy} without objects), "
              f"{len(data['annotations'])} objects, {len(data['categories'])} classes")  # fmt: skip
        if args.statistics:
            mean, std = pixel_statistics([Path(images) / image["file_name"] for image in data["images"]])
            print(f"MODEL.PIXEL_MEAN {mean} MODEL.PIXEL_STD {std}  # INPUT.FORMAT RGB; reversed for BGR")
        if args.sheet:
            try:
                contact_sheet(data, images, args.sheet_images).save(args.sheet)
            except (OSError, ValueError) as error:
                print(f"error: --sheet {args.sheet}: {error}. Give a .jpg or .png file.", file=sys.stderr)
                return 1
            print(f"wrote {args.sheet}")
    print(f"{errors} error(s), {len(problems) - errors} warning(s)")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
