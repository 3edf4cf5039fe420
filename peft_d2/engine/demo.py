"""Pictures of predictions for image files."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peft_d2.engine.checks import build_model
from peft_d2.engine.errors import ConfigError
from peft_d2.engine.launch import one_line_errors, prepare_config, warn_of_untrained

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
_SHORT_SIDE = 480


def main(arguments: list[str] | None = None) -> None:
    """Run ``tools/demo.py``."""
    args = demo_parser().parse_args(arguments)
    one_line_errors(lambda: picture(args))


def demo_parser() -> argparse.ArgumentParser:
    """The arguments of ``tools/demo.py``."""
    parser = argparse.ArgumentParser(description="Draw a model's predictions on images.")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="e.g. OUTPUT_DIR/config.yaml of a run")
    parser.add_argument("--peft-config", default="", metavar="FILE", help="one of configs/peft, on top")
    parser.add_argument("--input", required=True, nargs="+", help="image files or folders of them")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the pictures go")
    parser.add_argument("--confidence-threshold", type=float, default=0.5, help="instances below it are not drawn")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config KEY VALUE pairs")
    return parser


def picture(args: argparse.Namespace) -> list[Path]:
    """Predict on each image and write a picture of the same name; returns the paths.

    Raises:
        ConfigError: an input that does not exist or is no image, or an output that cannot be written.
    """
    from peft_d2.engine.progress import Bar, on_terminal

    images = find_images(args.input)
    targets = _targets(images, Path(args.output))
    predictor = Predictor(prepare_config(args))
    for path in Bar(images, "images") if on_terminal() else images:
        image, prediction = predictor(path)
        count = draw(image, prediction, predictor.metadata, args.confidence_threshold, targets[path])
        if not on_terminal():
            print(f"{path}: {count} instances -> {targets[path]}", flush=True)
    return list(targets.values())


def _targets(images: list[Path], output: Path) -> dict[Path, Path]:
    """Where each image's picture goes: under its name, with its suffix where two differ in that alone."""
    stems = Counter(path.stem for path in images)
    targets = {path: output / f"{path.stem if stems[path.stem] == 1 else path.name}.png" for path in images}
    inputs = {path.resolve() for path in images}
    if clash := next((target for target in targets.values() if target.resolve() in inputs), None):
        raise ConfigError(f"--output {output}: {clash} is one of the images and would be overwritten. Choose another.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be made: {error.strerror}. Choose another folder.") from error
    return targets


def find_images(inputs: list[str]) -> list[Path]:
    """The image files among the inputs, folders replaced by the images in them.

    Raises:
        ConfigError: an input that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for item in map(Path, inputs):
        if item.is_file():
            found.append(item)
        elif item.is_dir():
            inside = sorted(p for p in item.iterdir() if p.suffix.lower() in _SUFFIXES)
            if not inside:
                raise ConfigError(f"--input {item}: no image in this folder; known are {', '.join(sorted(_SUFFIXES))}.")
            found += inside
        else:
            raise ConfigError(f"--input {item}: no such file or folder.")
    return found


class Predictor:
    """A config's model with its base weights and adapter, for one image file at a time."""

    def __init__(self, cfg: Any) -> None:
        from detectron2.data import MetadataCatalog
        from detectron2.data import transforms as T

        from peft_d2.engine.checkpointer import Checkpointer
        from peft_d2.evaluation import inference_model

        self.cfg = cfg
        self.model = build_model(cfg).eval()
        Checkpointer(self.model, allow_other_base=cfg.MODEL.PEFT.ALLOW_OTHER_BASE).load(cfg.MODEL.WEIGHTS)
        warn_of_untrained(cfg)
        self.model = inference_model(cfg, self.model)
        names = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
        self.metadata = MetadataCatalog.get(names[0] if names else "__unnamed__")
        size = 0 if cfg.TEST.TILES.ENABLED else cfg.INPUT.MIN_SIZE_TEST  # tiles are cut from images in their own size
        self._resize = T.ResizeShortestEdge([size, size], cfg.INPUT.MAX_SIZE_TEST)

    @torch.no_grad()
    def __call__(self, path: Path) -> tuple[np.ndarray, dict[str, Any]]:
        """Returns the image as RGB (H, W, 3) uint8 and the model's output for it."""
        from detectron2.data.detection_utils import read_image

        try:
            image = read_image(str(path), format="RGB")
        except OSError as error:
            raise ConfigError(f"--input {path}: is no image that can be read ({error}).") from error
        height, width = image.shape[:2]
        ordered = image if self.cfg.INPUT.FORMAT == "RGB" else image[:, :, ::-1]
        resized = self._resize.get_transform(ordered).apply_image(ordered)
        tensor = torch.as_tensor(np.ascontiguousarray(resized.astype("float32").transpose(2, 0, 1)))
        return image, self.model([{"image": tensor, "height": height, "width": width}])[0]


def draw(image: np.ndarray, prediction: dict[str, Any], metadata: Any, threshold: float, target: Path) -> int:
    """Draw one prediction, panoptic before instances before semantic; returns the number of instances drawn."""
    from detectron2.utils.visualizer import ColorMode, Visualizer

    scale = max(1.0, _SHORT_SIDE / min(image.shape[:2]))  # labels are unreadable on a small picture
    painter = Visualizer(image, metadata, scale=scale, instance_mode=ColorMode.IMAGE)
    count = 0
    if prediction.get("panoptic_seg") is not None:
        segments, info = prediction["panoptic_seg"]
        canvas, count = painter.draw_panoptic_seg_predictions(segments.to("cpu"), info), len(info)
    elif "instances" in prediction:
        instances = prediction["instances"].to("cpu")
        instances = instances[instances.scores >= threshold]
        canvas, count = painter.draw_instance_predictions(instances), len(instances)
    else:
        canvas = painter.draw_sem_seg(prediction["sem_seg"].argmax(dim=0).to("cpu"))
    canvas.save(str(target))
    return count
