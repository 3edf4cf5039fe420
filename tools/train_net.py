#!/usr/bin/env python
"""Train or evaluate: Detectron2's train_net.py, with PEFT, own data in one command, and safe checkpoints.

tools/train_net.py --config-file configs/coco/... --peft-config configs/peft/mask2former/lora.yaml MODEL.WEIGHTS b.pkl
tools/train_net.py --config-file ... --train-json a.json --train-images a/ --val-json b.json --val-images b/
tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS base.pkl MODEL.PEFT.WEIGHTS output/adapter_final
"""

from peft_d2.engine.launch import main

if __name__ == "__main__":
    main()
