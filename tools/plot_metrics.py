#!/usr/bin/env python
"""Draw losses and AP of one or several runs.

tools/plot_metrics.py output/mine --output curves.png
tools/plot_metrics.py output/lora output/adapters output/full --output compared.svg --smooth 5
"""

from peft_d2.engine.curves import main

if __name__ == "__main__":
    main()
