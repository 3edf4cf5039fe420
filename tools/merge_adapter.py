#!/usr/bin/env python
"""Merge an adapter into its base: one checkpoint that needs no peft_d2 to be loaded.

tools/merge_adapter.py --config-file output/lora/config.yaml --adapter output/lora/adapter_final --output merged.pth
"""

from __future__ import annotations

import argparse

from peft_d2.data.config import base_architecture
from peft_d2.engine.checks import build_model
from peft_d2.engine.errors import ConfigError
from peft_d2.engine.launch import one_line_errors, prepare_config


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
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config KEY VALUE pairs, MODEL.WEIGHTS among them")
    return parser


def merge_adapter(args: argparse.Namespace) -> str:
    """Build, load the base, load the adapter, merge, write; returns the line to print.

    Raises:
        ConfigError: no base weights are named.
        CheckpointError, AdapterFileError, InjectionError: what cannot be loaded or merged, by name.
    """
    from peft_d2 import adapters
    from peft_d2.engine.checkpointer import Checkpointer

    args.peft_config = ""
    cfg = prepare_config(args).clone()
    cfg.defrost()
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("MODEL.WEIGHTS is empty: append MODEL.WEIGHTS and the base checkpoint to the command.")
    cfg.MODEL.META_ARCHITECTURE = base_architecture(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    model = build_model(cfg)
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    adapters.load_adapter(model, args.adapter, allow_other_base=cfg.MODEL.PEFT.ALLOW_OTHER_BASE)
    adapters.save_merged(model, args.output)
    return f"{args.output}: {cfg.MODEL.WEIGHTS} with {args.adapter} merged in, {len(model.state_dict())} tensors"


if __name__ == "__main__":
    print(one_line_errors(lambda: merge_adapter(merge_parser().parse_args())))
