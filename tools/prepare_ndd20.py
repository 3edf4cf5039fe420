#!/usr/bin/env python3
"""NDD20, dolphins above and below water: from its VIA jsons to COCO's format, with a split into train and test.

python tools/prepare_ndd20.py                          # $DETECTRON2_DATASETS/NDD20, or datasets/NDD20
python tools/prepare_ndd20.py --source NDD20 --splits mine.json
"""

import sys

from peft_d2.data.prepare import prepare
from peft_d2.data.via import convert_ndd20

if __name__ == "__main__":
    text = 'json of {"train": ["ABOVE/1.jpg", ...], "test": [...]}, instead of the split by checksums'
    sys.exit(prepare(__doc__, "NDD20", convert_ndd20, splits=(text, 0)))
