#!/usr/bin/env python
"""Several adapters against one: a mixed batch, and one image under several adapters, in one process.

    tools/benchmark_adapters.py --config-file configs/coco/instance/mask2former_r50.yaml \
        --peft-config configs/peft/mask2former/lora.yaml --size 320

The base and the adapters are random: times do not depend on their values, but for how many instances are drawn.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from command_line import config_parser, take_pairs

import peft_d2
from peft_d2 import peft
from peft_d2.engine.errors import bounded, one_line_errors
from peft_d2.engine.factory import build_model
from peft_d2.engine.launch import prepare_config


def benchmark_parser() -> argparse.ArgumentParser:
    """The arguments of ``tools/benchmark_adapters.py``."""
    parser = config_parser("Time a mixed batch and predict_with against one adapter.")
    parser.add_argument("--adapters", type=bounded(int, 1), default=8, help="how many, and the size of the batch")
    parser.add_argument("--size", type=bounded(int, 1), default=320, help="side of the images, px")
    parser.add_argument("--runs", type=bounded(int, 1), default=5, help="of each; the fastest counts")
    take_pairs(parser)
    return parser


def ratios(args: argparse.Namespace) -> dict[str, float]:
    """Processor times as ratios to one adapter's: of a ``mixed`` batch, and of one image under ``four`` adapters."""
    cfg = prepare_config(args).clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""
    model = build_model(cfg).eval()
    with tempfile.TemporaryDirectory() as folder:
        names = [f"task{number}" for number in range(args.adapters)]
        for name in names:
            for item in peft.trained_parameters(model):
                item.param.data.add_(0.02 * torch.randn_like(item.param))
            peft_d2.save_adapter(model, Path(folder, name))
        peft.remove(model)
        peft_d2.load_adapters(model, {name: Path(folder, name) for name in names})
    side = args.size
    channels = len(cfg.MODEL.PIXEL_MEAN)
    batch = [{"image": 255 * torch.rand(channels, side, side), "height": side, "width": side} for _ in names]
    mixed = [{**item, "adapter": name} for item, name in zip(batch, names, strict=True)]
    peft_d2.set_adapter(model, names[0])
    with torch.inference_mode():
        one = _fastest(lambda: model(batch), args.runs)
        peft_d2.set_adapter(model, "base")
        several = _fastest(lambda: model(mixed), args.runs)
        alone, four = (_fastest(lambda n=n: model.predict_with(batch[0], names[:n]), args.runs) for n in (1, 4))
    return {"mixed": several / one, "four": four / alone}


def _fastest(run: Callable[[], Any], count: int) -> float:
    """Processor seconds of the fastest of ``count`` runs, after one that does not count."""
    run()
    times = []
    for _ in range(count):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def main(arguments: list[str] | None = None) -> None:
    """Run ``tools/benchmark_adapters.py``."""
    args = benchmark_parser().parse_args(arguments)

    def run() -> None:
        found = ratios(args)
        print(f"a batch of {args.adapters} with {args.adapters} adapters: {found['mixed']:.2f} of one adapter's time")
        print(f"one image under four adapters: {found['four']:.2f} of one adapter's time")

    one_line_errors(run)


if __name__ == "__main__":
    main()
