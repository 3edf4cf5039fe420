#!/usr/bin/env python
"""Predict on a picture with onnxruntime, numpy and PIL alone: neither torch nor Detectron2 is imported.

    tools/serve_onnx.py model.onnx photo.jpg --output drawn.png [--adapter output/night/adapter_final] \
        [--box X0 Y0 X1 Y1 ...]

``model.onnx`` and ``model.onnx.json`` are what ``tools/export.py`` wrote. An adapter's folder is read where the graph
takes the adapter's tensors as inputs (safetensors.numpy). Boxes are prompts of Segment Anything. Copy this file: it
needs nothing of this package.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

Array = np.ndarray[Any, Any]
# Keys of an adapter's methods that do not say what its tensors mean.
_FREE = {"TARGETS", "EXCLUDE", "DROPOUT", "INIT", "OUTPUTS"}
_TENSORS, _RECORD = "adapter_model.safetensors", "peft_d2.json"


class Model:
    """The graphs of one export, with an adapter's tensors where they are inputs."""

    def __init__(self, path: Path, adapter: Path | None = None) -> None:
        record = Path(f"{path}.json")
        if not path.is_file() or not record.is_file():
            raise SystemExit(f"error: {path} and {record.name} beside it are needed, as tools/export.py wrote them")
        self.record = json.loads(record.read_text())
        providers = onnxruntime.get_available_providers()
        self.graphs = [
            onnxruntime.InferenceSession(str(path.with_name(name)), providers=providers)
            for name in self.record["graphs"]
        ]
        self.tensors: dict[str, Array] = {}
        if keys := self.record["adapter_inputs"]:
            if adapter is None:
                raise SystemExit(f"error: {path} takes an adapter's tensors as inputs: name its folder, --adapter DIR")
            self._take(adapter, keys)
        elif adapter is not None:
            raise SystemExit(f"error: {path} has its adapter merged in and takes no other: export it --adapter-inputs")

    def _take(self, adapter: Path, keys: dict[str, str]) -> None:
        """Read an adapter's tensors, refusing those that the graph would compute something else with."""
        from safetensors.numpy import load_file

        if missing := [name for name in (_TENSORS, _RECORD) if not (adapter / name).is_file()]:
            raise SystemExit(f"error: --adapter {adapter}: no folder of an adapter, it lacks {missing[0]}")
        stored, trained = load_file(adapter / _TENSORS), json.loads((adapter / _RECORD).read_text())
        if stored.keys() != set(keys.values()) or _meaning(trained) != _meaning(self.record.get("adapter", trained)):
            raise SystemExit(
                f"error: --adapter {adapter}: it has other methods, modules or another base than the adapter that "
                "was exported; export this one"
            )
        self.tensors = {name: stored[key] for name, key in keys.items()}
        self.record["classes"] = trained.get("classes") or self.record.get("classes")

    def run(self, graph: int, **inputs: Array) -> list[Array]:
        """The outputs of one graph."""
        session = self.graphs[graph]
        for wanted in session.get_inputs():
            if wanted.name in self.tensors:
                shape = [side for side in wanted.shape if isinstance(side, int)]
                inputs[wanted.name] = self.tensors[wanted.name].reshape(shape)
        return session.run(None, inputs)

    def predict(self, image: Image.Image, boxes: Array | None = None) -> tuple[Array, Array, Array]:
        """Scores (M,), classes (M,) and masks (M, height, width) bool of a picture's instances, best first."""
        picture = np.asarray(image.convert("RGB"), np.float32)
        if self.record["format"] == "BGR":
            picture = picture[..., ::-1]
        (height, width), (side_y, side_x) = picture.shape[:2], self.record["size"]
        scale = min(side_y / height, side_x / width)
        prompted = self.record["model"] in ("sam", "sam2")
        if not prompted:
            short, longest = self.record["resize"]
            scale = min(scale, short / min(height, width), longest / max(height, width))
        inside = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
        if self.record["model"] == "sam2":  # stretched, not padded
            inside = (side_y, side_x)
        planes = [
            np.asarray(Image.fromarray(plane.astype(np.uint8)).resize(inside[::-1], Image.Resampling.BILINEAR))
            for plane in np.moveaxis(picture, -1, 0)
        ]
        # The models pad after they have normalised: the border is the mean colour.
        padded = np.empty((1, len(planes), side_y, side_x), np.float32)
        padded[:] = np.asarray(self.record["pad"], np.float32)[:, None, None]
        padded[0, :, : inside[0], : inside[1]] = planes
        if prompted:
            if boxes is None:
                raise SystemExit("Segment Anything takes boxes as prompts: --box X0 Y0 X1 Y1")
            points = boxes.reshape(-1, 2, 2) * np.array([inside[1] / width, inside[0] / height])
            labels = np.tile(np.array([2, 3], np.int64), (len(boxes), 1))
            if self.record["model"] == "sam2":  # after each prompt a point that is none
                points = np.pad(points, ((0, 0), (0, 1), (0, 0)))
                labels = np.pad(labels, ((0, 0), (0, 1)), constant_values=-1)
            maps = dict(zip(("embedding", "finest", "finer"), self.run(0, image=padded), strict=False))
            masks, iou = self.run(1, points=points.astype(np.float32), labels=labels, **maps)
            best = iou.argmax(1)
            rows = np.arange(len(best))
            logits = self._full_size(masks[rows, best], inside, (height, width))
            return iou[rows, best], np.zeros(len(best), np.int64), logits > 0
        class_logits, masks = (output[0] for output in self.run(0, image=padded)[:2])
        return self._instances(class_logits, masks, inside, (height, width))

    def _instances(
        self, class_logits: Array, masks: Array, inside: tuple[int, int], output: tuple[int, int]
    ) -> tuple[Array, Array, Array]:
        """The best pairs of a query and a class, scored by class and mask."""
        if self.record["scores"] == "softmax":
            powers = np.exp(class_logits - class_logits.max(-1, keepdims=True))
            scores = (powers / powers.sum(-1, keepdims=True))[:, :-1]
        else:
            scores = 1 / (1 + np.exp(-class_logits))
        best = np.argsort(-scores, axis=None, kind="stable")[: self.record["top_k"]]
        queries, classes = np.unravel_index(best, scores.shape)
        used, slot = np.unique(queries, return_inverse=True)
        logits = self._full_size(masks[used], inside, output)
        found = logits > 0
        quality = (found / (1 + np.exp(-logits))).sum((1, 2)) / (found.sum((1, 2)) + 1e-6)
        total = scores.flat[best] * (quality[slot] if self.record["mask_quality"] else 1)
        order = np.argsort(-total, kind="stable")
        return total[order], classes[order], found[slot[order]]

    def _full_size(self, masks: Array, inside: tuple[int, int], output: tuple[int, int]) -> Array:
        """Mask logits (M, h, w) of the padded image at the size of the picture."""
        if self.record["model"] == "sam2":
            return resize(masks, *output)
        padded = resize(masks, *self.record["size"])
        return resize(padded[:, : inside[0], : inside[1]], *output)


