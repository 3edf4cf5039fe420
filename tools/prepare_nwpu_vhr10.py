#!/usr/bin/env python3
"""NWPU VHR-10, ten classes in aerial images: its masks' json split into train and val.

python tools/prepare_nwpu_vhr10.py                     # $DETECTRON2_DATASETS/NWPU VHR-10 dataset, or datasets/...
python tools/prepare_nwpu_vhr10.py --masks annotations.json
python tools/prepare_nwpu_vhr10.py --masks none        # the boxes of the original release, without masks
"""

import sys

from peft_d2.data.prepare import prepare
from peft_d2.data.remote_sensing import convert_nwpu_vhr10

if __name__ == "__main__":
    code = prepare(
        __doc__,
        "NWPU VHR-10 dataset",
        convert_nwpu_vhr10,
        masks=("json of the masks; default annotations.json in the source; none: boxes alone", 0),
        splits=('json of {"train": ["001.jpg", ...], "val": [...]}, instead of the split by checksums', 0),
    )
    sys.exit(code)
