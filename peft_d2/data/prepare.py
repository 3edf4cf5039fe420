"""The command line that the converters share."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping

from peft_d2.data.builtin import root


def prepare(
    description: str, folder: str, convert: Callable[..., Mapping[str, int]], **options: tuple[str, int]
) -> int:
    """Run a converter on the command line's arguments.

    Args:
        description: for ``--help``.
        folder: of the published files, below the folder of all data sets; ``--source`` names another.
        convert: takes the source and the options, and returns how many entries each written file has.
        options: help and default of each; one whose default is 0 is passed on as None where it is not given.

    Returns:
        The exit code: 0, or 1 after a line that says what is wrong with the source.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=str(root() / folder), help="the unpacked folder, which gets the new files")
    for name, (text, default) in options.items():
        kind = int if default else str
        parser.add_argument(f"--{name}", help=text, type=kind, default=default or None)
    arguments = vars(parser.parse_args())
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        counts = convert(arguments.pop("source"), **arguments)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path, count in counts.items():
        print(f"{path}: {count}")
    return 0
