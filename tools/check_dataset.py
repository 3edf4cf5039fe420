#!/usr/bin/env python3
"""Check a COCO-format data set before training; exit code 0: no errors, 1: errors.

python tools/check_dataset.py --json train.json --images train/ --sheet train.jpg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from peft_d2.data.checks import check_coco, summary
from peft_d2.data.pictures import contact_sheet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="COCO-format json")
    parser.add_argument("--images", required=True, help="folder that its file names are relative to")
    parser.add_argument("--sheet", help="write a picture of the first images with their masks to this file")
    parser.add_argument("--sheet-images", type=int, default=24, help="how many images it shows")
    parser.add_argument("--per-kind", type=int, default=1_000_000, help="list only so many problems of a kind")
    args = parser.parse_args()
    problems = check_coco(args.json, args.images)
    for line in summary(problems, args.per_kind):
        print(line)
    errors = sum(p.level == "error" for p in problems)
    if not errors:
        data = json.loads(Path(args.json).read_text())
        print(f"{len(data['images'])} images, {len(data['annotations'])} objects, {len(data['categories'])} classes")
        if args.sheet:
            try:
                contact_sheet(data, args.images, args.sheet_images).save(args.sheet)
            except (OSError, ValueError) as error:
                print(f"error: --sheet {args.sheet}: {error}. Give a .jpg or .png file.", file=sys.stderr)
                return 1
            print(f"wrote {args.sheet}")
    print(f"{errors} error(s), {len(problems) - errors} warning(s)")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
