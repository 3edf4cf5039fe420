#!/usr/bin/env python
"""Measure COCO evaluation against pycocotools, and the memory of evaluating an image against its forward pass.

    tools/benchmark_evaluation.py --images 500 --detections 100
    tools/benchmark_evaluation.py --memory --height 1024 --width 2048 --detections 100

The first prints CPU seconds, their ratio, and whether the twelve figures are identical; the second peak memory
above what the model itself takes, and the ratio, which ought to be below 1.5.
"""

import argparse
import copy
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--detections", type=int, default=100, help="of each image")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--height", type=int, default=1024, help="of the image whose memory is measured")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--config-file", default=str(ROOT / "configs/coco/instance/mask2former_r50.yaml"))
    parser.add_argument("--part", choices=["forward", "evaluation"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(peak_memory(args))
    elif args.memory:
        command = [sys.executable, *sys.argv]
        parts = {}
        for part in ("forward", "evaluation"):
            done = subprocess.run([*command, "--part", part], stdout=subprocess.PIPE, text=True, check=True)
            parts[part] = int(done.stdout.split()[-1])
        ratio = parts["evaluation"] / parts["forward"]
        print(
            f"{args.width} x {args.height}: forward pass {parts['forward'] / 2**20:.0f} MiB, with {args.detections} "
            f"detections evaluated {parts['evaluation'] / 2**20:.0f} MiB: {ratio:.2f}x"
        )
    else:
        compare_speed(args.images, args.detections)


def compare_speed(images: int, detections: int) -> None:
    """Print CPU seconds of ours and of pycocotools."""
    from evaluation.worlds import pycocotools, random_world

    from peft_d2.evaluation.coco import evaluate_coco

    data, results = random_world(images, detections)
    for task in ("bbox", "segm"):
        seconds, figures = {}, {}
        for name, evaluate in (("ours", evaluate_coco), ("pycocotools", pycocotools)):
            copies = copy.deepcopy(data), copy.deepcopy(results)
            start = time.process_time()
            figures[name] = evaluate(*copies, task).stats[:12].tolist()
            seconds[name] = time.process_time() - start
        print(
            f"{task}: {seconds['ours']:.2f} s, pycocotools {seconds['pycocotools']:.2f} s: "
            f"{seconds['pycocotools'] / seconds['ours']:.1f}x, identical: {figures['ours'] == figures['pycocotools']}"
        )


def peak_memory(args: argparse.Namespace) -> int:
    """Bytes by which a random model's forward pass, or its whole evaluation, exceeds the model alone."""
    import torch

    from peft_d2.engine.config import load_config
    from peft_d2.engine.factory import build_model, register
    from peft_d2.evaluation.coco import instances_to_results

    register(upstream_names=True)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "TEST.DETECTIONS_PER_IMAGE", str(args.detections)]
    model = build_model(load_config(args.config_file, opts=opts).cfg).eval()
    image = torch.randint(0, 256, (3, args.height, args.width), dtype=torch.uint8)
    with torch.no_grad():
        model([{"image": image[:, :64, :64]}])  # what is allocated once for all images
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if args.part == "forward":
            batch = ((image - model.pixel_mean) / model.pixel_std)[None]
            model.predict(model.backbone(batch))
        else:
            instances_to_results(
                model([{"image": image, "height": args.height, "width": args.width}])[0]["instances"], 1
            )
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


if __name__ == "__main__":
    main()
