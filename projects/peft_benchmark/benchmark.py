#!/usr/bin/env python
"""The benchmark of docs/benchmark.md: methods x places on a mask transformer whose backbone has seen ImageNet.

    projects/peft_benchmark/benchmark.py --output output/benchmark --steps 400 --seeds 1 2 3

Row by row as in rows.yaml: one of four rates is chosen on validation pictures, then each seed is trained at that rate
and tested on other pictures. It can be stopped at any time and goes on where it stopped; rows.md always holds every
row, also those that were not run yet. Base and pictures ship with the package.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from compare import METRICS, Result, Run, compare, plot_tradeoff, table  # noqa: E402
from run_demo import BASE_WEIGHTS, CONFIGS, PICTURES, SCALE, TILE  # noqa: E402
from tile_dataset import tile_coco  # noqa: E402

from peft_d2.engine.launch import one_line_errors  # noqa: E402

ROWS = Path(__file__).with_name("rows.yaml")
RATES = (0.00025, 0.0005, 0.001, 0.002)
VALIDATION = 12  # of the 48 training pictures, the last ones
HEADS = ["sem_seg_head.predictor.{class_embed,mask_embed}"]


def main() -> None:
    rows: dict[str, Any] = yaml.safe_load(ROWS.read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", default="output/benchmark", metavar="DIR", help="tiles, runs, rows.md, tradeoff.png"
    )
    parser.add_argument("--images", type=int, default=36, help="pictures to train on, of 36 (few-shot: 10)")
    parser.add_argument("--steps", type=int, default=400, help="of every training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of the tested trainings")
    parser.add_argument("--rows", nargs="+", default=list(rows), choices=list(rows), metavar="ROW", help="only these")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config KEY VALUE pairs for every run")
    args = parser.parse_args()

    output = Path(args.output).resolve()
    parts = {
        "train": pictures(output, "train", slice(args.images)),
        "validation": pictures(output, "train", slice(-VALIDATION, None)),
        "test": pictures(output, "val", slice(None)),
    }
    done: dict[str, list[Result]] = {}
    for name in args.rows:
        done[name] = run_row(name, rows[name], parts, output, args)
        write(rows, done, output)
    print((output / "rows.md").read_text())


def run_row(name: str, row: dict[str, Any], parts: dict[str, Path], output: Path, args: Any) -> list[Result]:
    """Choose the row's rate on validation pictures, then train and test each seed at it."""
    folder = output / "".join(c if c.isalnum() else "_" for c in name)
    folder.mkdir(parents=True, exist_ok=True)
    peft = {"TRAIN": HEADS, "LR_FACTOR": 4.0, **row}
    config = folder / "row.yaml"
    config.write_text(yaml.safe_dump({"_BASE_": str(CONFIGS / "adapt.yaml"), "MODEL": {"PEFT": peft}}))
    shared = [
        "MODEL.WEIGHTS",
        str(BASE_WEIGHTS),
        "SOLVER.MAX_ITER",
        str(args.steps),
        "TEST.EVAL_PERIOD",
        "0",
        *args.opts,
    ]
    runs = [Run(f"rate {rate:g}", str(config), 1, ("SOLVER.BASE_LR", str(rate))) for rate in RATES]
    if peft.get("METHODS") == "auto":  # it chooses its rate itself
        runs = [Run("own rate", str(config), 1)]
    trials = compare(runs, folder / "trials", command(parts, "validation"), shared)
    chosen = max(trials, key=lambda trial: trial.metrics[METRICS[0]])
    opts = next(run.opts for run in runs if run.name == chosen.name)
    (folder / "chosen.json").write_text(json.dumps({t.name: t.metrics[METRICS[0]] for t in trials}, indent=1))
    tests = [Run(f"seed {seed}", str(config), seed, opts) for seed in args.seeds]
    results = compare(tests, folder / "tests", command(parts, "test"), shared)
    for result in results:
        result.name = name
    return results


def command(parts: dict[str, Path], tested: str) -> list[str]:
    """The training program on the training part, evaluated on ``tested``."""
    arguments = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--name", "histology"]
    for split, part in (("train", "train"), ("val", tested)):
        folder = parts[part]
        arguments += [f"--{split}-json", str(folder / "annotations.json"), f"--{split}-images", str(folder / "images")]
    return arguments


def pictures(output: Path, split: str, chosen: slice) -> Path:
    """Some pictures of a split, cut into tiles where that is not done yet."""
    folder = output / "tiles" / f"{split}_{chosen.start}_{chosen.stop}".replace("None", "")
    if not (folder / "annotations.json").exists():
        content = json.loads((PICTURES / f"{split}.json").read_text())
        content["images"] = content["images"][chosen]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pictures.json").write_text(json.dumps(content))
        tile_coco(folder / "pictures.json", PICTURES / split, folder, tile=TILE, scale=SCALE)
    return folder


def write(rows: dict[str, Any], done: dict[str, list[Result]], output: Path) -> None:
    """rows.md with every row, those of ``done`` with their figures, and tradeoff.png."""
    results = [result for row in done.values() for result in row]
    waiting = [f"| {name} | not run |" + " |" * 6 for name in rows if name not in done]
    (output / "rows.md").write_text("\n".join([table(results), *waiting]) + "\n")
    plot_tradeoff({"Mask2Former": results}, output / "tradeoff.png", "From fluorescence to histology", METRICS[0])


if __name__ == "__main__":
    one_line_errors(main)
