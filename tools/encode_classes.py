#!/usr/bin/env python
"""Encode class names with SEEM's text encoder, once; training and evaluation then read the file alone.

tools/encode_classes.py --weights seem_focalt_v1.pt --names cell nucleus --output cells.safetensors
tools/encode_classes.py --weights seem_focalt_v1.pt --annotations train.json --tokenizer clip/ --output my.safetensors
"""

from peft_d2.engine.class_encoding import encode, encode_parser
from peft_d2.engine.launch import one_line_errors

if __name__ == "__main__":
    print(one_line_errors(lambda: encode(encode_parser().parse_args())))
