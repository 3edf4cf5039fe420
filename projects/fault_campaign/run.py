#!/usr/bin/env python
"""Cause faults on a tiny model, for real, and count how often each promise holds; exit code 1 when one did not.

projects/fault_campaign/run.py --kills 200 --mutations 1000
projects/fault_campaign/run.py --only kills mutations --json counts.json
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "projects"), str(ROOT / "tools")]

from fault_campaign.campaign import main  # noqa: E402

if __name__ == "__main__":
    main()
