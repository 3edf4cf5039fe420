#!/usr/bin/env python
"""What this environment has, what is missing, and the remedy: ``python -m peft_d2.doctor``."""

import sys

from peft_d2.doctor import main

if __name__ == "__main__":
    sys.exit(main())
