#!/usr/bin/env python
"""Train several configs on the same data and set them side by side: a table, a plot of a figure over steps and one of
it over trainable parameters.

    tools/compare.py --configs configs/demo/heads.yaml configs/demo/lora.yaml --seeds 1 2 3 --output output/compared \
        --train-json a.json --train-images a/ --val-json b.json --val-images b/ --opts MODEL.WEIGHTS base.pth

Rows are named after the config files. A comparison that was interrupted goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

from peft_d2.engine.comparison import METRICS, Run, compare, plot_curves, plot_tradeoff, table
from peft_d2.engine.launch import one_line_errors

TRAIN_NET = Path(__file__).with_name("train_net.py")
OWN_DATA = ("train-json", "train-images", "val-json", "val-images", "name")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", required=True, metavar="FILE", help="config files, a row each")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="each config is trained once per seed")
    parser.add_argument("--output", required=True, metavar="DIR", help="gets a folder per run, a table and plots")
    parser.add_argument(
        "--metrics", nargs="+", default=METRICS, help="figures of the table, as metrics.json names them"
    )
    parser.add_argument("--title", default="", help="of the plot")
    for flag in OWN_DATA:
        parser.add_argument(f"--{flag}", help="as in tools/train_net.py")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config KEY VALUE pairs for every run")
    args = parser.parse_args()

    given = {flag: getattr(args, flag.replace("-", "_")) for flag in OWN_DATA}
    own_data = [word for flag, value in given.items() if value for word in (f"--{flag}", value)]
    runs = [Run(Path(config).stem, config, seed) for config in args.configs for seed in args.seeds]
    command = [sys.executable, str(TRAIN_NET), *own_data]
    results = compare(runs, args.output, command, args.opts, args.metrics)
    print(table(results, args.metrics))
    output = Path(args.output)
    (output / "table.md").write_text(table(results, args.metrics) + "\n")
    plot_curves(results, output / "curves.png", args.title, args.metrics[0])
    plot_tradeoff({args.title: results}, output / "tradeoff.png", args.title, args.metrics[0])


if __name__ == "__main__":
    one_line_errors(main)
