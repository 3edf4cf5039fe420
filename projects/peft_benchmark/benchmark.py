#!/usr/bin/env python
"""The benchmark of docs/benchmark.md: methods x places on models whose backbone has seen ImageNet.

    projects/peft_benchmark/benchmark.py --output output/benchmark --steps 400 --seeds 1 2 3

Row by row as in the model's file of rows: one of four rates is chosen on validation pictures, then each seed is trained
at that rate and tested on other pictures. It can be stopped at any time and goes on where it stopped; rows.md always
holds every row, also those that were not run yet, and how what is recommended did. The pictures ship with the package,
and so does the base of Mask2Former; the others' are trained first, on fluorescence (--nuclei).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "projects" / "nuclei")]
import toy  # noqa: E402
from compare import METRICS, RESULT_FILE, Result, Run, compare, plot_tradeoff, table  # noqa: E402
from run_demo import BASE_WEIGHTS, PICTURES, SCALE, TILE  # noqa: E402
from study import PROMPTED_METRICS, TRAIN_NET, own_data, run_base  # noqa: E402
from tile_dataset import tile_coco  # noqa: E402

from peft_d2.engine.errors import ConfigError, one_line_errors  # noqa: E402

RATES = (0.00025, 0.0005, 0.001, 0.002)
VALIDATION = 12  # of the 48 training pictures, the last ones
HEADS = ["sem_seg_head.predictor.{class_embed,mask_embed}"]
SHARE = 6.0  # percent that what is recommended may train, and the rows by hand that it is compared with
TOY = {"toy": "night", "toy_day": "day"}  # the recommender's check: drawn shapes, domain
TOY_PARTS = {"train": (36, 1), "validation": (24, 2), "test": (48, 3)}  # pictures, seed
TOY_SIZE = 96  # px
_SIZES = [f"INPUT.{side}_SIZE_{part}" for side in ("MIN", "MAX") for part in ("TRAIN", "TEST")]
TOY_OPTS = [word for key in _SIZES for word in (key, f"({TOY_SIZE},)" if key == _SIZES[0] else str(TOY_SIZE))]


class Model(NamedTuple):
    """``folder`` of configs/nuclei, file of ``rows``, what all of them ``train``, figures, and if the base ships."""

    folder: str
    rows: str
    train: list[str]
    metrics: tuple[str, ...] = METRICS
    ships: bool = False


MODELS = {
    "mask2former": Model("efficientnet", "rows.yaml", HEADS, ships=True),
    "mask_dino": Model("efficientnet_mask_dino", "rows_mask_dino.yaml", [HEADS[0].replace("}", ",bbox_embed}")]),
    "sam": Model("efficientnet_sam", "rows_sam.yaml", ["mask_decoder"], PROMPTED_METRICS),
}


def rows_of(model: Model) -> dict[str, Any]:
    """Name -> what ``MODEL.PEFT`` says in that row beside the heads."""
    return yaml.safe_load(Path(__file__).with_name(model.rows).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mask2former", choices=list(MODELS))
    parser.add_argument(
        "--task", default="histology", choices=["histology", *TOY], help="toy*: drawn shapes, the recommender's check"
    )
    parser.add_argument(
        "--output", default="output/benchmark", metavar="DIR", help="tiles, runs, rows.md, tradeoff.png"
    )
    parser.add_argument("--nuclei", default="", metavar="DIR", help="what tools/prepare_dsb2018.py wrote, for a base")
    parser.add_argument("--images", type=int, default=36, help="pictures to train on, of 36 (few-shot: 10)")
    parser.add_argument("--steps", type=int, default=400, help="of every training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of the tested trainings")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="to choose from")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="only these")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config KEY VALUE pairs for every run")
    args = parser.parse_args()

    model, output = MODELS[args.model], Path(args.output).resolve()
    rows = rows_of(model)
    if unknown := sorted(set(args.rows) - set(rows)):
        raise ConfigError(f"--rows {', '.join(map(repr, unknown))}: {model.rows} has {', '.join(rows)}.")
    if args.task in TOY:
        args.opts = [*TOY_OPTS, *args.opts]
        parts = {part: toy_pictures(output, args.task, part, args.images) for part in TOY_PARTS}
    else:
        parts = {
            "train": pictures(output, "train", slice(args.images)),
            "validation": pictures(output, "train", slice(-VALIDATION, None)),
            "test": pictures(output, "val", slice(None)),
        }
    args.base = BASE_WEIGHTS if model.ships else make_base(model, output, args.nuclei)
    for name in args.rows or rows:
        run_row(rows[name], model, parts, folder_of(name, output), args)
        write(list(rows), output, model.metrics)
    print((output / "rows.md").read_text())


def make_base(model: Model, output: Path, nuclei: str) -> Path:
    """The model's base, trained on fluorescence where that is not done yet."""
    base = output / "base" / "base" / "model_final.pth"
    if base.exists():
        return base
    if not nuclei:
        raise ConfigError(f"--nuclei: the base of {model.folder} is trained first, on what that folder holds.")
    data = own_data(Path(nuclei), output / "tiles", "fluorescence")
    return run_base(model.folder, data, output / "base", [], model.metrics)


