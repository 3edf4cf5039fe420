#!/usr/bin/env python
"""The table and the plot of docs/memory-and-speed.md: methods x memory budgets, peak and time of a training step.

    OMP_NUM_THREADS=2 projects/memory_budget/memory_table.py --output output/memory_budget

The rows of a model in rows.yaml are measured in one run, each in a process of its own, in turns, by
tools/analyze_peft.py; the figures go to a file of that model. A model that has its file is not measured again.
table.md and memory.png hold all that was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from analyze_peft import Peer, analysis_parser, take_turns, write_json  # noqa: E402

from peft_d2.engine.errors import ConfigError, one_line_errors  # noqa: E402

MIB = 2**20
COLUMNS = ["", "trained %", "peak MiB", "of full", "above idle, of full", "planned MiB", "step s", "of full"]
MODELS = yaml.safe_load(Path(__file__).with_name("rows.yaml").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/memory_budget", metavar="DIR", help="where all is written")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--rounds", default="2", help="how often each is measured")
    parser.add_argument("--clock", default="wall", help="cpu on a busy machine")
    parser.add_argument("--size", help="of the images, in place of the file's")
    args = parser.parse_args()

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        if not file_of(output, name).exists():
            measure(name, file_of(output, name), args)
        write(output)
    print((output / "table.md").read_text(), end="")


def measure(name: str, file: Path, args: argparse.Namespace) -> None:
    """Measure all rows of a model in one run. One that fails, as a budget that cannot be met, is named and left out."""
    model = MODELS[name]
    words = ["--config-file", str(ROOT / model["config"]), "--size", args.size or str(model["size"])]
    words += ["--rounds", args.rounds, "--clock", args.clock, "--opts", *model.get("opts", [])]
    if model.get("class_vectors"):
        vectors = file.with_name("class_vectors.safetensors").resolve()
        write_class_vectors(vectors, model["class_vectors"])
        words += ["MODEL.SEEM.CLASS_VECTORS", str(vectors)]
    with contextlib.ExitStack() as stack:
        peers: list[Peer] = []
        for row, opts, share in rows_of(model):
            budget = share and share * peers[0].ask("peak") / 2**30
            title = row if budget is None else f"{row}, {f'{budget:.2f} GiB' if budget else 'smallest budget'}"
            case = analysis_parser().parse_args([*words, *opts])
            peer = stack.enter_context(Peer(title, str(ROOT / "configs" / "peft" / "full.yaml"), case, budget=budget))
            try:
                peer.ask("step")  # shares are of the first row's peak
                peers.append(peer)
                print(f"{name}: {title} is ready", file=sys.stderr, flush=True)
            except ConfigError as error:
                if not peers:
                    raise
                print(f"{name}: {title}: {error}", file=sys.stderr, flush=True)
        figures = take_turns(peers, int(args.rounds), [["step"]])
        write_json(file, analysis_parser().parse_args(words), figures, peers[0].ask("operator"))


def write_class_vectors(file: Path, data_set: str) -> None:
    """Random vectors of a data set's classes: no text encoder is in memory, as with a user's own file."""
    import torch
    from detectron2.data import MetadataCatalog

    from peft_d2.models.seem.vocabulary import ClassVectors

    names = tuple(MetadataCatalog.get(data_set).stuff_classes)
    drawn = torch.randn(1, len(names) + 1, 512)
    ClassVectors(names, drawn / drawn.norm(dim=-1, keepdim=True), ("{}",)).write(file)


def rows_of(model: dict[str, Any]) -> Iterator[tuple[str, list[str], float | None]]:
    """(name, config keys and values, budget as a share of the first row's peak) of each row, full fine-tuning first."""
    for name, row in model["rows"].items():
        train, methods = row.get("TRAIN", model["train"]), row.get("METHODS", [])
        opts = ["MODEL.PEFT.TRAIN", repr(train), "MODEL.PEFT.METHODS", repr(methods)]
        for share in (None, *row.get("budgets", [])):
            yield name, opts, share


def file_of(output: Path, name: str) -> Path:
    """Where a model's figures lie."""
    return output / f"{''.join(c if c.isalnum() else '_' for c in name)}.json"


def write(output: Path) -> None:
    """Write table.md and memory.png of all models that were measured."""
    files = {name: file_of(output, name) for name in MODELS}
    measured = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    lines = [COLUMNS, ["---"] + ["---:"] * (len(COLUMNS) - 1)]
    for name, content in measured.items():
        lines.append([f"**{name}, {content['run']['size']} px**", *[""] * (len(COLUMNS) - 1)])
        lines += [line_of(case, content["cases"][0]) for case in content["cases"]]
    (output / "table.md").write_text("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    draw(measured, output / "memory.png")


def line_of(case: dict[str, Any], full: dict[str, Any]) -> list[str]:
    """One row of the table."""
    peak, above = case["peak_memory"], case["peak_memory"] - case["weights"]
    return [
        case["name"],
        f"{case['percent']:.1f}",
        f"{peak / MIB:.0f}",
        f"{peak / full['peak_memory']:.2f}",
        f"{above / (full['peak_memory'] - full['weights']):.2f}",
        "" if case["planned_memory"] is None else f"{case['planned_memory'] / MIB:.0f}",
        f"{case['step_time']:.2f}",
        f"{case['step_time'] / full['step_time']:.2f}",
    ]


def draw(measured: dict[str, Any], file: Path) -> None:
    """Peak against time, a field per model and a colour per method; a line goes from no budget to the smallest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, fields = pyplot.subplots(2, 3, figsize=(11, 6.4))
    methods = list(dict.fromkeys(row for model in MODELS.values() for row in model["rows"]))
    for axes, (name, content) in zip(fields.flat, measured.items(), strict=False):
        for number, method in enumerate(methods):
            cases = [case for case in content["cases"] if case["name"].partition(", ")[0] == method]
            times, peaks = [case["step_time"] for case in cases], [case["peak_memory"] / 2**30 for case in cases]
            axes.plot(times, peaks, "-", color=f"C{number}", linewidth=1)
            axes.plot(times[:1], peaks[:1], "o", color=f"C{number}")
            axes.plot(times[1:], peaks[1:], "s", color=f"C{number}", markersize=5)
        axes.set(title=f"{name}, {content['run']['size']} px", xlabel="seconds of a step", ylabel="peak, GiB")
        axes.set_xlim(0)
        axes.set_ylim(0)
        axes.grid(alpha=0.3)
    for axes in fields.flat[len(measured) :]:
        axes.axis("off")
    handles = [pyplot.Line2D([], [], marker="o", color=f"C{i}", label=method) for i, method in enumerate(methods)]
    handles.append(pyplot.Line2D([], [], marker="s", color="grey", label="under a budget"))
    fields.flat[-1].legend(handles=handles, loc="center", frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    one_line_errors(main)
