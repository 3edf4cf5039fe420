#!/usr/bin/env python3
"""Nuclei of the Data Science Bowl 2018 (stage 1 training set, CC0) as COCO-format splits in two domains.

python tools/prepare_dsb2018.py --source stage1_train --output datasets/nuclei
python tools/prepare_dsb2018.py --source stage1_train --output datasets/nuclei --tile 96 --scale 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft_d2.data.dsb2018 import convert
from peft_d2.data.tiles import tile_coco


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