def _meaning(trained: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """What an adapter's tensors are a change of, and how: its base, and its methods."""
    methods = [{key: value for key, value in method.items() if key not in _FREE} for method in trained["methods"]]
    return trained["base"]["weights"], methods


def read_picture(path: Path) -> Image.Image:
    """A picture of 8 bits a channel, turned as its EXIF says."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
    except OSError as error:
        raise SystemExit(f"error: {path}: {error.strerror or error}") from error
    if image.mode.startswith(("I", "F")):
        raise SystemExit(f"error: {path}: more than 8 bits a channel ({image.mode}); convert it to 8 bits")
    return image


def resize(maps: Array, height: int, width: int) -> Array:
    """Bilinear, from pixel centre to pixel centre, without antialiasing: (M, h, w) -> (M, height, width)."""
    for axis, size in ((1, height), (2, width)):
        length = maps.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, None)
        low = np.minimum(place.astype(np.int64), length - 1)
        share = (place - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        maps = maps.take(low, axis) * (1 - share) + maps.take(np.minimum(low + 1, length - 1), axis) * share
    return maps


def draw(image: Image.Image, masks: Array) -> Image.Image:
    """The picture with each mask in a colour of its own."""
    picture = np.asarray(image.convert("RGB"), np.float32).copy()
    for number, mask in enumerate(masks):
        colour = 127.5 + 127.5 * np.cos(2 * np.pi * (0.618 * number + np.array([0, 1 / 3, 2 / 3])))
        picture[mask] = 0.5 * picture[mask] + 0.5 * colour
    return Image.fromarray(picture.astype(np.uint8))


def main(arguments: list[str] | None = None) -> None:
    """Run ``tools/serve_onnx.py``."""
    parser = argparse.ArgumentParser(description="Predict on a picture with onnxruntime, numpy and PIL alone.")
    parser.add_argument("model", type=Path, help="a .onnx file with its .json beside it")
    parser.add_argument("image", type=Path)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="for a graph whose inputs are an adapter's tensors")
    parser.add_argument("--box", type=float, nargs=4, action="append", metavar=("X0", "Y0", "X1", "Y1"))
    parser.add_argument("--confidence-threshold", type=float, default=0.5)
    args = parser.parse_args(arguments)
    suffix = args.output.suffix.lower()
    if suffix not in Image.registered_extensions() or not args.output.parent.is_dir():
        raise SystemExit(f"error: --output {args.output}: expected a picture's name, .png say, in a folder that exists")
    image = read_picture(args.image)
    if args.output.exists() and args.output.samefile(args.image):
        raise SystemExit(f"error: --output {args.output} is the picture that is read: choose another file")
    model = Model(args.model, args.adapter)
    scores, classes, masks = model.predict(image, np.array(args.box) if args.box else None)
    kept = scores >= args.confidence_threshold
    names = model.record.get("classes") or []
    for score, kind in zip(scores[kept], classes[kept], strict=True):
        print(f"{names[kind] if kind < len(names) else kind}: {score:.3f}")
    draw(image, masks[kept]).save(args.output)


if __name__ == "__main__":
    main()