def folder_of(name: str, output: Path) -> Path:
    return output / "".join(c if c.isalnum() else "_" for c in name)


def run_row(row: dict[str, Any], model: Model, parts: dict[str, Path], folder: Path, args: Any) -> None:
    """Choose the row's rate on validation pictures, then train and test each seed at it."""
    folder.mkdir(parents=True, exist_ok=True)
    peft = {"TRAIN": model.train, "LR_FACTOR": 4.0, **row}
    base = str(ROOT / "configs" / "nuclei" / model.folder / "adapt.yaml")
    config = folder / "row.yaml"
    config.write_text(yaml.safe_dump({"_BASE_": base, "MODEL": {"PEFT": peft}}))
    shared = ["MODEL.WEIGHTS", str(args.base), "SOLVER.MAX_ITER", str(args.steps), "TEST.EVAL_PERIOD", "0", *args.opts]
    runs = [Run(f"rate {rate:g}", str(config), 1, ("SOLVER.BASE_LR", str(rate))) for rate in args.rates]
    if peft.get("METHODS") == "auto":  # it chooses its rate itself
        runs = [Run("own rate", str(config), 1)]
    trials = compare(runs, folder / "trials", command(parts, "validation"), shared, model.metrics)
    chosen = max(trials, key=lambda trial: trial.metrics[model.metrics[0]])
    opts = next(run.opts for run in runs if run.name == chosen.name)
    (folder / "chosen.json").write_text(json.dumps({t.name: t.metrics[model.metrics[0]] for t in trials}, indent=1))
    for seed in args.seeds:  # one by one, so that a folder's name does not depend on how many there are
        tests = [Run(f"seed {seed}", str(config), seed, opts)]
        compare(tests, folder / "tests", command(parts, "test"), shared, model.metrics)


def command(parts: dict[str, Path], tested: str) -> list[str]:
    """The training program on the training part, evaluated on ``tested``."""
    arguments = [*TRAIN_NET, "--name", "histology"]
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


def toy_pictures(output: Path, task: str, part: str, images: int) -> Path:
    """A part of the drawn world, made where that is not done yet."""
    count, seed = TOY_PARTS[part]
    count = min(count, images) if part == "train" else count
    folder = output / "tiles" / f"{task}_{part}_{count}"
    if not (folder / "annotations.json").exists():
        toy.generate(folder, TOY[task], count, seed, size=TOY_SIZE)
    return folder


def verdict(results: Sequence[Result], metric: str) -> str:
    """How what is recommended did beside the best row by hand that trains as little; "" before both were run."""
    groups: dict[str, list[float]] = {}
    for result in results:
        if 100 * result.trainable / result.total <= SHARE or result.name == "recommended":
            groups.setdefault(result.name, []).append(result.metrics[metric])
    means = {name: sum(values) / len(values) for name, values in groups.items()}
    own = means.pop("recommended", None)
    if own is None or not means:
        return ""
    best = max(means, key=lambda name: means[name])
    return (
        f"Recommended: {own:.1f}. The best of {len(means)} rows by hand with at most {SHARE:g} % trained: {best}, "
        f"{means[best]:.1f}. Within 1: {'yes' if own >= means[best] - 1 else 'no'}."
    )


def tested(name: str, output: Path) -> list[Result]:
    """What the row's seeds gave on the test pictures, as far as they were run, in this call or an earlier one."""
    files = sorted((folder_of(name, output) / "tests").glob(f"*/{RESULT_FILE}"))
    return [Result(**{**json.loads(file.read_text()), "name": name}) for file in files]


def write(rows: Sequence[str], output: Path, metrics: Sequence[str] = METRICS) -> None:
    """rows.md with every row, those that were tested with their figures, and tradeoff.png."""
    done = {name: results for name in rows if (results := tested(name, output))}
    results = [result for row in done.values() for result in row]
    waiting = [f"| {name} | not run |" + " |" * (4 + len(metrics)) for name in rows if name not in done]
    text = "\n".join([table(results, metrics), *waiting]) + "\n"
    said = verdict(results, metrics[0])
    (output / "rows.md").write_text(f"{text}\n{said}\n" if said else text)
    plot_tradeoff({"": results}, output / "tradeoff.png", "", metrics[0])


if __name__ == "__main__":
    one_line_errors(main)
