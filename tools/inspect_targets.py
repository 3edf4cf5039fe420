#!/usr/bin/env python
"""Show what PEFT trains in a config's model, or what a pattern would match; needs neither data nor weights.

tools/inspect_targets.py --config-file configs/coco/... --peft-config configs/peft/lora.yaml
tools/inspect_targets.py --config-file configs/coco/... --pattern 'sem_seg_head.*.self_attn'
"""

from peft_d2.engine.launch import one_line_errors
from peft_d2.engine.targets import describe, inspect_parser

if __name__ == "__main__":
    print(one_line_errors(lambda: describe(inspect_parser().parse_args())))
