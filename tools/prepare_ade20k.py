#!/usr/bin/env python3
"""ADE20K's scene parsing challenge: semantic labels, instances and panoptic labels as Mask2Former's configs read them.

python tools/prepare_ade20k.py --workers 8             # $DETECTRON2_DATASETS/ADEChallengeData2016, or datasets/...

Instances and panoptic labels need annotations_instance, which is published apart (ChallengeData2017).
"""

import sys

from peft_d2.data.label_images import convert_ade20k
from peft_d2.data.prepare import prepare

if __name__ == "__main__":
    sys.exit(prepare(__doc__, "ADEChallengeData2016", convert_ade20k, workers=("processes", 1)))
