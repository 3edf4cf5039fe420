"""``python -m peft_d2.ops serve``: other people's code finds our operator under the name that it imports."""

from __future__ import annotations

import argparse
import sys

from peft_d2.ops import official


def main() -> int:
    """Install or remove the file that serves ``MultiScaleDeformableAttention``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m peft_d2.ops", description=__doc__)
    parser.add_argument("action", choices=("serve", "remove"), help="for the environment that runs this command")
    action = parser.parse_args().action
    try:
        print(f"{'written' if action == 'serve' else 'removed'}: "
              f"{official.install() if action == 'serve' else official.remove()}")  # fmt: skip
    except OSError as error:
        print(f"peft_d2.ops: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
