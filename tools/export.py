#!/usr/bin/env python
"""Write a model as ONNX, TorchScript or a torch.export program, for a fixed image size and any batch size.

    tools/export.py --config-file output/lora/config.yaml --format onnx --size 640 640 --output model.onnx \
        --opts MODEL.PEFT.WEIGHTS output/lora/adapter_final

A graph takes images (N, C, H, W) as the config's INPUT.FORMAT orders their channels, not normalised, padded at the
bottom and on the right with MODEL.PIXEL_MEAN, and gives the raw logits, masks and, of Mask DINO, boxes of all queries.
A file beside it, ``<output>.json``, says what is needed to use them: ``tools/serve_onnx.py`` does so with onnxruntime,
numpy and PIL alone. Segment Anything becomes two graphs, ``<output>`` for images and ``<stem>_decoder<suffix>`` for
prompts.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from command_line import config_parser, require_output, take_pairs
from torch import Tensor, nn
from torch.func import functional_call

from peft_d2 import peft
from peft_d2.adapters import adapter_contents
from peft_d2.engine.checkpointer import model_classes
from peft_d2.engine.errors import ConfigError, bounded, one_line_errors
from peft_d2.engine.factory import build_model
from peft_d2.engine.launch import prepare_config, warn_of_untrained
from peft_d2.models.layers.mask_classifier import MaskClassifier
from peft_d2.models.layers.transformer import MSDeformAttn
from peft_d2.models.sam.model import SegmentAnything
from peft_d2.models.sam.prompt_encoder import NOT_A_POINT
from peft_d2.models.sam2.model import SAM2
from peft_d2.peft.state import get_injection, injected_tensors, layer_tensors
from peft_d2.storage import adapter_file, disk

# 18 is the lowest that torch's exporter writes itself: antialiased Resize, and LayerNormalization (17) as one node.
OPSET = 18
MAPS = ("embedding", "finest", "finer")  # what prompts need of an image; the latter two, 4 G and 2 G wide, of SAM 2
FORMATS = ("onnx", "torchscript", "pt2")


def export_parser() -> argparse.ArgumentParser:
    """The arguments of ``tools/export.py``."""
    example = (
        "--config-file output/mine/config.yaml --output mine.onnx --opts MODEL.PEFT.WEIGHTS output/mine/adapter_final"
    )
    parser = config_parser("Write a model as ONNX, TorchScript or a torch.export program.", example)
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: %(default)s")
    parser.add_argument(
        "--size", type=bounded(int, 1), nargs=2, metavar=("H", "W"), help="of padded images, px; not for SAM"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--adapter-inputs", action="store_true", help="the adapter's tensors are inputs of the graph")
    take_pairs(parser)
    return parser


class RawOutputs(nn.Module):
    """A mask classifier from padded images (N, C, H, W) to ``pred_logits``, ``pred_masks`` and, if any, boxes."""

    def __init__(self, model: MaskClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        outputs = model.predict(model.backbone((image - model.pixel_mean) / model.pixel_std))
        return tuple(outputs[name] for name in self.names(outputs))

    @staticmethod
    def names(outputs: dict[str, Any]) -> list[str]:
        """The outputs' names, in the graph's order."""
        return [name for name in ("pred_logits", "pred_masks", "pred_boxes") if name in outputs]


class SamImages(nn.Module):
    """Segment Anything's images (N, C, S, S), padded or, of SAM 2, stretched, to :data:`MAPS`, of SAM the first."""

    def __init__(self, model: SegmentAnything) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        return model.image_maps((image - model.pixel_mean) / model.pixel_std)


class SamPrompts(nn.Module):
    """Segment Anything's prompts on the maps of one image to mask logits (P, K, 4 G, 4 G) and IoU (P, K).

    ``points`` (P, T, 2) are x and y in px of the image that was encoded, ``labels`` (P, T) what they are: 1 on the
    object, 0 beside it, 2 and 3 the top left and bottom right corner of a box, -1 nothing. A prompt of points without a
    box ends with one of -1, and of SAM 2 every prompt.
    """

    def __init__(self, model: SegmentAnything) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        points: Tensor,
        labels: Tensor,
        embedding: Tensor,
        finest: Tensor | None = None,
        finer: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        prompts = self.model.prompt_encoder
        tokens = prompts.embed_points(points, labels, alone=False)
        dense = prompts.no_mask_embed.weight[:, :, None, None].expand(tokens.shape[0], -1, prompts.grid, prompts.grid)
        inputs = embedding, prompts.dense_positions(), tokens, dense, self.model.multimask
        return self.model.mask_decoder(*inputs, (finest, finer))[:2]


