#!/usr/bin/env python
"""The command line of earlier releases: runs projects/model_zoo/zoo.py, which has taken its place."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parents[1] / "projects" / "model_zoo/zoo.py"), run_name="__main__")
