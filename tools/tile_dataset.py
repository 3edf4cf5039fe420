#!/usr/bin/env python3
"""Cut a COCO-format data set into enlarged tiles.

python tools/tile_dataset.py --json train.json --images train/ --output tiles/train --tile 96 --scale 2
"""

from __future__ import annotations

import argparse
import sys

from peft_d2.data.images import set_pixel_limit
from peft_d2.data.tiles import tile_coco


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="COCO-format json")
    parser.add_argument("--images", required=True, help="folder of its images")
    parser.add_argument("--output", required=True, help="folder to write annotations.json and images/ to")
    parser.add_argument("--tile", type=int, default=96, help="side of a tile in px of the source")
    parser.add_argument("--scale", type=float, default=2.0, help="factor by which tiles are enlarged")
    parser.add_argument("--overlap", type=int, default=0, help="least overlap of neighbouring tiles in px")
    parser.add_argument("--min-area", type=float, default=12.0, help="drop cut-off parts below this many source px")
    parser.add_argument("--max-pixels", type=int, default=0, help="of an image, where Pillow's limit is too low")
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


if __name__ == "__main__":
    sys.exit(main())
