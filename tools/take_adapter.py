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
from pathlib import Path
from typing import Any

import peft_d2
from peft_d2.data.config import PEFT_ARCHITECTURE
from peft_d2.engine.errors import ConfigError
from peft_d2.engine.factory import PEFTModel
from peft_d2.engine.launch import one_line_errors
from peft_d2.ops.official import serve_official
from peft_d2.storage import atomic


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
    parser.add_argument("--adapter", metavar="DIR", help="write the adapter's folder there")
    parser.add_argument("--merged", metavar="FILE", help="write a checkpoint with the base's keys there (.pth)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config KEY VALUE pairs, MODEL.WEIGHTS among them")
    return parser


def their_config(args: argparse.Namespace) -> Any:
    """Detectron2's defaults, their keys, ``MODEL.PEFT``, then the file and the pairs.

    Raises:
        ConfigError: a function that cannot be imported, or a config without an adapter.
    """
    from detectron2.config import get_cfg

    cfg = get_cfg()
    serve_official()
    sys.path.insert(0, os.getcwd())  # where their train_net.py is started
    for adder in args.adders:
        module, _, name = adder.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
            cfg = function() if not inspect.signature(function).parameters else function(cfg) or cfg
        except (ImportError, AttributeError, ValueError) as error:
            said = " ".join(str(error).split())
            raise ConfigError(
                f"--import {module}:{name}: {said}. Expected PKG.MOD:FN, a function of a config."
            ) from error
    peft_d2.register()
    peft_d2.add_config(cfg, models=False)
    try:
        cfg.merge_from_file(args.config_file, allow_unsafe=False)
        cfg.merge_from_list(args.opts)
    except (KeyError, OSError, AssertionError, ValueError) as error:
        raise ConfigError(f"{args.config_file}: {error}. Name the functions that add its keys: --import.") from error
    if cfg.MODEL.META_ARCHITECTURE != PEFT_ARCHITECTURE:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, not {PEFT_ARCHITECTURE}: this run's adapter "
            "is not in its config. Use peft_d2.load_trained in the code that injected it."
        )
    return cfg


def take_adapter(args: argparse.Namespace) -> list[str]:
    """Build and inject as in training, load, write; returns the files.

    Raises:
        ConfigError: nothing to write, or as :func:`their_config`.
        CheckpointError, InjectionError: what cannot be loaded or merged, by name.
    """
    if not (args.adapter or args.merged):
        raise ConfigError("there is nothing to write: name --adapter, --merged or both.")
    cfg = their_config(args)
    on_cpu = cfg.clone()
    on_cpu.MODEL.DEVICE = "cpu"
    model = PEFTModel(on_cpu)
    peft_d2.load_trained(model, args.checkpoint)
    written = []
    if args.adapter:
        peft_d2.save_adapter(model, args.adapter)
        written.append(args.adapter)
    if args.merged:
        peft_d2.save_merged(model, args.merged)
        plain = cfg.clone()
        plain.MODEL.META_ARCHITECTURE, plain.MODEL.WEIGHTS = cfg.MODEL.PEFT.META_ARCHITECTURE, args.merged
        del plain.MODEL["PEFT"]
        beside = Path(args.merged).with_suffix(".yaml")
        atomic.write_bytes(beside, plain.dump().encode())
        written += [args.merged, str(beside)]
    return written


def main(arguments: list[str] | None = None) -> None:
    """Run ``tools/take_adapter.py``."""
    args = take_parser().parse_args(arguments)
    print(*one_line_errors(lambda: take_adapter(args)), sep="\n")


if __name__ == "__main__":
    main()
