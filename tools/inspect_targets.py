#!/usr/bin/env python
"""Show what PEFT trains in a config's model, or what a pattern would match; needs neither data nor weights.

tools/inspect_targets.py --config-file configs/coco/... --peft-config configs/peft/mask2former/lora.yaml
tools/inspect_targets.py --config-file configs/coco/... --pattern 'sem_seg_head.*.self_attn'
"""

from peft_d2.engine.targets import main

if __name__ == "__main__":
    main()
