#!/usr/bin/env python
"""Make the demo's pretrained base again: generate the toy world's first domain, train on it, store it in float16.

    tools/make_demo_base.py --output output/demo_base

Writes ``peft_d2/assets/demo_base.safetensors`` and the training's log beside it. Takes about ten minutes on two cores.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from safetensors.torch import save_file

from peft_d2.data import toy
from peft_d2.storage import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "peft_d2" / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/demo_base", metavar="DIR", help="data, checkpoints and logs")
    parser.add_argument("--images", type=int, default=2000, help="training images to generate")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config KEY VALUE pairs")
    args = parser.parse_args()

    output = Path(args.output).resolve()
    train = toy.generate(output / "day_train", "day", args.images, seed=1)
    val = toy.generate(output / "day_val", "day", 100, seed=2)
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--resume"]
    command += ["--config-file", str(ROOT / "configs" / "demo" / "base.yaml"), "--name", "day"]
    command += ["--train-json", str(train.json), "--train-images", str(train.images)]
    command += ["--val-json", str(val.json), "--val-images", str(val.images)]
    subprocess.run([*command, "OUTPUT_DIR", str(output), "SEED", "1", *args.opts], check=True)

    state = read_checkpoint(output / "model_final.pth").state
    halved = {k: v.half().contiguous() if v.is_floating_point() else v.contiguous() for k, v in state.items()}
    ASSETS.mkdir(exist_ok=True)
    base = ASSETS / "demo_base.safetensors"
    save_file(halved, base)
    lines = (output / "log.txt").read_text().splitlines()
    kept = [line for line in lines if any(mark in line for mark in ("Optimizer ", "eta: ", "copypaste: "))]
    base.with_suffix(".log").write_text("\n".join(kept) + "\n")
    print(f"wrote {base}: {base.stat().st_size / 1e6:.1f} MB, {sum(v.numel() for v in state.values()):,} numbers")


if __name__ == "__main__":
    main()
