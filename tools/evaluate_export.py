#!/usr/bin/env python
"""Evaluate an exported model on the config's test sets, beside the model that it was made of.

    tools/evaluate_export.py --config-file output/lora/config.yaml --model model.onnx \
        --opts MODEL.PEFT.WEIGHTS output/lora/adapter_final

``model.onnx`` is what ``tools/export.py`` wrote of the same config. Its graphs take the place of the networks: images
are read, results are made and figures are computed by the same code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from command_line import config_parser, take_pairs
from detectron2.structures import ImageList
from export import MAPS
from torch import Tensor

from peft_d2.engine.checkpointer import Checkpointer
from peft_d2.engine.errors import ConfigError, one_line_errors
from peft_d2.engine.factory import build_model
from peft_d2.engine.launch import prepare_config
from peft_d2.engine.trainer import Trainer
from peft_d2.models.sam.model import SegmentAnything
from peft_d2.models.sam.prompt_encoder import NOT_A_POINT, Prompts
from peft_d2.models.sam2.model import SAM2


def evaluate_parser() -> argparse.ArgumentParser:
    """The arguments of ``tools/evaluate_export.py``."""
    what = "Evaluate an exported model beside the model that it was made of."
    parser = config_parser(what, config="as for tools/export.py")
    parser.add_argument("--model", required=True, type=Path, metavar="FILE", help="what tools/export.py wrote")
    parser.add_argument("--val-json", default="", metavar="FILE", help="COCO annotations of a data set of your own")
    parser.add_argument("--val-images", default="", metavar="DIR", help="folder of its images")
    parser.add_argument("--name", default="exported", help="of that data set; default: %(default)s")
    take_pairs(parser)
    return parser


def read_graph(path: Path) -> Callable[..., tuple[Tensor, ...]]:
    """A function of a graph's inputs by name, in their order, to its outputs."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda **inputs: tuple(
            map(torch.as_tensor, session.run(None, {name: value.numpy() for name, value in inputs.items()}))
        )
    try:
        program: Any = torch.jit.load(path)
    except RuntimeError:
        program = torch.export.load(path).module()

    def run(**inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = program(*inputs.values())
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    return run


def read_record(path: Path) -> dict[str, Any]:
    """What the export wrote of its graphs; ConfigError where these cannot be evaluated."""
    record = json.loads(Path(f"{path}.json").read_text())
    if record["adapter_inputs"]:
        raise ConfigError(f"{path} takes an adapter's tensors as inputs: export it without --adapter-inputs.")
    return record


def replace_networks(model: Any, path: Path, record: dict[str, Any]) -> None:
    """Let the graphs at ``path`` compute what the networks of ``model``, on the CPU and in eval mode, do."""
    graphs = [read_graph(path.with_name(name)) for name in record["graphs"]]
    if isinstance(model, SegmentAnything):
        _replace_prompted(model, graphs)
        return
    height, width = record["size"]
    normed = (torch.tensor(record["pad"]).view(-1, 1, 1) - model.pixel_mean) / model.pixel_std
    to_batch = model.to_batch

    def padded(batched_inputs: list[dict[str, Any]]) -> ImageList:
        batch = to_batch(batched_inputs)
        side_y, side_x = batch.tensor.shape[-2:]
        if side_y > height or side_x > width:
            raise ConfigError(f"{path} takes {height} x {width} px, an image {side_y} x {side_x}: export a larger one.")
        whole = normed.expand(len(batch.tensor), -1, height, width).clone()
        whole[..., :side_y, :side_x] = batch.tensor
        return ImageList(whole, batch.image_sizes)

    def predict(images: Tensor, targets: Any = None) -> dict[str, Tensor]:
        outputs = graphs[0](image=images * model.pixel_std + model.pixel_mean)
        return dict(zip(("pred_logits", "pred_masks", "pred_boxes"), outputs, strict=False))

    del model.backbone
    model.backbone, model.to_batch, model.predict = (lambda images: images), padded, predict


def _replace_prompted(model: SegmentAnything, graphs: list[Callable[..., tuple[Tensor, ...]]]) -> None:
    def image_maps(images: Tensor) -> tuple[Tensor, ...]:
        return graphs[0](image=images * model.pixel_std + model.pixel_mean)

    def decode(maps: tuple[Tensor, ...], prompts: Prompts, multimask: bool = False) -> tuple[Tensor, Tensor]:
        if prompts.masks is not None or not len(prompts):
            raise ConfigError("an exported Segment Anything takes points and boxes")
        points, labels = [], []
        if prompts.points is not None:
            points, labels = [prompts.points[0]], [prompts.points[1]]
        if prompts.boxes is not None:
            points.append(prompts.boxes.reshape(-1, 2, 2))
            labels.append(torch.tensor([[2, 3]]).expand(len(prompts), -1))
        if prompts.boxes is None or isinstance(model, SAM2):
            points.append(torch.zeros(len(prompts), 1, 2))
            labels.append(torch.full((len(prompts), 1), NOT_A_POINT))
        named = dict(zip(MAPS, maps, strict=False))
        masks, quality = graphs[1](points=torch.cat(points, 1), labels=torch.cat(labels, 1).long(), **named)
        return masks, quality

    model.image_maps, model.decode = image_maps, decode  # type: ignore[method-assign]


def compare(cfg: Any, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of all test sets, of the model in torch and of the graphs."""
    record = read_record(path)
    model: Any = build_model(cfg).cpu().eval()
    Checkpointer(model, allow_other_base=cfg.MODEL.PEFT.ALLOW_OTHER_BASE).load(cfg.MODEL.WEIGHTS)
    with torch.no_grad():
        own = Trainer.test(cfg, model)
        replace_networks(model, path, record)
        return own, Trainer.test(cfg, model)


def main(arguments: list[str] | None = None) -> None:
    """Run ``tools/evaluate_export.py``."""
    args = evaluate_parser().parse_args(arguments)

    def run() -> None:
        cfg = prepare_config(args, reads=("TEST",))
        if not cfg.DATASETS.TEST:
            raise ConfigError("DATASETS.TEST is empty: name a data set, or --val-json and --val-images.")
        own, graphs = compare(cfg, args.model)
        for task, figures in own.items():
            for name, value in figures.items():
                if isinstance(value, float):
                    print(f"{task}/{name}: {value:.3f} in torch, {graphs[task][name]:.3f} of {args.model.name}")

    one_line_errors(run)


if __name__ == "__main__":
    main()
