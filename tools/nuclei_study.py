#!/usr/bin/env python
"""The command line of earlier releases: runs projects/nuclei/study.py, which has taken its place."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parents[1] / "projects" / "nuclei/study.py"), run_name="__main__")
