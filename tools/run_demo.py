#!/usr/bin/env python
"""The demo: adapt the packaged base to the toy world's second domain four ways, and set the four side by side.

    tools/run_demo.py --output output/demo

Needs no download. Prints a table and writes table.md, curves.png (mask AP over steps) and before_after.png (image,
truth, the base as it is, the base with its adapters). An interrupted demo goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

from peft_d2.data import toy
from peft_d2.engine.before_after import draw_before_after
from peft_d2.engine.comparison import Run, compare, plot_curves, table
from peft_d2.engine.launch import one_line_errors

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "demo"
BASE_WEIGHTS = ROOT / "peft_d2" / "assets" / "demo_base.safetensors"
VARIANTS = {
    "heads only": "heads.yaml",
    "LoRA": "lora.yaml",
    "2 adapters": "adapters.yaml",
    "full fine-tuning": "full.yaml",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/demo", metavar="DIR", help="data, runs, table and pictures")
    parser.add_argument("--train-images", type=int, default=200, help="pictures of the second domain to train on")
    parser.add_argument("--seed", type=int, default=1, help="of the trainings")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config KEY VALUE pairs for every run")
    args = parser.parse_args()

    output = Path(args.output).resolve()
    train = toy.generate(output / "data" / "night_train", "night", args.train_images, seed=1)
    val = toy.generate(output / "data" / "night_val", "night", 100, seed=2)
    print(f"{args.train_images} training and 100 validation pictures in {output / 'data'}", flush=True)
    own_data = ["--name", "night", "--train-json", str(train.json), "--train-images", str(train.images)]
    own_data += ["--val-json", str(val.json), "--val-images", str(val.images)]
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), *own_data]
    runs = [Run(name, str(CONFIGS / config), args.seed) for name, config in VARIANTS.items()]
    results = compare(runs, output, command, ["MODEL.WEIGHTS", str(BASE_WEIGHTS), *args.opts])

    print("\n" + table(results) + "\n")
    (output / "table.md").write_text(table(results) + "\n")
    plot_curves(results, output / "curves.png", "Toy world, from day to night")
    adapted = output / "2_adapters"
    draw_before_after(
        before=(str(CONFIGS / "base.yaml"), ["MODEL.WEIGHTS", str(BASE_WEIGHTS)]),
        after=(str(adapted / "config.yaml"), ["MODEL.PEFT.WEIGHTS", str(adapted / "adapter_final")]),
        before_classes=toy.DOMAINS["day"].classes,
        target=output / "before_after.png",
    )
    print(f"pictures: {output / 'before_after.png'} and {output / 'curves.png'}")


if __name__ == "__main__":
    one_line_errors(main)
