"""What a training step takes in this process: resident memory above the idle model, and processor time.

``python projects/memory/measure.py CONFIG [--peft-config FILE] [--budget GIB] [--size 512] [--opts KEY VALUE ...]``;
without ``--peft-config`` everything is trained. One run is one row of docs/memory.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.events import EventStorage

from peft_d2.engine.checks import build_model
from peft_d2.engine.launch import prepare_config
from peft_d2.engine.optimizer import build_optimizer
from peft_d2.engine.step import TrainStep, amp_dtype
from peft_d2.memory import fit_memory
from peft_d2.memory.blocks import return_freed_memory
from peft_d2.memory.meter import ProcessPeak

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from analyze_peft import random_sample


def main() -> None:
    """Take the steps and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--peft-config", default="")
    parser.add_argument("--budget", type=float)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--opts", nargs="*", default=[])
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    everything = [] if args.peft_config else ["MODEL.PEFT.TRAIN", "['*']"]
    opts = [*args.opts, "MODEL.WEIGHTS", "", "SOLVER.AMP.ENABLED", "False", *everything]
    cfg = prepare_config(argparse.Namespace(config_file=args.config, peft_config=args.peft_config, opts=opts))
    model = build_model(cfg).train()
    batch = [random_sample(args.size, 8)]
    if args.budget:
        print(fit_memory(model, batch, args.budget))
    optimizer = build_optimizer(cfg, model)
    step = TrainStep(model, _forever(batch), optimizer, amp_dtype(cfg))
    return_freed_memory()
    seconds = []
    with ProcessPeak() as peak, EventStorage(0) as storage:
        step.storage = storage
        for number in range(args.steps):
            torch.manual_seed(number)
            before = os.times()
            step.run_step()
            after = os.times()
            seconds.append(round(after.user + after.system - before.user - before.system, 2))
    name = f"{Path(args.config).stem}, {args.peft_config or 'full'}, budget {args.budget}"
    print(f"{name}: {peak.bytes / 2**20:.0f} MiB above idle, processor seconds {seconds}")


def _forever(batch: Any) -> Any:
    while True:
        yield batch


if __name__ == "__main__":
    main()
