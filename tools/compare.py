#!/usr/bin/env python
"""Train several configs on the same data and set them side by side: a table, and a plot of mask AP over steps.

    tools/compare.py --configs configs/nuclei/mask2former/heads.yaml configs/nuclei/mask2former/lora.yaml --seeds 1 2 3 --output output/nuclei \
        --train-json a.json --train-images a/ --val-json b.json --val-images b/ --opts MODEL.WEIGHTS base.pth

Rows are named after the config files. A comparison that was interrupted goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

from peft_d2.engine.comparison import Run, compare, plot_curves, table
from peft_d2.engine.launch import one_line_errors

TRAIN_NET = Path(__file__).with_name("train_net.py")
OWN_DATA = ("train-json", "train-images", "val-json", "val-images", "name")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", required=True, metavar="FILE", help="config files, a row each")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="each config is trained once per seed")
    parser.add_argument("--output", required=True, metavar="DIR", help="gets a folder per run, a table and a plot")
    parser.add_argument("--title", default="", help="of the plot")
    for flag in OWN_DATA:
        parser.add_argument(f"--{flag}", help="as in tools/train_net.py")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config KEY VALUE pairs for every run")
    args = parser.parse_args()

    given = {flag: getattr(args, flag.replace("-", "_")) for flag in OWN_DATA}
    own_data = [word for flag, value in given.items() if value for word in (f"--{flag}", value)]
    runs = [Run(Path(config).stem, config, seed) for config in args.configs for seed in args.seeds]
    results = compare(runs, args.output, [sys.executable, str(TRAIN_NET), *own_data], args.opts)
    print(table(results))
    Path(args.output, "table.md").write_text(table(results) + "\n")
    plot_curves(results, Path(args.output, "curves.png"), args.title)


if __name__ == "__main__":
    one_line_errors(main)
