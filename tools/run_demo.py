#!/usr/bin/env python
"""The demo: adapt a base that knows fluorescence microscopy to histology five ways, and set them side by side.

    %(prog)s --output output/demo

The base has seen ImageNet and 200 grey pictures of nuclei on black; the pictures that it is adapted to, purple tissue,
ship with the package. Needs no download. Prints a table and writes table.md, curves.png (mask AP over steps) and
before_after.png (image, truth, the base as it is, the base adapted as tools/recommend.py recommends). An interrupted
demo goes on where it stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from command_line import take_pairs
from compare import Run, compare, plot_curves, table
from demo import Predictor
from PIL import Image, ImageDraw
from tile_dataset import tile_coco

import peft_d2
from peft_d2.data.pictures import overlay
from peft_d2.data.segmentation import segmentation_to_mask
from peft_d2.engine.errors import ConfigError, one_line_errors
from peft_d2.engine.launch import prepare_config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "nuclei" / "efficientnet"
ASSETS = Path(peft_d2.__file__).parent / "assets"
PICTURES, BASE_WEIGHTS = ASSETS / "histology", ASSETS / "nuclei_base.safetensors"
TILE, SCALE = 96, 2.0  # px of a picture, and how much they are enlarged: nuclei are small
AUTO = ("MODEL.PEFT.METHODS", "auto")
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "heads only": ("heads.yaml", ()),
    "LoRA": ("lora.yaml", ()),
    "2 adapters": ("adapters.yaml", ()),
    "recommended": ("adapt.yaml", AUTO),
    "full fine-tuning": ("full.yaml", ()),
}

PICTURED = (5, 28, 53, 66)  # tiles of the validation pictures that have objects
_TITLES = ("image", "truth", "before", "after")
_GAP, _HEADER = 6, 22


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/demo", metavar="DIR", help="data, runs, table and pictures")
    parser.add_argument("--train-images", type=int, default=48, help="pictures of histology to train on, of 48")
    parser.add_argument("--val-images", type=int, default=12, help="pictures to evaluate on, of 24")
    parser.add_argument("--seed", type=int, default=1, help="of the trainings")
    take_pairs(parser, "config KEY VALUE pairs for every run")
    args = parser.parse_args()

    if importlib.util.find_spec("timm") is None:
        raise ConfigError("the demo's backbone is timm's, which is not installed: pip install 'peft_d2[timm]'")
    output = Path(args.output).resolve()
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--name", "histology"]
    for split, count in (("train", args.train_images), ("val", args.val_images)):
        tiles = cut(split, count, output / "data")
        command += [f"--{split}-json", str(tiles / "annotations.json"), f"--{split}-images", str(tiles / "images")]
    runs = [Run(name, str(CONFIGS / config), args.seed, opts) for name, (config, opts) in VARIANTS.items()]
    results = compare(runs, output, command, ["MODEL.WEIGHTS", str(BASE_WEIGHTS), *args.opts])

    print("\n" + table(results) + "\n")
    (output / "table.md").write_text(table(results) + "\n")
    plot_curves(results, output / "curves.png", "From fluorescence to histology")
    adapted = output / "recommended"
    draw_before_after(
        before=(str(CONFIGS / "model.yaml"), ["MODEL.WEIGHTS", str(BASE_WEIGHTS)]),
        after=(str(adapted / "config.yaml"), ["MODEL.PEFT.WEIGHTS", str(adapted / "adapter_final")]),
        target=output / "before_after.png",
        images=PICTURED,
    )
    print(f"pictures: {output / 'before_after.png'} and {output / 'curves.png'}")


def cut(split: str, count: int, output: Path) -> Path:
    """Cut a split's first ``count`` pictures into enlarged tiles, where that is not done yet; returns the folder."""
    folder = output / f"{split}_{count}"
    if not (folder / "annotations.json").exists():
        content = json.loads((PICTURES / f"{split}.json").read_text())
        content["images"] = content["images"][:count]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pictures.json").write_text(json.dumps(content))
        tile_coco(folder / "pictures.json", PICTURES / split, folder, tile=TILE, scale=SCALE)
        print(f"{len(content['images'])} pictures of histology, {split}: tiles in {folder}", flush=True)
    return folder


