#!/usr/bin/env python3
"""Cityscapes: label images of the training classes, and panoptic labels, by its own package cityscapesscripts.

python tools/prepare_cityscapes.py --workers 8         # $DETECTRON2_DATASETS/cityscapes, or datasets/cityscapes
"""

import sys

from peft_d2.data.label_images import convert_cityscapes
from peft_d2.data.prepare import prepare

if __name__ == "__main__":
    sys.exit(prepare(__doc__, "cityscapes", convert_cityscapes, workers=("processes", 1)))
