#!/usr/bin/env python3
"""COCO panoptic: semantic labels of its panoptic images, for evaluating all three tasks at once.

python tools/prepare_coco_panoptic.py --workers 8      # $DETECTRON2_DATASETS/coco, or datasets/coco
"""

import sys

from peft_d2.data.label_images import convert_coco_panoptic
from peft_d2.data.prepare import prepare

if __name__ == "__main__":
    sys.exit(prepare(__doc__, "coco", convert_coco_panoptic, workers=("processes", 1)))
