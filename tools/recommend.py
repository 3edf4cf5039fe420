#!/usr/bin/env python
"""Recommend what to train of a model on given data: methods, places, ranks and a rate, as a file for --peft-config.

One pass of gradients over some batches ranks the places, and a few steps at each of four rates choose the rate. What
the config's TRAIN names (new heads) is trained in full and counts; its METHODS do not.
"""

from __future__ import annotations

import argparse

from command_line import config_parser, require_output, take_pairs

from peft_d2.engine.errors import ConfigError, bounded, one_line_errors
from peft_d2.engine.launch import prepare_config
from peft_d2.storage import disk


def main(arguments: list[str] | None = None) -> None:
    """Run ``tools/recommend.py``."""
    args = recommend_parser().parse_args(arguments)

    def run() -> None:
        if args.output:
            require_output("--output", args.output, args.config_file, args.peft_config, args.train_json)
        print(text := recommended(args))
        if args.output:
            disk.write_bytes(args.output, text.encode())

    one_line_errors(run)


def recommend_parser() -> argparse.ArgumentParser:
    """The arguments of ``tools/recommend.py``."""
    example = """--config-file configs/nuclei/efficientnet/adapt.yaml --train-json a.json \\
    --train-images a/ --output recommended.yaml MODEL.WEIGHTS base.pth"""
    parser = config_parser(str(__doc__), example, "a model's config, or a PEFT run's")
    parser.add_argument("--train-json", default="", metavar="FILE", help="annotations, COCO format")
    parser.add_argument("--train-images", default="", metavar="DIR", help="folder of the images")
    parser.add_argument("--train-data", default="", metavar="DIR", help="instead: a folder; its format is recognised")
    parser.add_argument("--name", default="own", help="what the data set is called: NAME_train")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--percent", type=bounded(float, 0, 100), help="of the parameters to train (MODEL.PEFT.BUDGET)")
    budget.add_argument("--memory", type=bounded(float, 0), metavar="MIB", help="for what is trained, moments included")
    parser.add_argument("--output", default="", metavar="FILE", help="write it there, too")
    take_pairs(parser)
    return parser


def recommended(args: argparse.Namespace) -> str:
    """The text of the file.

    Raises:
        ConfigError: no data, what no training would begin with, or a budget that is too small.
    """
    from peft_d2.engine.checks import check_run
    from peft_d2.engine.config import with_values
    from peft_d2.engine.recommend import BYTES, advise, explained, require_own

    if args.percent is not None:
        args.opts = [*args.opts, "MODEL.PEFT.BUDGET", str(float(args.percent))]
    cfg = prepare_config(args)
    require_own(args.output)
    if not cfg.DATASETS.TRAIN:
        raise ConfigError(
            "DATASETS.TRAIN is empty: give --train-json and --train-images, --train-data, or name registered data sets."
        )
    check_run(with_values(cfg, {"DATASETS.TEST": ()}), evaluate=False, writes=False)
    most = 0 if args.memory is None else max(1, int(args.memory * 2**20 / BYTES))
    return explained(*advise(cfg, most))


if __name__ == "__main__":
    main()