def draw_before_after(
    before: tuple[str, Sequence[str]],
    after: tuple[str, Sequence[str]],
    target: str | Path,
    *,
    before_classes: Sequence[str] | None = None,
    images: Sequence[int] = (0, 1, 2, 3),
    width: int = 320,
    threshold: float = 0.5,
) -> None:
    """Write a picture with a row per image of the adapted model's evaluation set.

    Args:
        before: config file and ``KEY VALUE`` pairs of the base.
        after: the same of the adapted model; its first ``DATASETS.TEST`` gives the images and the truth.
        target: file to write.
        before_classes: the base's class names, where they differ from the data set's.
        images: which images of the data set, as far as it has them; the first if it has none of them.
        width: of each column, in pixels.
        threshold: predictions of a lower score are not drawn.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    adapted, base = _predictor(*after), _predictor(*before)
    name = adapted.cfg.DATASETS.TEST[0]
    classes = MetadataCatalog.get(name).thing_classes
    samples = DatasetCatalog.get(name)
    rows = []
    for sample in [samples[index] for index in images if index < len(samples)] or samples[:1]:
        picture, adapted_output = adapted(Path(sample["file_name"]))
        _, base_output = base(Path(sample["file_name"]))
        rows.append(
            [
                _overlaid(picture, [], [], (), width),
                _overlaid(picture, *_truth(sample, picture), classes, width),
                _overlaid(picture, *_predicted(base_output, threshold), before_classes or classes, width),
                _overlaid(picture, *_predicted(adapted_output, threshold), classes, width),
            ]
        )
    _sheet(rows, width).save(target)


def _predictor(config_file: str, opts: Sequence[str]) -> Predictor:
    return Predictor(prepare_config(argparse.Namespace(config_file=config_file, peft_config="", opts=list(opts))))


def _truth(sample: dict[str, Any], picture: np.ndarray) -> tuple[list[np.ndarray], list[int]]:
    height, width = picture.shape[:2]
    objects = sample["annotations"]
    masks = [segmentation_to_mask(thing["segmentation"], height, width) for thing in objects]
    return masks, [thing["category_id"] for thing in objects]


def _predicted(output: dict[str, Any], threshold: float) -> tuple[list[np.ndarray], list[int]]:
    instances = output["instances"].to("cpu")
    kept = instances[instances.scores >= threshold]
    return list(kept.pred_masks.numpy().astype(bool)), kept.pred_classes.tolist()


def _overlaid(
    picture: np.ndarray, masks: Sequence[np.ndarray], labels: Sequence[int], names: Sequence[str], width: int
) -> np.ndarray:
    size = (width, round(width * picture.shape[0] / picture.shape[1]))
    enlarged = np.asarray(Image.fromarray(picture).resize(size))
    large = [np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
    return overlay(enlarged, large, labels, names)


def _sheet(rows: Sequence[Sequence[np.ndarray]], width: int) -> Image.Image:
    height = _HEADER + sum(max(cell.shape[0] for cell in row) + _GAP for row in rows)
    sheet = Image.new("RGB", (len(_TITLES) * (width + _GAP) - _GAP, height - _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(_TITLES):
        pen.text((column * (width + _GAP) + 4, 5), title, fill="black", font_size=14)
    top = _HEADER
    for row in rows:
        for column, cell in enumerate(row):
            sheet.paste(Image.fromarray(cell), (column * (width + _GAP), top))
        top += max(cell.shape[0] for cell in row) + _GAP
    return sheet


if __name__ == "__main__":
    one_line_errors(main)
