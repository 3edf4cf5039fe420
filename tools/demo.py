#!/usr/bin/env python
"""Draw a model's predictions on images, and write them as COCO json, or as polygons for annotation tools.

    tools/demo.py --config-file output/lora/config.yaml --input photos --output drawn \
        --opts MODEL.PEFT.WEIGHTS output/lora/adapter_final
    tools/demo.py --config-file configs/demo/base.yaml --input photos --output drawn \
        --adapters night=output/night/adapter_final heads=output/heads/adapter_final   # side by side, with the base
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import config_parser, take_pairs
from mask_shapes import mask_outlines, mask_to_polygons
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

import peft_d2
from peft_d2.data.images import image_size, visible
from peft_d2.engine.config import PEFT_ARCHITECTURE
from peft_d2.engine.errors import ConfigError, bounded, one_line_errors
from peft_d2.engine.factory import build_model
from peft_d2.engine.launch import prepare_config, warn_of_untrained
from peft_d2.storage import adapter_file, disk

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
_SHORT_SIDE = 480
# A class, a score, and of each part the outer ring, then its holes: (N, 2) x, y in px.
Outlined = tuple[str, float, list[list[np.ndarray]]]
_CAPTION = 20  # px above each of several pictures


def main(arguments: list[str] | None = None) -> None:
    """Run ``tools/demo.py``."""
    args = demo_parser().parse_args(arguments)
    one_line_errors(lambda: picture(args))


def demo_parser() -> argparse.ArgumentParser:
    """The arguments of ``tools/demo.py``."""
    example = """--config-file output/mine/config.yaml --input photos/ --output drawn/ \\
    --opts MODEL.PEFT.WEIGHTS output/mine/adapter_final"""
    parser = config_parser("Draw a model's predictions on images, and write them for other programs.", example)
    parser.add_argument("--input", required=True, nargs="+", help="image files or folders of them")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the pictures go")
    parser.add_argument("--confidence-threshold", type=float, default=0.5, help="instances below it are not drawn")
    parser.add_argument("--json", default="", metavar="FILE", help="write the drawn instances there, in COCO format")
    parser.add_argument("--results", default="", metavar="FILE", help="the same as a bare list: COCO's result format")
    parser.add_argument("--polygons", choices=tuple(POLYGONS), help="write such a file beside each picture")
    parser.add_argument(
        "--simplify", type=bounded(float, 0), default=0.0, metavar="PX", help="polygons may be off by so much"
    )
    parser.add_argument("--boxes", default="", metavar="FILE", help="prompts: json of image name to x0 y0 x1 y1, px")
    parser.add_argument("--adapters", nargs="+", default=[], metavar="NAME=DIR", help="draw each beside the base")
    take_pairs(parser)
    return parser


def picture(args: argparse.Namespace) -> list[Path]:
    """Predict on each image, write a picture of the same name, and all instances to ``--json``; returns the paths.

    Raises:
        ConfigError: an input that does not exist or is no image, an output that cannot be written, or boxes for a
            model that takes none, or none for one that does.
    """
    from peft_d2.engine.hooks import Bar, on_terminal

    if not args.confidence_threshold <= 1:
        raise ConfigError(f"--confidence-threshold is {args.confidence_threshold}; expected a number up to 1.")

    output = Path(args.output)
    images = find_images(args.input, output)
    targets = _targets(images, output)
    for path, target in targets.items() if args.polygons else ():
        file = target.with_suffix(POLYGONS[args.polygons][0])
        if file.exists() and file.parent.resolve() == path.parent.resolve():
            raise ConfigError(f"--polygons: {file} is there already, beside its image. Choose another --output.")
    for file in filter(None, (args.json, args.results)):
        _keep_annotations(Path(file))
    boxes = read_boxes(args.boxes, images) if args.boxes else None
    if args.adapters and (args.json or args.results or args.polygons):
        raise ConfigError("--adapters draws several models' instances; --json, --results and --polygons take one's.")
    cfg, adapters = prepare_config(args, reads=()), read_adapters(args.adapters)
    _check_headers(images)
    predictor = Predictor(cfg, adapters)
    if predictor.prompted != (boxes is not None):
        needs = "takes boxes as prompts: name them with" if predictor.prompted else "takes no prompts: leave out"
        raise ConfigError(f"the model {needs} --boxes.")
    found = Predictions(predictor.metadata) if args.json or args.results or args.polygons else None
    try:
        for path in Bar(list(images), "images") if on_terminal() else images:
            image, prediction = predictor(path, boxes[path] if boxes else None)
            targets[path].parent.mkdir(parents=True, exist_ok=True)
            count = draw(image, prediction, predictor, args.confidence_threshold, targets[path])
            if found is not None:
                objects = found.add(images[path], image, prediction, args.confidence_threshold)
                if args.polygons:
                    suffix, write, holes = POLYGONS[args.polygons]
                    file = targets[path].with_suffix(suffix)
                    name = os.path.relpath(path.resolve(), file.parent.resolve())
                    content = write(found.labelled(objects, holes, args.simplify), name, image.shape[:2])
                    disk.write_bytes(file, json.dumps(content).encode())
            if not on_terminal():
                print(f"{path}: {count} instances -> {targets[path]}", flush=True)
    finally:  # an image that fails, or Ctrl-C, costs nothing of those before it
        if found is not None and found.content["images"]:
            found.write(args.json, args.results)
    return list(targets.values())


class Predictions:
    """Instances in COCO format: images, categories, and annotations with a ``score``, as annotation tools read them."""

    def __init__(self, metadata: Any) -> None:
        names = list(metadata.get("thing_classes", []))
        ids = {index: id_ for id_, index in metadata.get("thing_dataset_id_to_contiguous_id", {}).items()}
        self._ids = [ids.get(index, index + 1) for index in range(len(names))]
        categories = [{"id": id_, "name": name} for id_, name in zip(self._ids, names, strict=True)]
        self.content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": categories}

    def write(self, json_file: str, results_file: str) -> None:
        """Write them as a COCO data set and as a bare list, each where a file is named."""
        kept = ("image_id", "category_id", "bbox", "segmentation", "score")
        rows = [{key: row[key] for key in kept if key in row} for row in self.content["annotations"]]
        for file, content in ((json_file, self.content), (results_file, rows)):
            if file:
                disk.write_bytes(file, json.dumps(content).encode())

    def add(self, name: Path, image: np.ndarray, prediction: dict[str, Any], threshold: float) -> list[dict[str, Any]]:
        """Take up one image's instances from ``threshold`` on; a box's mask, which has no class, is of category 0.

        Returns:
            Their annotations.

        Raises:
            ConfigError: the model predicts none.
        """
        from peft_d2.evaluation.coco import instances_to_results

        if "instances" not in prediction:
            raise ConfigError("--json, --results and --polygons take instances, and this model predicts none.")
        images, annotations = self.content["images"], self.content["annotations"]
        size = {"height": image.shape[0], "width": image.shape[1]}
        images.append({"id": len(images) + 1, "file_name": name.as_posix(), **size})
        instances = prediction["instances"].to("cpu")
        instances = instances[instances.scores >= threshold]
        if classless := not instances.has("pred_classes"):
            instances.pred_classes = torch.zeros(len(instances), dtype=torch.int64)
        for row in instances_to_results(instances, len(images)):
            row["category_id"] = 0 if classless else self._ids[row["category_id"]]
            area = coco_mask.area(row["segmentation"]) if "segmentation" in row else row["bbox"][2] * row["bbox"][3]
            annotations.append({"id": len(annotations) + 1, **row, "area": float(area), "iscrowd": 0})
        return annotations[len(annotations) - len(instances) :]

    def labelled(self, annotations: list[dict[str, Any]], holes: bool, tolerance: float) -> Iterator[Outlined]:
        """Of each annotation its class name, its score and its outlines, simplified where ``tolerance`` (px) allows.

        Without ``holes`` a part that has some is cut in two through them.
        """
        names = {category["id"]: category["name"] for category in self.content["categories"]}
        for row in annotations:
            x, y, w, h = row["bbox"]
            parts = [[np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])]]
            if "segmentation" in row:
                mask = coco_mask.decode(row["segmentation"])
                parts = mask_outlines(mask) if holes else [[np.reshape(p, (-1, 2))] for p in mask_to_polygons(mask)]
            if tolerance > 0:
                parts = [[_simplified(ring, tolerance) for ring in part] for part in parts]
            yield names.get(row["category_id"], "object"), row["score"], parts


def _simplified(ring: np.ndarray, tolerance: float) -> np.ndarray:
    import cv2

    found = cv2.approxPolyDP(ring.astype(np.float32)[:, None], tolerance, True)[:, 0].astype(float)
    return found if len(found) > 2 else ring


def labelme_file(objects: Iterable[Outlined], image: str, size: tuple[int, int]) -> dict[str, Any]:
    """The json that labelme opens; its polygons have no holes, and several of one object are a group."""
    shapes = []
    for number, (label, score, parts) in enumerate(objects, 1):
        group = number if len(parts) > 1 else None
        for (outer,) in parts:
            shapes.append({
                "label": label, "points": outer.tolist(), "group_id": group, "description": f"score {score:.3f}",
                "shape_type": "polygon", "flags": {},
            })  # fmt: skip
    described = {"imagePath": image, "imageData": None, "imageHeight": size[0], "imageWidth": size[1]}
    return {"version": "5.5.0", "flags": {}, "shapes": shapes, **described}


def geojson_file(objects: Iterable[Outlined], image: str, size: tuple[int, int]) -> dict[str, Any]:
    """GeoJSON in pixels, y downwards, holes included, with the properties by which QuPath knows annotations."""
    features = []
    for label, score, parts in objects:
        rings = [[[*ring.tolist(), ring[0].tolist()] for ring in part] for part in parts]
        properties = {"objectType": "annotation", "classification": {"name": label}, "score": score, "image": image}
        geometry = {"type": "MultiPolygon", "coordinates": rings}
        if len(rings) == 1:
            geometry = {"type": "Polygon", "coordinates": rings[0]}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return {"type": "FeatureCollection", "features": features}


POLYGONS = {"labelme": (".json", labelme_file, False), "geojson": (".geojson", geojson_file, True)}


def _targets(images: dict[Path, Path], output: Path) -> dict[Path, Path]:
    """Where each image's picture goes: under its name, with its suffix where two differ in that alone."""
    stems = Counter(name.with_suffix("") for name in images.values())
    targets = {}
    for path, name in images.items():
        unique = stems[name.with_suffix("")] == 1
        targets[path] = output / (name.with_suffix(".png") if unique else name.with_name(f"{name.name}.png"))
    if twice := [target for target, count in Counter(targets.values()).items() if count > 1]:
        raise ConfigError(f"--input: two images would be drawn to {twice[0]}. Give them one after the other.")
    inputs = {path.resolve() for path in images}
    if clash := next((target for target in targets.values() if target.resolve() in inputs), None):
        raise ConfigError(f"--output {output}: {clash} is one of the images and would be overwritten. Choose another.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be made: {error.strerror}. Choose another folder.") from error
    return targets


