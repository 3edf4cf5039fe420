#!/usr/bin/env python3
"""SSDD, ships in radar images: from the outlines of its PSeg version to COCO's format, in the published split.

python tools/prepare_ssdd.py                           # $DETECTRON2_DATASETS/Official-SSDD-OPEN, or datasets/...
python tools/prepare_ssdd.py --source Official-SSDD-OPEN
"""

import sys

from peft_d2.data.prepare import prepare
from peft_d2.data.remote_sensing import convert_ssdd

if __name__ == "__main__":
    sys.exit(prepare(__doc__, "Official-SSDD-OPEN", convert_ssdd))
