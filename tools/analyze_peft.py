#!/usr/bin/env python
"""Measure PEFT configs beside full fine-tuning: trainable share, step time, memory, file size, inference, merged.

    tools/analyze_peft.py --config-file configs/coco/instance/mask2former_swin_t.yaml \
        --peft-config configs/peft/mask2former/lora.yaml configs/peft/mask2former/heads.yaml --json figures.json
"""

from peft_d2.engine.analysis import main

if __name__ == "__main__":
    main()
