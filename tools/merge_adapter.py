#!/usr/bin/env python
"""Merge an adapter into its base and write one checkpoint, which the base's own code loads as any other.

tools/merge_adapter.py --config-file FILE --adapter DIR --output merged.pth MODEL.WEIGHTS base.pth
"""

from peft_d2.engine.launch import one_line_errors
from peft_d2.engine.merging import merge_adapter, merge_parser

if __name__ == "__main__":
    print(one_line_errors(lambda: merge_adapter(merge_parser().parse_args())))
