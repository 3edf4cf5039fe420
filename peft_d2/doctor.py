"""``python -m peft_d2.doctor`` is ``peft-d2 doctor``, the program tools/doctor.py."""

import sys

from peft_d2.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["doctor"]))
