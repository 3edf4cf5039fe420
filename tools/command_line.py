"""What the command lines of several tools share: the config's arguments, KEY VALUE pairs, a file to be written."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from peft_d2.engine.errors import ConfigError


def config_parser(
    description: str, example: str = "", config: str = "e.g. OUTPUT_DIR/config.yaml of a run", required: bool = True
) -> argparse.ArgumentParser:
    """The parser of a tool that runs a config, without the KEY VALUE pairs that come last: see :func:`take_pairs`.

    Args:
        example: what follows the tool's name on the line.
        config: what ``--config-file`` is, for the help.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"an example:\n  %(prog)s {example}" if example else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=required, default="", metavar="FILE", help=config)
    parser.add_argument("--peft-config", default="", metavar="FILE", help="one of configs/peft, on top")
    return parser


def take_pairs(parser: argparse.ArgumentParser, help: str = "config KEY VALUE pairs") -> None:
    """Let a command line end with KEY VALUE pairs, ``args.opts``, with the word ``--opts`` before them or without."""
    parser.add_argument(
        "--opts", action="store_true", dest="pairs_follow", help="KEY VALUE pairs follow; can be left out"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help=help)


def require_output(option: str, file: str, *read: str) -> None:
    """Refuse, before anything is computed, a ``file`` to be written that cannot be, or is one of those that are read.

    Raises:
        ConfigError: naming the command line's ``option``.
    """
    above = next(place for place in (file, *map(str, Path(file).absolute().parents)) if os.path.exists(place))
    same = any(os.path.exists(other) and os.path.samefile(above, other) for other in read if other)
    said = "is a folder" if not file or os.path.isdir(file) else ""
    said = said or ("is read, and would be written over" if above == file and same else "")
    if not said and not (os.access(above, os.W_OK) and (above == file or os.path.isdir(above))):
        said = "cannot be written"
    if said:
        raise ConfigError(f"{option} {file or repr(file)} {said}. Choose another file.")
