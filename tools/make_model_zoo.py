#!/usr/bin/env python
"""Write MODEL_ZOO.md: every config with its parameters, what each method trains, and results that were measured.

Results are kept in docs/measured.json. --check tells whether the file is up to date.
"""

from peft_d2.engine.zoo import main

if __name__ == "__main__":
    main()
