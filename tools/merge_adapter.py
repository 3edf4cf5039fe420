#!/usr/bin/env python
"""Merge an adapter into its base: one checkpoint that needs no peft_d2 to be loaded.

tools/merge_adapter.py --config-file output/lora/config.yaml --adapter output/lora/adapter_final --output merged.pth

For somebody else's code ``--import`` names the functions that add its keys, as its ``train_net.py`` calls them; beside
``merged.pth`` comes ``merged.yaml`` then, which that code reads without this package.
"""

from __future__ import annotations

import argparse
import os
import sys

from command_line import require_output, take_pairs
from take_adapter import their_config

from peft_d2.data.config import PEFT_ARCHITECTURE, base_architecture
from peft_d2.engine import convert
from peft_d2.engine.config import with_values
from peft_d2.engine.errors import ConfigError, one_line_errors
from peft_d2.engine.factory import build_model
from peft_d2.engine.launch import prepare_config
from peft_d2.storage import AdapterFileError


def merge_parser() -> argparse.ArgumentParser:
    """The arguments of ``tools/merge_adapter.py``."""
    example = "--config-file output/mine/config.yaml --adapter output/mine/adapter_final --output merged.pth"
    parser = argparse.ArgumentParser(
        description="Merge an adapter into its base: one checkpoint with the base's keys, which needs no peft_d2.",
        epilog=f"an example:\n  %(prog)s {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the base's or the PEFT run's config")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter's folder")
    parser.add_argument("--output", required=True, metavar="FILE", help="the checkpoint to write (.pth)")
    parser.add_argument("--import", dest="adders", action="append", default=[], metavar="PKG.MOD:FN",
                        help="adds somebody else's keys to a config; several in their order")  # fmt: skip
    take_pairs(parser, "config KEY VALUE pairs, MODEL.WEIGHTS among them")
    return parser


def merge_adapter(args: argparse.Namespace) -> str:
    """Merge what the arguments ask for; returns the line to print.

    Raises:
        ConfigError: no base weights are named, or a file would be written over.
        CheckpointError, AdapterFileError, InjectionError: what cannot be loaded or merged, by name.
    """
    if args.adders:
        sys.path.insert(0, os.getcwd())  # where their train_net.py is started
        cfg = their_config(args.config_file, args.adders, args.opts)
    else:
        args.peft_config = ""
        cfg = prepare_config(args, reads=())
    empty = "MODEL.WEIGHTS is empty: append MODEL.WEIGHTS and the base checkpoint to the command."
    if not cfg.MODEL.WEIGHTS and cfg.SEED < 0:
        raise ConfigError(empty)
    require_output("--output", args.output, args.config_file, cfg.MODEL.get("TIMM", {}).get("WEIGHTS", ""))
    beside = convert.merged_place(args.output, cfg.MODEL.WEIGHTS, with_config=bool(args.adders))
    values = {
        "MODEL.DEVICE": "cpu",
        "MODEL.META_ARCHITECTURE": PEFT_ARCHITECTURE,
        "MODEL.PEFT.META_ARCHITECTURE": base_architecture(cfg),
        "MODEL.PEFT.METHODS": [],
        "MODEL.PEFT.TRAIN": [],
        "MODEL.PEFT.WEIGHTS": args.adapter,
    }
    try:
        model = build_model(with_values(cfg, values))
    except AdapterFileError as error:
        if cfg.MODEL.WEIGHTS:
            raise
        raise ConfigError(f"{empty} Without it, on the base that SEED {cfg.SEED} gives, {error}") from error
    written = convert.write_merged(model, cfg, args.output, beside)
    base = cfg.MODEL.WEIGHTS or f"the base of SEED {cfg.SEED}"
    return f"{' and '.join(written)}: {base} with {args.adapter} merged in"


if __name__ == "__main__":
    print(one_line_errors(lambda: merge_adapter(merge_parser().parse_args())))
