#!/usr/bin/env python
"""Measure PEFT configs beside full fine-tuning: trainable share, step time, memory, file size, inference, merged.

    tools/analyze_peft.py --config-file configs/coco/instance/mask2former_swin_t.yaml \
        --peft-config configs/peft/mask2former/lora.yaml configs/peft/mask2former/heads.yaml --json figures.json

Each case lives in a process of its own, so that memory is its own, and the processes take turns; what waits holds no
memory but its weights and optimizer. Of the rounds the fastest counts: whatever else the machine does can only add.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from command_line import require_output, take_pairs
from torch import nn

from peft_d2.engine.errors import ConfigError, bounded, one_line_errors
from peft_d2.engine.factory import build_model
from peft_d2.engine.launch import prepare_config
from peft_d2.memory import MemoryBudgetError, MemoryPlan, SavedTensors, fit_memory
from peft_d2.memory.blocks import resident_bytes, return_freed_memory
from peft_d2.memory.meter import ProcessPeak
from peft_d2.storage import disk

_PICTURES = (".png", ".pdf", ".svg", ".jpg")
FULL = "full fine-tuning"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_ROOM = 1.05  # beside the smallest budget, which is not measured the same twice


@dataclass(frozen=True)
class Figures:
    """What was measured of one case; times are the shortest of all rounds in seconds, sizes are bytes.

    Attributes:
        peak_memory: the highest of all training steps: the weights, and what the process grew by beyond the idle
            model, or memory allocated on its GPU.
        weights: the model's, part of every peak.
        planned_memory: what the plan of a memory budget expects it to be; None without one.
        saved_bytes, saved_tensors: what autograd keeps between forward and backward, weights not counted.
        merged_time: of inference with the adapter merged; None where it is no change of weights.
        twin_time: of a step with deformable attention in plain torch; None where it was not asked for.
    """

    name: str
    trainable: int
    percent: float
    step_time: float
    peak_memory: int
    weights: int
    saved_bytes: int
    saved_tensors: int
    file_size: int
    inference_time: float
    merged_time: float | None
    twin_time: float | None
    planned_memory: int | None


def main(arguments: list[str] | None = None) -> None:
    """Run ``tools/analyze_peft.py``."""
    args = analysis_parser().parse_args(arguments)
    one_line_errors(lambda: analyze(args))


def analysis_parser() -> argparse.ArgumentParser:
    """The arguments of ``tools/analyze_peft.py``."""
    example = "--config-file configs/demo/base.yaml --peft-config configs/peft/mask2former/lora.yaml --size 256"
    parser = argparse.ArgumentParser(
        description="Measure PEFT configs beside full fine-tuning, on random images: time, memory, size, inference.",
        epilog=f"an example:\n  %(prog)s {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the model's config")
    parser.add_argument("--peft-config", nargs="*", default=[], metavar="FILE", help="one or more of configs/peft")
    parser.add_argument(
        "--budget",
        type=bounded(float, 0),
        nargs="*",
        default=[],
        metavar="GIB",
        help="each of them under these budgets, too; 0: the smallest that it can meet",
    )
    parser.add_argument("--size", type=bounded(int, 1), default=512, help="height and width of the images")
    parser.add_argument(
        "--batch", type=bounded(int, 1), default=1, help="images of a training step; inference takes one"
    )
    parser.add_argument(
        "--rounds", type=bounded(int, 1), default=5, help="how often each is measured, each time after a warm-up"
    )
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="cpu counts the processor's seconds, which a busy machine disturbs less (not for GPUs)",
    )
    parser.add_argument(
        "--twin", action="store_true", help="take each step with deformable attention in plain torch, too"
    )
    parser.add_argument("--json", default="", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--plot", default="", metavar="FILE", help="draw peak against time there")
    take_pairs(parser)
    return parser


def analyze(args: argparse.Namespace) -> list[Figures]:
    """Measure all cases, print the table, write the json.

    Raises:
        ConfigError: a config or a number that cannot be; a case whose process ended early.
    """
    for option in ("json", "plot"):
        if file := getattr(args, option):
            require_output(f"--{option}", file, args.config_file, *args.peft_config)
    if args.plot and Path(args.plot).suffix.lower() not in _PICTURES:
        raise ConfigError(f"--plot {args.plot}: expected a name that ends in {', '.join(_PICTURES)}.")
    for path in ("", *args.peft_config):  # told here, before any process is started
        device = _config(path, args).MODEL.DEVICE
        if args.clock == "cpu" and device != "cpu":
            raise ConfigError(f"--clock cpu does not see what MODEL.DEVICE {device} does; use --clock wall.")
    names = [Path(path).stem for path in args.peft_config]
    if len(set(names)) < len(names):
        names = list(args.peft_config)
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer(FULL, "", args))]
        for name, path in zip(names, args.peft_config, strict=True):
            peers.append(stack.enter_context(Peer(name, path, args)))
            for budget in args.budget:
                limit = f"{budget:g} GiB" if budget else "smallest budget"
                peers.append(stack.enter_context(Peer(f"{name}, {limit}", path, args, budget=budget)))
        figures = take_turns(peers, args.rounds, [("step",), ("infer", "merged")])
        operator = peers[0].ask("operator")
    print(table(figures))
    if args.plot:
        plot(figures, args.plot)
    if args.json:
        write_json(args.json, args, figures, operator)
    return figures


def take_turns(peers: Sequence[Peer], rounds: int, groups: Sequence[Sequence[str]]) -> list[Figures]:
    """Measure every peer ``rounds`` times; all do one of ``groups`` at a time."""
    for number in range(rounds):
        for whats in groups:  # what is compared follows one another at once
            for peer in peers:
                for what in whats:
                    peer.measure(what)
        print(f"round {number + 1} of {rounds} done", file=sys.stderr, flush=True)
    return [peer.figures() for peer in peers]


def write_json(path: str | Path, args: argparse.Namespace, figures: Sequence[Figures], operator: str) -> None:
    """Write the figures and what they were measured on."""
    about = {"config": args.config_file, "size": args.size, "batch": args.batch, "rounds": args.rounds}
    about |= {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    about |= {"threads": torch.get_num_threads(), "clock": args.clock, "opts": args.opts, "operator": operator}
    content = json.dumps({"run": about, "cases": [asdict(f) for f in figures]}, indent=1) + "\n"
    disk.write_bytes(path, content.encode())


def table(figures: Sequence[Figures]) -> str:
    """The figures as a markdown table; in brackets relative to the first case."""
    base = figures[0]
    planned = any(item.planned_memory is not None for item in figures)
    rows = []
    for item in figures:
        row = {
            "": item.name,
            "trainable": f"{item.trainable:,}",
            "%": f"{item.percent:.2f}",
            "step s": _beside(item.step_time, base.step_time, 1, 3),
            "peak MiB": _beside(item.peak_memory, base.peak_memory, 2**20),
            "saved MiB": _beside(item.saved_bytes, base.saved_bytes, 2**20),
            "saved tensors": _beside(item.saved_tensors, base.saved_tensors, 1),
            "file MB": _beside(item.file_size, base.file_size, 1e6, 2),
            "inference s": _beside(item.inference_time, base.inference_time, 1, 3),
            "merged s": "-" if item.merged_time is None else _beside(item.merged_time, base.inference_time, 1, 3),
        }
        if planned:
            row["planned MiB"] = "" if item.planned_memory is None else f"{item.planned_memory / 2**20:.0f}"
        if item.twin_time is not None:
            row["step with the twin s (of its own)"] = _beside(item.twin_time, item.step_time, 1, 3)
        rows.append(row)
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(figures: Sequence[Figures], path: str) -> None:
    """Draw each case's peak of a training step against its time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    for item in figures:
        at = (item.step_time, item.peak_memory / 2**20)
        axes.plot(*at, "o" if item.planned_memory is None else "s")
        axes.annotate(item.name, at, textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set(
        xlabel="seconds of a training step",
        ylabel="peak memory, MiB",
        xlim=(0, 1.4 * max(item.step_time for item in figures)),
    )
    axes.set_ylim(0)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", dpi=120)


def _beside(value: float, reference: float, unit: float, digits: int = 0) -> str:
    return f"{value / unit:.{digits}f} ({value / reference:.2f}x)" if reference else f"{value / unit:.{digits}f}"


class Peer:
    """This side of a case's process, and of another one that runs the operator's twin where that is asked for."""

    def __init__(
        self, name: str, peft_config: str, args: argparse.Namespace, backend: str = "", budget: float | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.twin = Peer(f"{name}, twin", peft_config, args, "torch", budget) if args.twin and not backend else None
        self.times: dict[str, list[float]] = {"step": [], "infer": [], "merged": []}
        self._connection, theirs = context.Pipe()
        self._backend = {"PEFT_D2_BACKEND": backend} if backend else {}
        self._process = context.Process(target=_serve, args=(theirs, peft_config, args, budget), daemon=True)

    def __enter__(self) -> Peer:
        with patch.dict(os.environ, self._backend):  # read as the operator is imported
            self._process.start()
        if self.twin is not None:
            self.twin.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.join()
        if self.twin is not None:
            self.twin.__exit__(*error)

    def ask(self, what: str) -> Any:
        """What the process answers; an exception of its own is raised here."""
        self._connection.send(what)
        while not self._connection.poll(1.0):
            if not self._process.is_alive():
                raise ConfigError(f"{self.name}: its process ended early (exit code {self._process.exitcode}).")
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def measure(self, what: str) -> None:
        """Take one time."""
        seconds = self.ask(what)
        if seconds is not None:
            self.times[what].append(seconds)
        if what == "step" and self.twin is not None:
            self.twin.measure(what)

    def best(self, what: str) -> float | None:
        """The shortest time taken of `what`."""
        return min(self.times[what], default=None)

    def figures(self) -> Figures:
        return Figures(
            name=self.name,
            step_time=self.best("step") or 0.0,
            inference_time=self.best("infer") or 0.0,
            merged_time=self.best("merged"),
            twin_time=None if self.twin is None else self.twin.best("step"),
            **self.ask("figures"),
        )


def _serve(connection: Connection, peft_config: str, args: argparse.Namespace, budget: float | None) -> None:
    """The other side: build the case, then answer one question after another."""
    logging.disable(logging.WARNING)
    case: Case | None = None
    while True:
        question = connection.recv()
        try:
            case = case or Case(peft_config, args, budget)
            answer = getattr(case, question)()
            return_freed_memory()  # a dozen processes that wait may not hold a dozen peaks
            connection.send(answer)
        except Exception as error:  # its message is raised in the process that asked
            connection.send(
                error if isinstance(error, ConfigError) else ConfigError(f"{type(error).__name__}: {error}")
            )
            return


def _config(peft_config: str, args: argparse.Namespace) -> Any:
    opts = [*args.opts, "MODEL.WEIGHTS", "", *([] if peft_config else ["MODEL.PEFT.TRAIN", "['*']"])]
    return prepare_config(argparse.Namespace(config_file=args.config_file, peft_config=peft_config, opts=opts))


class Case:
    """A config's model under one PEFT config, random weights, random images.

    Args:
        peft_config: a file, or "" for full fine-tuning.
        args: see :func:`analysis_parser`.
        budget: GiB that a step may take; 0: the smallest that it can meet; None: no limit.
    """

    def __init__(self, peft_config: str, args: argparse.Namespace, budget: float | None = None) -> None:
        from peft_d2 import peft
        from peft_d2.engine.optimizer import build_optimizer
        from peft_d2.engine.step import TrainStep, amp_dtype

        self.cfg = _config(peft_config, args)
        torch.manual_seed(0)
        self.model = build_model(self.cfg)
        if peft.get_injection(self.model) is None:
            raise ConfigError(f"{peft_config}: names no method and nothing to train; expected one of configs/peft.")
        self.batch = [random_sample(args.size, self._classes()) for _ in range(args.batch)]
        optimizer = build_optimizer(self.cfg, self.model)
        self._step = TrainStep(self.model, _forever(self.batch), optimizer, amp_dtype(self.cfg))
        self._plan = None if budget is None else self._fitted(budget)
        return_freed_memory()
        self._idle, self._peak = resident_bytes(), 0
        self._clock = CLOCKS[args.clock]

    def _fitted(self, budget: float) -> MemoryPlan:
        def forward(model: nn.Module, batch: Any) -> Any:
            with self._step.precision():
                return model(batch)

        fit = partial(fit_memory, self.model.train(), self.batch, forward=forward)
        plan, tried = None, [budget] if budget else [1 / 2**20]
        while plan is None:
            try:
                plan = fit(tried[-1])
            except MemoryBudgetError as error:
                if budget or len(tried) > 3:
                    raise
                tried.append(_ROOM * error.smallest)
        self._step.pieces = plan.pieces
        return plan

    def _classes(self) -> int:
        from peft_d2.engine.checks import class_count_key
        from peft_d2.engine.config import leaves

        return int(dict(leaves(self.cfg))[class_count_key(self.cfg)])

    def step(self) -> float:
        """Seconds of a training step as the trainer takes it."""
        from detectron2.utils.events import EventStorage

        self.model.train()
        with EventStorage(0) as storage:
            self._step.storage = storage
            start = resident_bytes()
            with ProcessPeak() as process:
                seconds = self._seconds(self._step.run_step)
            self._peak = max(self._peak, start + process.bytes - self._idle)
            return seconds

    def infer(self) -> float:
        """Seconds of one image's inference, adapter as it is."""
        self.model.eval()
        with torch.no_grad():
            return self._seconds(lambda: self.model(self.batch[:1]))

    def merged(self) -> float | None:
        """The same with the adapter merged into the weights; None where that is not possible."""
        from peft_d2 import peft

        try:
            peft.merge(self.model)
        except peft.PeftError:
            return None
        try:
            return self.infer()
        finally:
            peft.unmerge(self.model)

    def operator(self) -> str:
        """The backend of deformable attention."""
        from peft_d2 import ops

        return ops.default_backend(self.cfg.MODEL.DEVICE.partition(":")[0])

    def peak(self) -> int:
        """The highest memory of all training steps until now, the weights counted in."""
        return torch.cuda.max_memory_allocated() if self._on_gpu() else self._peak + self._weights()

    def _weights(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))

    def figures(self) -> dict[str, Any]:
        """What is counted, not timed."""
        from peft_d2 import peft

        report = peft.make_report(self.model)
        saved = self._saved()
        return {
            **{"trainable": report.trainable, "percent": report.percent, "peak_memory": self.peak()},
            "weights": self._weights(),
            **{"saved_bytes": saved.bytes, "saved_tensors": saved.count, "file_size": self._file_size()},
            "planned_memory": None if self._plan is None else self._plan.peak,
        }

    def _saved(self) -> SavedTensors:
        self.model.train()
        with SavedTensors(self.model) as saved, self._step.precision():
            losses = self.model(self.batch)
        del losses
        return saved

    def _file_size(self) -> int:
        from peft_d2.adapters import save_adapter

        with tempfile.TemporaryDirectory() as folder:
            save_adapter(self.model, Path(folder, "adapter"))
            return sum(path.stat().st_size for path in Path(folder, "adapter").iterdir())

    def _on_gpu(self) -> bool:
        return self.cfg.MODEL.DEVICE.startswith("cuda")

    def _seconds(self, function: Callable[[], Any]) -> float:
        wait = torch.cuda.synchronize if self._on_gpu() else (lambda: None)
        function()  # the one before gave its memory back, and a training's steps find theirs at hand
        wait()
        start = self._clock()
        function()
        wait()
        return self._clock() - start


def random_sample(size: int, classes: int, objects: int = 5) -> dict[str, Any]:
    """A mapped dict of Detectron2: an image of noise (3, size, size) and rectangular objects."""
    from detectron2.structures import BitMasks, Boxes, Instances

    corners = torch.rand(objects, 2) * size * 0.6
    boxes = torch.cat([corners, corners + size * 0.3], dim=1)
    masks = torch.zeros(objects, size, size, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    instances = Instances((size, size))
    instances.gt_boxes, instances.gt_masks = Boxes(boxes), BitMasks(masks)
    instances.gt_classes = torch.randint(0, classes, (objects,))
    labels = torch.where(masks.any(0), 1 % classes, 0)
    image = torch.randint(0, 256, (3, size, size)).float()
    return {"image": image, "height": size, "width": size, "instances": instances, "sem_seg": labels}


def _forever(batch: list[Any]) -> Iterator[list[Any]]:
    while True:
        yield batch


if __name__ == "__main__":
    main()
