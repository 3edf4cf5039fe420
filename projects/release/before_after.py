#!/usr/bin/env python3
"""Has a training step, inference or the operator become slower? Two checkouts take turns in one run.

    git worktree add ../before REVISION && (cd ../before && python setup.py -q build_ext --inplace)
    projects/release/before_after.py --before ../before --after .

Each checkout runs in a process of its own, which stays; a block of each kind of work is done in one, then in the other,
in changing order. Processor time of one thread is counted, so that a busy machine disturbs little; the ratio is the
median over the pairs. The model is the tests' Mask2Former (tests/engine/tiny.yaml) with LoRA, on a picture of 256 px.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

BLOCK = 4  # repetitions in one turn
WORKER = """
import logging, sys, time
folder = sys.argv[1]
sys.path.insert(0, folder)
logging.disable(logging.WARNING)
import torch
import peft_d2
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from peft_d2.engine.config import load_config
assert peft_d2.__file__.startswith(folder), peft_d2.__file__
torch.set_num_threads(1)
torch.manual_seed(0)
peft_d2.register()
model = build_model(load_config(folder + "/tests/engine/tiny.yaml").cfg).train()
lora = {"NAME": "lora", "RANK": 4, "TARGETS": ["qkv", "self_attn.value_proj"]}
peft_d2.inject(model, [lora], train=("sem_seg_head.predictor.class_embed",))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
masks = torch.zeros(6, 256, 256, dtype=torch.bool)
for i in range(6):
    masks[i, 30 * i : 30 * i + 60, 20 * i : 20 * i + 80] = True
boxes = BitMasks(masks).get_bounding_boxes()
objects = Instances((256, 256), gt_masks=masks, gt_classes=torch.arange(6), gt_boxes=boxes)
batch = [{"image": torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8), "instances": objects}]
shapes, starts = torch.tensor([[64, 64], [32, 32], [16, 16]]), torch.tensor([0, 4096, 5120])
leaves = [torch.rand(size).requires_grad_() for size in ((1, 5376, 8, 32), (1, 5376, 8, 3, 4, 2), (1, 5376, 8, 3, 4))]

def step():
    optimizer.zero_grad()
    sum(model.train()(batch).values()).backward()
    optimizer.step()

def inference():
    with torch.no_grad():
        model.eval()(batch)

def operator():
    peft_d2.ms_deform_attn(leaves[0], shapes, starts, *leaves[1:]).sum().backward()

work = {"step": step, "inference": inference, "operator": operator}
for function in work.values():
    function()
print("ready", flush=True)
for line in sys.stdin:
    name, count = line.split()
    start = time.process_time()
    for _ in range(int(count)):
        work[name]()
    print(1e3 * (time.process_time() - start) / int(count), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, type=Path, help="a checkout with its operator built")
    parser.add_argument("--after", required=True, type=Path, help="another")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    workers = []
    for folder in (args.before.resolve(), args.after.resolve()):
        command = [sys.executable, "-c", WORKER, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        workers.append(subprocess.Popen(command, **pipes, text=True, env=environment, cwd=folder))
    for worker in workers:
        while (line := worker.stdout.readline()).strip() != "ready":
            if not line:
                raise SystemExit("a checkout does not run; its message stands above")
    times: dict[str, list[list[float]]] = {name: [] for name in ("step", "inference", "operator")}
    for number in range(args.rounds):
        for name, pairs in times.items():
            pair = [0.0, 0.0]
            for index in (0, 1) if number % 2 else (1, 0):
                print(name, BLOCK, file=workers[index].stdin, flush=True)
                pair[index] = float(workers[index].stdout.readline())
            pairs.append(pair)
    print("| | before, best | after, best | after / before |\n|---|---|---|---|")
    for name, pairs in times.items():
        before, after = (min(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(two / one for one, two in pairs)
        print(f"| {name} | {before:.1f} ms | {after:.1f} ms | {ratio:.2f} |")
    for worker in workers:
        worker.stdin.close()
        worker.wait()


if __name__ == "__main__":
    main()
