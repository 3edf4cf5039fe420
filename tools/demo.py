#!/usr/bin/env python
"""Picture a model's predictions for image files or folders.

    tools/demo.py --config-file output/config.yaml --input photos/ --output pictures/ \
        --opts MODEL.WEIGHTS base.pth MODEL.PEFT.WEIGHTS output/adapter_final
"""

from peft_d2.engine.demo import main

if __name__ == "__main__":
    main()
