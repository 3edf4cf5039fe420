#!/usr/bin/env python
"""The nuclei study: a small model learns fluorescence microscopy and is adapted to histology, one way after another.

    tools/prepare_dsb2018.py --source stage1_train --output datasets/nuclei
    projects/nuclei/study.py --models mask_dino seem --data datasets/nuclei --output output/nuclei --seeds 1 2 3

Cuts the images into enlarged tiles, trains each model's base on fluorescence, then every variant of
configs/nuclei/<model> on histology. Prints a table per model, and one of the models that share a figure, and writes
them to table.md; tradeoff.png shows the figure over the number of trainable parameters. An interrupted study goes on
where it stopped.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.modeling import build_model

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from compare import METRICS, Result, Run, compare, plot_tradeoff, side_by_side, table  # noqa: E402
from tile_dataset import tile_coco  # noqa: E402

from peft_d2.engine.config import load_config  # noqa: E402
from peft_d2.engine.errors import ConfigError, one_line_errors  # noqa: E402
from peft_d2.engine.factory import register  # noqa: E402
from peft_d2.models.layers.transformer import SinePosition2d  # noqa: E402
from peft_d2.storage import disk  # noqa: E402

CONFIGS = ROOT / "configs" / "nuclei"
TRAIN_NET = [sys.executable, str(ROOT / "tools" / "train_net.py")]
NOT_VARIANTS = {"model", "fluorescence", "adapt"}
PROMPTED_METRICS = ("masks/mIoU", "masks/DSC", "segm/AP")
POSITION_SCALE = 2.0  # of sines within -1 to 1
TILE, SCALE = 96, 2.0  # px of the source, and how much they are enlarged


def main() -> None:
    models = sorted(folder.name for folder in CONFIGS.iterdir())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, choices=models, help="folders of configs/nuclei")
    parser.add_argument("--data", required=True, metavar="DIR", help="what tools/prepare_dsb2018.py wrote")
    parser.add_argument("--output", default="output/nuclei", metavar="DIR", help="tiles, runs, tables and plots")
    parser.add_argument("--variants", nargs="+", default=[], help="only these; all of them where none is named")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="each variant is trained once per seed")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config KEY VALUE pairs for every run")
    args = parser.parse_args()

    register()
    output = Path(args.output).resolve()
    tiles = {domain: own_data(Path(args.data), output / "tiles", domain) for domain in ("fluorescence", "histology")}
    results = {model: study(model, tiles, output, args) for model in args.models}
    tables = [f"{model}\n\n{table(rows, metrics_of(model))}" for model, rows in results.items()]
    for metric in dict.fromkeys(metrics_of(model)[0] for model in results):
        chosen = {model: rows for model, rows in results.items() if metrics_of(model)[0] == metric}
        if len(chosen) > 1:
            tables.append(f"{' and '.join(chosen)}\n\n{side_by_side(chosen, metric)}")
        name = "tradeoff.png" if len(results) == len(chosen) else f"tradeoff_{metric.replace('/', '_')}.png"
        plot_tradeoff(chosen, output / name, "From fluorescence to histology", metric)
        print(f"picture: {output / name}")
    text = "\n\n".join(tables)
    print("\n" + text)
    (output / "table.md").write_text(text + "\n")


def metrics_of(model: str) -> tuple[str, ...]:
    return PROMPTED_METRICS if model in ("sam", "sam2") else METRICS


def own_data(data: Path, tiles: Path, domain: str) -> list[str]:
    """Cut the tiles of a domain where they are not there yet; returns train_net's arguments for them."""
    arguments = ["--name", domain]
    for kind in ("train", "val"):
        source = data / f"{domain}_{kind}.json"
        if not source.exists():
            raise ConfigError(f"--data {data}: there is no {source.name}; make it with tools/prepare_dsb2018.py.")
        folder = tiles / f"{domain}_{kind}_{disk.file_digest(source)['sha256'][:8]}"  # of other data has another name
        if not (folder / "annotations.json").exists():
            tile_coco(source, data / f"{domain}_{kind}", folder, tile=TILE, scale=SCALE)
        arguments += [f"--{kind}-json", str(folder / "annotations.json"), f"--{kind}-images", str(folder / "images")]
    return arguments


def study(model: str, tiles: dict[str, list[str]], output: Path, args: argparse.Namespace) -> list[Result]:
    """Train a model's base, then its variants; all results, from the fewest trained parameters to the most."""
    folder, metrics = CONFIGS / model, metrics_of(model)
    variants = {path.stem: path for path in sorted(folder.glob("*.yaml")) if path.stem not in NOT_VARIANTS}
    if unknown := sorted(set(args.variants) - set(variants)):
        raise ConfigError(f"--variants {' '.join(unknown)}: {model} has {', '.join(variants)}.")
    weights = ["MODEL.WEIGHTS", str(train_base(model, tiles["fluorescence"], output, args.opts))]
    print(f"{model}: its adaptation to histology", flush=True)
    chosen = args.variants or variants
    runs = [Run(name, str(variants[name]), seed) for seed in args.seeds for name in chosen]
    results = compare(runs, output / model, [*TRAIN_NET, *tiles["histology"]], [*weights, *args.opts], metrics)
    return sorted(results, key=lambda result: result.trainable)


def train_base(model: str, tiles: list[str], output: Path, opts: list[str]) -> Path:
    """Train a model on fluorescence; its checkpoint."""
    weights = []
    if model in ("sam2", "eomt"):
        torch.manual_seed(1)
        state = build_model(load_config(str(CONFIGS / model / "fluorescence.yaml")).cfg).state_dict()
        if model == "sam2":
            start = decoder_of(train_base("sam", tiles, output, opts))
        else:
            start = sine_positions(state)
        torch.save({"model": state | start}, output / f"{model}_start.pth")
        weights = ["MODEL.WEIGHTS", str(output / f"{model}_start.pth")]
    print(f"{model}: the base on fluorescence", flush=True)
    return run_base(model, tiles, output / model, [*weights, *opts], metrics_of(model))


def decoder_of(sam: Path) -> dict[str, torch.Tensor]:
    """The small Segment Anything's prompt encoder and mask decoder, for Segment Anything 2 to start with.

    From nothing a small one learns to draw all nuclei at once, by the fine maps of its encoder, and then no longer to
    follow a box.
    """
    trained = torch.load(sam, weights_only=True)["model"]
    return {name: value for name, value in trained.items() if name.startswith(("prompt_encoder.", "mask_decoder."))}


def sine_positions(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sines in the place of an EoMT's positions: a ViT from nothing has none by which queries tell objects apart."""
    name = "backbone.net.pos_embed"
    shape = state[name].shape  # (1, patches, channels)
    side = math.isqrt(shape[1])
    return {name: POSITION_SCALE * SinePosition2d(shape[2])(side, side, torch.device("cpu")).view(shape)}


def run_base(model: str, tiles: list[str], folder: Path, opts: Sequence[str], metrics: Sequence[str]) -> Path:
    """Train a folder of configs/nuclei on fluorescence, below ``folder``; its checkpoint."""
    base = Run("base", str(CONFIGS / model / "fluorescence.yaml"))
    [trained] = compare([base], folder, [*TRAIN_NET, *tiles], opts, metrics)
    return Path(trained.folder, "model_final.pth")


if __name__ == "__main__":
    one_line_errors(main)
