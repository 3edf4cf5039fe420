#!/usr/bin/env python
"""Measure PEFT configs beside full fine-tuning: trainable share, step time, memory, file size, inference, merged.

    tools/analyze_peft.py --config-file configs/coco/instance/mask2former_swin_t.yaml \
        --peft-config configs/peft/lora_mask2former.yaml configs/peft/heads_mask2former.yaml --json figures.json
"""

from peft_d2.engine.analysis import main

if __name__ == "__main__":
    main()
