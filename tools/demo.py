#!/usr/bin/env python
"""Picture a model's predictions for image files or folders.

    tools/demo.py --config-file output/config.yaml --input photos/ --output pictures/ \
        --opts MODEL.WEIGHTS base.pth MODEL.PEFT.WEIGHTS output/adapter_final
"""

from peft_d2.engine.demo import demo_parser, picture
from peft_d2.engine.launch import one_line_errors

if __name__ == "__main__":
    one_line_errors(lambda: picture(demo_parser().parse_args()))