def _check_headers(images: Iterable[Path]) -> None:
    """Refuse files that are no images, or would be misread, before the first one is predicted on."""
    for path in images:
        try:
            image_size(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--input {path}: is no image that can be read ({error}).") from error


def _keep_annotations(file: Path) -> None:
    """Refuse to write predictions where it cannot be, or over anything but earlier ones, whose objects have scores."""
    above = next(folder for folder in (file, *file.absolute().parents) if folder.exists())
    if file.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"{file} {'is a folder' if file.is_dir() else 'cannot be written'}. Choose another file.")
    if not file.is_file():
        return
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        content = None
    rows = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "score" in row for row in rows):
        raise ConfigError(f"{file} holds something else than predictions and would be written over. Choose another.")


def read_boxes(file: str, images: dict[Path, Path]) -> dict[Path, list[list[float]]]:
    """The boxes of each image, from a json of ``{"a.png": [[x0, y0, x1, y1], ...], ...}``, or paths below the input.

    Raises:
        ConfigError: a file that is none of this kind, or an image without an entry.
    """
    try:
        found = json.loads(Path(file).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--boxes {file}: cannot be read as json ({error}).") from error
    chosen = {}
    for path, name in images.items():
        boxes = found.get(name.as_posix(), found.get(path.name)) if isinstance(found, dict) else None
        if not isinstance(boxes, list) or not all(isinstance(box, list) and len(box) == 4 for box in boxes):
            raise ConfigError(
                f"--boxes {file}: no boxes for {path.name!r}. Expected {{{path.name!r}: [[x0, y0, x1, y1], ...]}}."
            )
        chosen[path] = boxes
    return chosen


def find_images(inputs: list[str], output: Path) -> dict[Path, Path]:
    """The image files among the inputs and, at any depth, in the folders among them: path -> name below ``output``.

    What was drawn before to an ``output`` inside of such a folder is left out.

    Raises:
        ConfigError: an input that does not exist, or a folder without images.
    """
    found: dict[Path, Path] = {}
    for item in map(Path, inputs):
        if item.is_file():
            found[item] = Path(item.name)
        elif item.is_dir():
            inside = [path for path in visible(item) if path.suffix.lower() in _SUFFIXES and path.is_file()]
            nested = output.resolve() != item.resolve() and output.resolve().is_relative_to(item.resolve())
            inside = [path for path in inside if not (nested and path.resolve().is_relative_to(output.resolve()))]
            if not inside:
                raise ConfigError(f"--input {item}: no image in this folder; known are {', '.join(sorted(_SUFFIXES))}.")
            found |= {path: path.relative_to(item) for path in inside}
        else:
            raise ConfigError(f"--input {item}: no such file or folder.")
    return found


def read_adapters(arguments: list[str]) -> dict[str, Path]:
    """Folders by name, from ``NAME=DIR`` each, or ``NAME=user/name@revision`` on the hub.

    Raises:
        ConfigError: another form, a name twice, or a folder that does not exist.
        AdapterFileError: it cannot be fetched.
    """
    folders: dict[str, Path] = {}
    for argument in arguments:
        name, _, given = argument.partition("=")
        folder = Path(adapter_file.resolved(given)[0])
        if not name or not given or name in folders or not folder.is_dir():
            raise ConfigError(
                f"--adapters {argument}: expected NAME=DIR, an adapter's folder (or user/name@revision on the hub) "
                "under a name of its own."
            )
        folders[name] = folder
    return folders


def classes_of_run(folder: Path, default: Any) -> Any:
    """Names of the classes that an adapter was trained on, from itself or from its run's config.yaml beside it."""
    from detectron2.data import Metadata, MetadataCatalog

    from peft_d2.data.registration import register_from_config
    from peft_d2.engine.config import load_config

    if classes := adapter_file.classes_of(folder):
        return Metadata(thing_classes=classes, stuff_classes=classes)
    file = folder.parent / "config.yaml"
    if not file.is_file():
        return default
    cfg = load_config(str(file)).cfg
    register_from_config(cfg)
    return MetadataCatalog.get(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else default


class Predictor:
    """A config's model with its base weights and adapter, for one image file at a time.

    With ``adapters``, folders by name, predictions are by name: the base's, and under each of them.
    """

    def __init__(self, cfg: Any, adapters: dict[str, Path] | None = None) -> None:
        from detectron2.data import Metadata, MetadataCatalog
        from detectron2.data import transforms as T

        from peft_d2.data.augmentation import LongestSide, keep_a_pixel
        from peft_d2.engine.checkpointer import Checkpointer, model_classes
        from peft_d2.evaluation.tiling import inference_model
        from peft_d2.models.sam.model import SegmentAnything

        if adapters and cfg.TEST.TILES.ENABLED:
            raise ConfigError("--adapters draws whole images: append TEST.TILES.ENABLED False.")
        if adapters and cfg.MODEL.PEFT.WEIGHTS:
            raise ConfigError("--adapters names what is drawn: give MODEL.PEFT.WEIGHTS there, or append it as ''.")
        if cfg.MODEL.LOAD_PROPOSALS:
            raise ConfigError(
                "MODEL.LOAD_PROPOSALS: this model takes boxes that were computed before, which an image file does not "
                "hold. Evaluate it on a data set with tools/train_net.py --eval-only."
            )
        if adapters and cfg.MODEL.META_ARCHITECTURE == PEFT_ARCHITECTURE:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.PEFT.META_ARCHITECTURE
        self.cfg = cfg
        self.model = build_model(cfg).eval()
        self.prompted = isinstance(self.model, SegmentAnything)
        checkpointer = Checkpointer(self.model, cfg.OUTPUT_DIR, allow_other_base=cfg.MODEL.PEFT.ALLOW_OTHER_BASE)
        checkpointer.load(cfg.MODEL.WEIGHTS)
        warn_of_untrained(cfg, self.model, checkpointer.names())
        names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)  # the model's classes are those trained on
        self.metadata = MetadataCatalog.get(names[0] if names else "__unnamed__")
        scored = model_classes(self.model, cfg.MODEL.WEIGHTS)
        if scored and scored not in (self.metadata.get("stuff_classes"), self.metadata.get("thing_classes")):
            self.metadata = Metadata(thing_classes=scored, stuff_classes=scored)
        self.base = self.model
        self.model = inference_model(cfg, self.model)
        self.by_adapter = {"base": self.metadata} if adapters else {}
        if adapters:
            peft_d2.load_adapters(self.base, adapters, allow_other_base=cfg.MODEL.PEFT.ALLOW_OTHER_BASE)
            self.by_adapter |= {name: classes_of_run(folder, self.metadata) for name, folder in adapters.items()}
        size = 0 if cfg.TEST.TILES.ENABLED else cfg.INPUT.MIN_SIZE_TEST  # tiles are cut from images in their own size
        [self._resize] = keep_a_pixel([T.ResizeShortestEdge([size, size], cfg.INPUT.MAX_SIZE_TEST)])
        if self.prompted:
            self._resize = LongestSide(cfg.MODEL.SAM.IMAGE_SIZE)

    @torch.no_grad()
    def __call__(
        self, path: Path, boxes: list[list[float]] | None = None, points: list[list[float]] | None = None,
        adapters: Sequence[str] = (),
    ) -> tuple[np.ndarray, dict[str, Any]]:  # fmt: skip
        """Predict on an image.

        Args:
            path: its file.
            boxes: prompts, x0, y0, x1, y1 in px each, one an object.
            points: prompts, x, y in px, and 1 on the object, 0 off it; all of one object.
            adapters: those that are wanted, "base" among them; by default all.

        Returns:
            The image as RGB (H, W, 3) uint8 and the model's output for it, or its outputs by adapter.
        """
        from picturing import as_rgb

        from peft_d2.data.images import read_image

        try:
            ordered = read_image(str(path), self.cfg.INPUT.FORMAT)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--input {path}: is no image that can be read ({error}).") from error
        image = as_rgb(ordered, self.cfg.INPUT.FORMAT)
        height, width = image.shape[:2]
        transform = self._resize.get_transform(ordered)
        resized = transform.apply_image(ordered)
        tensor = torch.as_tensor(np.ascontiguousarray(resized.astype("float32").transpose(2, 0, 1)))
        item = {"image": tensor, "height": height, "width": width, "file_name": str(path)}
        if boxes is not None:
            item["boxes"] = transform.apply_box(np.array(boxes, dtype=np.float64).reshape(-1, 4))
        if points is not None:
            rows = np.array(points, dtype=np.float64).reshape(-1, 3)
            item |= {"point_coords": transform.apply_coords(rows[:, :2])[None], "point_labels": rows[None, :, 2]}
        if self.by_adapter:
            predictions = self.base.predict_with(item, list(adapters or self.by_adapter))  # type: ignore[operator]
        else:
            predictions = {"": self.model([item])[0]}
        if self.prompted:
            for prediction in predictions.values():
                prediction["instances"].remove("pred_classes")  # a box has none, and would be drawn as the first
        return image, predictions if self.by_adapter else predictions[""]


def draw(image: np.ndarray, prediction: dict[str, Any], predictor: Predictor, threshold: float, target: Path) -> int:
    """Draw a prediction, or those of several adapters side by side; returns the number of instances drawn."""
    if not predictor.by_adapter:
        picture, count = paint(image, prediction, predictor.metadata, threshold)
        Image.fromarray(picture).save(target)
        return count
    painted = {name: paint(image, prediction[name], of, threshold) for name, of in predictor.by_adapter.items()}
    height, width = next(iter(painted.values()))[0].shape[:2]
    sheet = Image.new("RGB", (width * len(painted), height + _CAPTION), "white")
    for column, (name, (picture, _)) in enumerate(painted.items()):
        sheet.paste(Image.fromarray(picture), (column * width, _CAPTION))
        ImageDraw.Draw(sheet).text((column * width + 4, 4), name, "black")
    sheet.save(target)
    return sum(count for _, count in painted.values())


def paint(image: np.ndarray, prediction: dict[str, Any], metadata: Any, threshold: float) -> tuple[np.ndarray, int]:
    """The image with one prediction, panoptic before instances before semantic, and the number of instances drawn."""
    from detectron2.utils.visualizer import ColorMode, Visualizer

    sides = sorted(image.shape[:2])  # labels are unreadable on a small picture; a thin one is not made huge
    scale = max(1.0, min(_SHORT_SIDE / sides[0], 4 * _SHORT_SIDE / sides[1]))
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
    return np.ascontiguousarray(canvas.get_image()), count


if __name__ == "__main__":
    main()