class WithAdapter(nn.Module):
    """``graph`` with the tensors of ``names``, an adapter's, as further inputs in that order."""

    def __init__(self, graph: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.whole = graph  # a program has a `graph` of its own
        self.names = list(names)

    def forward(self, inputs: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> Any:
        return functional_call(self.whole, dict(zip(self.names, tensors, strict=True)), inputs)


def prepared(model: nn.Module, merged: bool = True) -> Any:
    """A copy in eval mode, on the CPU, without dropout of layers and with deformable attention as plain indexing.

    ``merged``: an adapter's weight changes are merged; what no weight can hold runs beside.
    """
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    if merged and peft.get_injection(model) is not None:
        peft.merge(model)
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.backend = "gather"
    return model


def export(
    graph: nn.Module,
    inputs: dict[str, Tensor],
    outputs: Sequence[str],
    path: Path,
    kind: str,
    adapter: dict[str, Tensor],
) -> None:
    """Write one graph.

    Args:
        graph: takes the ``inputs`` in their order; their first axis may be any, but of an image's :data:`MAPS`.
        inputs: examples by name: ``image``, ``points`` and ``labels`` may have any number of rows, points any number
            of columns.
        outputs: what the outputs are called.
        path: where to.
        kind: one of :data:`FORMATS`.
        adapter: tensors by their names in ``graph`` that become inputs too.
    """
    examples = tuple(inputs.values())
    rows, points = torch.export.Dim("rows", min=1, max=1024), torch.export.Dim("points", min=2, max=256)
    axes: dict[str, Any] = {
        "image": {0: rows},
        "points": {0: rows, 1: points},
        "labels": {0: rows, 1: points},
    }
    open_axes: Any = tuple(axes.get(name) for name in inputs)
    if adapter:
        graph = WithAdapter(graph, list(adapter))
        arguments: tuple[Any, ...] = (examples, tuple(adapter.values()))
        shapes: tuple[Any, ...] = (open_axes, tuple(None for _ in adapter))
    else:
        arguments, shapes = examples, open_axes
    with torch.no_grad(), disk.file(path) as temporary:
        if kind == "torchscript":
            torch.jit.trace(graph, arguments, check_trace=False).save(str(temporary))
            return
        program = torch.export.export(graph, arguments, dynamic_shapes=shapes, strict=False)
        program.graph.eliminate_dead_code()  # blocks without autocast whose results nobody reads cannot be saved
        if kind == "pt2":
            with open(temporary, "wb") as file:
                torch.export.save(program, file)
            return
        names = [*inputs, *(input_name(name) for name in adapter)]
        written: Any = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=names, output_names=list(outputs), verbose=False
        )
        written.save(str(temporary))


def input_name(name: str) -> str:
    """What a tensor of the adapter is called as an input of a graph."""
    return "adapter." + name


def adapter_inputs(model: nn.Module, prefix: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The active adapter's tensors by their names in a graph around ``model``, and their keys in an adapter file."""
    injection = get_injection(model)
    if injection is None:
        raise ConfigError("--adapter-inputs: the model has no adapter. Name one in MODEL.PEFT.WEIGHTS.")
    layers = {id(value): key for key, value in layer_tensors(model).items()}
    own = {**injected_tensors(injection, injection.active)}
    own |= {name: injection.full[name].get() for name in injection.current.values}
    tensors = {prefix + layers.get(id(value), name): value for name, value in own.items()}
    keys = dict(zip((input_name(name) for name in tensors), adapter_file.to_file(own), strict=True))
    return tensors, keys


def write(model: nn.Module, cfg: Any, path: Path, kind: str, size: tuple[int, int], with_adapter: bool) -> list[Path]:
    """Write the graphs of one model and what is needed to use them; returns the files."""
    injection = get_injection(model)
    classes = model_classes(model, cfg.MODEL.WEIGHTS)
    adapter = json.loads(adapter_contents(model)[adapter_file.RECORD]) if injection and with_adapter else {}
    model = prepared(model, merged=not with_adapter)
    tensors, keys = adapter_inputs(model, "model.") if with_adapter else ({}, {})
    channels = len(cfg.MODEL.PIXEL_MEAN)
    record: dict[str, Any] = {
        "format": cfg.INPUT.FORMAT, "size": list(size), "adapter_inputs": keys,
        "resize": [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST], "top_k": cfg.TEST.DETECTIONS_PER_IMAGE,
        "pad": [0.0] * channels if getattr(model, "pads_with_black", False) else list(cfg.MODEL.PIXEL_MEAN),
    }  # fmt: skip
    if adapter:  # of other adapters the graph computes something else
        record["adapter"] = {"methods": adapter["methods"], "base": {"weights": adapter["base"]["weights"]}}
    files = [path]
    if isinstance(model, SegmentAnything):
        side = model.image_size
        stretched = isinstance(model, SAM2)
        record |= {"model": "sam2" if stretched else "sam", "size": [side, side]}
        image = torch.rand(2, channels, side, side)
        with torch.no_grad():
            maps = dict(zip(MAPS, SamImages(model)(image), strict=False))
        export(SamImages(model), {"image": image}, list(maps), path, kind, tensors)
        prompts = {
            "points": torch.rand(2, 5, 2) * side,
            "labels": torch.tensor([[1, 0, 2, 3, NOT_A_POINT]] * 2),
            **{name: value[:1] for name, value in maps.items()},
        }
        files.append(path.with_name(f"{path.stem}_decoder{path.suffix}"))
        export(SamPrompts(model), prompts, ["masks", "iou"], files[1], kind, tensors)
    elif isinstance(model, MaskClassifier):
        classify = "softmax" if getattr(model, "softmax_classes", True) else "sigmoid"
        record |= {"model": type(model).__name__.removeprefix("Adapted"), "scores": classify}
        record["bicubic"], record["mask_quality"] = model.bicubic_results, model.mask_quality
        record["classes"] = classes or list(getattr(model.metadata, "thing_classes", ()))
        image = 255 * torch.rand(2, channels, *size)
        graph = RawOutputs(model)
        with torch.no_grad():  # also makes class vectors that are made at their first use
            names = graph.names(model.predict(model.backbone((image - model.pixel_mean) / model.pixel_std)))
        export(graph, {"image": image}, names, path, kind, tensors)
    else:
        raise ConfigError(
            f"MODEL: {type(model).__name__} is none of Mask2Former, Mask DINO, SEEM, EoMT and Segment Anything 1 and 2."
        )
    record["graphs"] = [file.name for file in files]
    disk.write_bytes(f"{path}.json", json.dumps(record, indent=1).encode())
    return [*files, Path(f"{path}.json")]


def main(arguments: list[str] | None = None) -> None:
    """Run ``tools/export.py``."""
    args = export_parser().parse_args(arguments)

    def run() -> None:
        from peft_d2.engine.checkpointer import Checkpointer

        require_output("--output", args.output, args.config_file, args.peft_config)
        if Path(args.output).exists() and not Path(f"{args.output}.json").exists():
            raise ConfigError(
                f"--output {args.output} is no earlier export, and would be written over. Choose another."
            )
        cfg = prepare_config(args, reads=())
        model = build_model(cfg).eval()
        checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, allow_other_base=cfg.MODEL.PEFT.ALLOW_OTHER_BASE)
        checkpointer.load(cfg.MODEL.WEIGHTS)
        warn_of_untrained(cfg, model, checkpointer.names())
        size = tuple(args.size or (cfg.INPUT.MIN_SIZE_TEST,) * 2)
        step = max(32, getattr(model, "size_divisibility", 32))
        if any(side < 1 or side % step for side in size):
            raise ConfigError(f"--size {size[0]} {size[1]}: expected multiples of {step}, to which images are padded.")
        for file in write(model, cfg, Path(args.output), args.format, size, args.adapter_inputs):  # type: ignore[arg-type]
            print(f"{file}: {file.stat().st_size:,} bytes")
        if args.format == "onnx":
            print(f"To use it where there is no torch, copy {Path(__file__).with_name('serve_onnx.py')} beside it.")

    one_line_errors(run)


if __name__ == "__main__":
    main()
