#!/usr/bin/env python
"""Losses and AP of one or several runs in one picture, from their ``metrics.json``.

tools/plot_metrics.py output/run output/other --output curves.png
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import require_output

from peft_d2.engine.errors import ConfigError, bounded, one_line_errors

METRICS_FILE = "metrics.json"
_PARTS = re.compile(r"total_loss|loss_[a-z]+")  # without those of single layers and denoising
_SCORES = re.compile(r".*(segm|bbox|panoptic_seg|sem_seg)(_TTA)?/(AP|PQ|mIoU)")


def main(arguments: list[str] | None = None) -> None:
    """Run ``tools/plot_metrics.py``."""
    parser = argparse.ArgumentParser(description="Draw losses and AP of one or several runs.")
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="OUTPUT_DIR of a run; its name is the label")
    parser.add_argument("--output", required=True, metavar="FILE", help="picture to write: png, svg or pdf")
    parser.add_argument(
        "--smooth", type=bounded(int, 1), default=1, metavar="N", help="running mean of a loss over N entries"
    )
    args = parser.parse_args(arguments)

    def run() -> None:
        require_output("--output", args.output)
        plot_runs(args.runs, args.output, args.smooth)

    one_line_errors(run)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.json``, in order; of an iteration that was run twice, the later ones.

    A line that a kill or a full disk cut short is left out.

    Raises:
        ConfigError: there is no such file, or nothing in it.
    """
    path = Path(folder, METRICS_FILE)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Give the OUTPUT_DIR of a run that has taken 20 iterations or ended.")
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "iteration" in row:
            # A run that was killed and resumed repeats what came after its last checkpoint.
            rows = {k: v for k, v in rows.items() if k <= row["iteration"]}
            rows[row["iteration"]] = {**rows.get(row["iteration"], {}), **row}
    if not rows:
        raise ConfigError(f"{path}: holds no figures yet.")
    return list(rows.values())


def plot_runs(folders: Sequence[str | Path], output: str | Path, smooth: int = 1) -> None:
    """Write a picture: the total loss and the AP of all runs; of a single one also the parts of the loss.

    Raises:
        ConfigError: a folder without metrics, or a kind of picture that matplotlib does not know.
    """
    from matplotlib.figure import Figure

    runs = {_label(folder, folders): read_metrics(folder) for folder in folders}
    figure = Figure(figsize=(12, 4.5))
    losses, scores = figure.subplots(1, 2)
    for label, rows in runs.items():
        names = sorted({name for row in rows for name in row if _PARTS.fullmatch(name)})
        for name in names if len(runs) == 1 else ["total_loss"]:
            steps, values = _series(rows, name)
            losses.plot(steps, _smoothed(values, smooth), label=name if len(runs) == 1 else label, linewidth=1.2)
        for name in sorted({name for row in rows for name in row if _SCORES.fullmatch(name)}):
            steps, values = _series(rows, name)
            scores.plot(steps, values, marker="o", markersize=3, label=name if len(runs) == 1 else f"{label} {name}")
    losses.set(xlabel="iteration", ylabel="loss", yscale="log")
    scores.set(xlabel="iteration", ylabel="AP", ylim=(0, None))
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    if not scores.lines:
        scores.text(0.5, 0.5, "not evaluated yet", ha="center", va="center", transform=scores.transAxes)
    figure.tight_layout()
    try:
        figure.savefig(output, dpi=130)
    except (ValueError, OSError) as error:
        raise ConfigError(f"--output {output}: {error}") from error


def _label(folder: str | Path, folders: Sequence[str | Path]) -> str:
    """The folder's name; with those above it where two have the same."""
    path = Path(folder).resolve()
    same = [other for other in folders if Path(other).resolve().name == path.name]
    return path.name if len(same) == 1 else str(folder)


def _series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    chosen = [row for row in rows if row.get(name) is not None]
    return [row["iteration"] for row in chosen], [row[name] for row in chosen]


def _smoothed(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last ``width`` values at each place."""
    spans = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(span) / len(span) for span in spans]


if __name__ == "__main__":
    main()
