#!/usr/bin/env python
"""An adapter folder, or a checkpoint without adapters, out of what somebody else's trainer saved.

    tools/take_adapter.py --config-file output/config.yaml --checkpoint output/model_final.pth \
        --import mask2former:add_maskformer2_config --adapter adapter --merged merged.pth

The config is the run's, with ``MODEL.PEFT``; ``--import`` names the functions that add their own keys, as their
``train_net.py`` calls them (or one that makes the config, such as ``adet.config:get_cfg``), and so registers their
models. Beside ``merged.pth`` comes ``merged.yaml``, which their code reads without this package.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from typing import Any

from command_line import take_pairs

from peft_d2.engine import convert
from peft_d2.engine.config import add_config
from peft_d2.engine.errors import ConfigError, one_line_errors
from peft_d2.engine.factory import register
from peft_d2.ops.official import serve_official


def take_parser() -> argparse.ArgumentParser:
    """The arguments of ``tools/take_adapter.py``."""
    parser = argparse.ArgumentParser(
        description="Make an adapter's folder or a merged checkpoint of what somebody else's trainer saved.",
        epilog="an example:\n  %(prog)s --config-file output/config.yaml --checkpoint output/model_final.pth \\\n"
        "    --import mask2former:add_maskformer2_config --adapter output/adapter",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the run's config.yaml")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="what the trainer saved: model_final.pth")
    parser.add_argument("--import", dest="adders", action="append", default=[], metavar="PKG.MOD:FN",
                        help="a function that adds their keys to a config; several in their order")  # fmt: skip
    parser.add_argument("--adapter", default="", metavar="DIR", help="write the adapter's folder there")
    parser.add_argument("--merged", default="", metavar="FILE",
                        help="write a checkpoint with the base's keys there (.pth)")  # fmt: skip
    take_pairs(parser)
    return parser


def their_config(config_file: str, adders: Sequence[str], opts: Sequence[str] = ()) -> Any:
    """A config of somebody else's code: Detectron2's defaults, their keys, ``MODEL.PEFT``, then the file and the pairs.

    Args:
        config_file: a yaml of theirs, or the ``config.yaml`` of a run.
        adders: ``PKG.MOD:FN``, functions that add keys to a config, or make one, as their program calls them.
        opts: KEY VALUE pairs.

    Raises:
        ConfigError: a function that cannot be imported, a file that cannot be read, a key that nobody has added.
    """
    from detectron2.config import get_cfg

    cfg = get_cfg()
    serve_official()
    for adder in adders:
        module, _, name = adder.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
            cfg = function() if not inspect.signature(function).parameters else function(cfg) or cfg
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())
            raise ConfigError(f"--import {adder}: {said}. Expected PKG.MOD:FN, a function of a config.") from error
    register()
    add_config(cfg, models=False)
    for where, read in (
        (config_file, lambda: cfg.merge_from_file(config_file, allow_unsafe=False)),
        ("KEY VALUE pairs", lambda: cfg.merge_from_list(list(opts))),
    ):
        try:
            read()
        except (KeyError, OSError, AssertionError, ValueError) as error:
            said = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
            hint = "Name the functions that add its keys: --import; peft_d2:add_config is the one for our own models."
            raise ConfigError(f"{where}: {said}. {hint if isinstance(error, KeyError) else ''}".strip()) from error
    return cfg


def take_adapter(args: argparse.Namespace) -> list[str]:
    """Take what the arguments ask for; returns the files."""
    sys.path.insert(0, os.getcwd())  # where their train_net.py is started
    cfg = their_config(args.config_file, args.adders, args.opts)
    return convert.take_adapter(cfg, args.checkpoint, args.adapter, args.merged)


def main(arguments: list[str] | None = None) -> None:
    """Run ``tools/take_adapter.py``."""
    args = take_parser().parse_args(arguments)
    print(*one_line_errors(lambda: take_adapter(args)), sep="\n")


if __name__ == "__main__":
    main()
