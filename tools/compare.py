#!/usr/bin/env python
"""Train several configs on the same data and set them side by side: a table, a plot of a figure over steps and one of
it over trainable parameters.

    tools/compare.py --configs configs/demo/heads.yaml configs/demo/lora.yaml --seeds 1 2 3 --output output/compared \
        --train-json a.json --train-images a/ --val-json b.json --val-images b/ --opts MODEL.WEIGHTS base.pth

Rows are named after the config files. Each run is an ordinary training of its own in
<output>/<name>[-seed<n>]; what is compared is read from the files that any run leaves behind. A finished run is kept: a
comparison that was interrupted goes on where it stopped. One with other settings is refused in that folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from command_line import take_pairs

from peft_d2.engine.config import leaves, load_config
from peft_d2.engine.errors import ConfigError, bounded, one_line_errors
from peft_d2.storage import disk

TRAIN_NET = Path(__file__).with_name("train_net.py")
OWN_DATA = ("train-json", "train-images", "val-json", "val-images", "name")
RESULT_FILE = "comparison_result.json"
SETTINGS_FILE = "comparison_settings.json"  # written as a run begins
METRICS = ("segm/AP", "segm/AP50")
_NOT_COMPARED = ("MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "OUTPUT_DIR")  # a run may go on with others
_LABELS = {
    "segm/AP": "mask AP",
    "segm/AP50": "AP50",
    "bbox/AP": "box AP",
    "masks/mIoU": "mIoU",
    "masks/mDice": "Dice",
    "masks/DSC": "DSC",
}


class RunFailed(ConfigError):
    """A training process ended with an error; the message names its log."""


@dataclass(frozen=True)
class Run:
    """One training of a comparison.

    Attributes:
        name: the row's label; runs of the same name with other seeds are averaged.
        config: the config file.
        seed: ``SEED`` of the run.
        opts: config ``KEY VALUE`` pairs beside those that all runs share.
    """

    name: str
    config: str
    seed: int = 1
    opts: tuple[str, ...] = ()


@dataclass
class Result:
    """What one run gave.

    Attributes:
        metrics: every figure of the last evaluation, e.g. ``segm/AP`` in percent.
        curves: (steps taken, figure) of every evaluation, for each of them.
        trainable, total: numbers of parameters.
        file_bytes: size of the final adapter folder's tensors, or of the final checkpoint.
        seconds_per_step: median over the run's log lines.
        peak_bytes: peak resident memory of the process; 0 where the system does not tell.
    """

    name: str
    seed: int
    folder: str
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    trainable: int = 0
    total: int = 0
    file_bytes: int = 0
    seconds_per_step: float = 0.0
    peak_bytes: int = 0


def compare(
    runs: Sequence[Run],
    output: str | Path,
    command: Sequence[str],
    shared_opts: Sequence[str] = (),
    metrics: Sequence[str] = METRICS,
) -> list[Result]:
    """Run every training that has not been run yet and return all results, in the order of ``runs``.

    Args:
        runs: what to train.
        output: folder that takes one folder per run.
        command: the training program, e.g. ``[sys.executable, "tools/train_net.py"]``.
        shared_opts: config ``KEY VALUE`` pairs for every run.
        metrics: figures that every run must have; the first is printed as runs end.

    Raises:
        ConfigError: before anything is trained: what a config cannot be, or a folder with a run of other settings.
        RunFailed: when a training process fails; finished runs stay.
    """
    output = Path(output)
    several_seeds = len({run.seed for run in runs}) > 1
    folders = [output / (f"{r.name}-seed{r.seed}" if several_seeds else r.name).replace(" ", "_") for r in runs]
    identity = cache(_identity)  # the runs of a comparison share their data and mostly their base
    settings = [_settings(run, command, shared_opts, identity) for run in runs]
    for folder, asked in zip(folders, settings, strict=True):
        _refuse_others(folder, asked)
    results = []
    for number, (run, folder, asked) in enumerate(zip(runs, folders, settings, strict=True), 1):
        kept = folder / RESULT_FILE
        if kept.exists():
            print(f"[{number}/{len(runs)}] {folder.name}: already finished, kept", flush=True)
        else:
            print(f"[{number}/{len(runs)}] {folder.name}: training, log in {folder / 'log.txt'}", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SETTINGS_FILE).write_text(json.dumps(asked, indent=1))
            peak = _train(run, folder, command, shared_opts)
            result = read_result(folder, run.name, run.seed, peak, metrics)
            kept.write_text(json.dumps(asdict(result), indent=1))
            figure = f"{_label(metrics[0])} {result.metrics[metrics[0]]:.1f}"
            print(f"    {figure}, {result.seconds_per_step:.2f} s a step", flush=True)
        results.append(Result(**json.loads(kept.read_text())))
    return results


def _settings(
    run: Run, command: Sequence[str], shared_opts: Sequence[str], identity: Callable[[str], str]
) -> dict[str, str]:
    """What a run's result depends on, by config key or flag; files by their content, so that folders can be moved."""
    cfg = load_config(run.config, opts=_pairs(run, shared_opts)).cfg
    flags = zip(command[2::2], command[3::2], strict=True)
    given = {**{key: value for key, value in leaves(cfg) if key not in _NOT_COMPARED}, **dict(flags)}
    return {key: identity(str(value)) for key, value in given.items()}


def _pairs(run: Run, shared_opts: Sequence[str]) -> list[str]:
    """The run's config ``KEY VALUE`` pairs: of a key that is there twice the last one holds."""
    return ["SEED", str(run.seed), *shared_opts, *run.opts]


def _identity(value: str) -> str:
    if os.path.isfile(value):
        return f"{Path(value).name} (sha256 {disk.file_digest(Path(value))['sha256'][:12]})"
    return Path(value).name if os.path.isdir(value) else value


def _refuse_others(folder: Path, asked: Mapping[str, str]) -> None:
    """Raise where ``folder`` has a run, finished or one to go on with, that was begun with other settings."""
    begun = any((folder / name).exists() for name in (RESULT_FILE, "last_checkpoint"))
    if not begun or not (folder / SETTINGS_FILE).exists():
        return
    there = json.loads((folder / SETTINGS_FILE).read_text())
    keys = [key for key in {**there, **asked} if key.startswith("--") or key in there and key in asked]
    others = [key for key in keys if there.get(key) != asked.get(key)]  # keys of other versions have no part in it
    if others:
        said = [f"{key} {there.get(key, 'not given')} there, {asked.get(key, 'not given')} now" for key in others[:3]]
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ConfigError(
            f"{folder} has a run of other settings: {'; '.join(said)}{more}. "
            "Choose another --output, or delete that folder to train anew."
        )


def _train(run: Run, folder: Path, command: Sequence[str], shared_opts: Sequence[str]) -> int:
    """Run one training process to its end; returns its peak resident memory in bytes."""
    arguments = [*command, "--config-file", run.config, "--resume"]
    arguments += ["OUTPUT_DIR", str(folder), *_pairs(run, shared_opts)]
    console = folder / "console.txt"
    with console.open("w") as stream:
        process = subprocess.Popen(arguments, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            peak = _wait(process)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode != 0:
        tail = "\n".join(console.read_text(errors="replace").splitlines()[-15:])
        raise RunFailed(f"{run.name}: {' '.join(arguments)} ended with {process.returncode}; see {console}:\n{tail}")
    return peak


def _wait(process: subprocess.Popen[Any]) -> int:
    if not hasattr(os, "wait4"):
        process.wait()
        return 0
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_result(folder: Path, name: str, seed: int, peak_bytes: int = 0, metrics: Sequence[str] = METRICS) -> Result:
    """Collect one run's figures from ``metrics.json``, ``peft_report.json`` and the final files in ``folder``.

    Raises:
        RunFailed: where the run was not evaluated, or not by all of ``metrics``.
    """
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines() if line.strip()]
    evaluations = [row for row in rows if metrics[0] in row]
    if not evaluations:
        raise RunFailed(f"{folder}: no {metrics[0]} in metrics.json; set DATASETS.TEST so that the run is evaluated")
    last = {key: value for key, value in evaluations[-1].items() if "/" in key}
    if missing := [key for key in metrics if key not in last]:
        raise RunFailed(f"{folder}: no {', '.join(missing)} in metrics.json, which has {', '.join(last)}")
    times = [row["time"] for row in rows if "time" in row]
    report = json.loads((folder / "peft_report.json").read_text())
    return Result(
        name=name,
        seed=seed,
        folder=str(folder),
        metrics=last,
        curves={key: _curve(evaluations, key) for key in last},
        trainable=report["trainable"],
        total=report["total"],
        file_bytes=_final_bytes(folder),
        seconds_per_step=statistics.median(times) if times else 0.0,
        peak_bytes=peak_bytes,
    )


def _curve(evaluations: Sequence[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    """Steps taken and figure: Detectron2 counts iterations from 0, but the evaluation at the end as ``MAX_ITER``."""
    *earlier, last = evaluations
    points = [(row["iteration"] + 1, row[metric]) for row in earlier if metric in row]
    return [*points, (last["iteration"], last[metric])]


def _final_bytes(folder: Path) -> int:
    for candidate in (folder / "adapter_final" / "adapter_model.safetensors", folder / "model_final.pth"):
        if candidate.exists():
            return candidate.stat().st_size
    return 0


def table(results: Sequence[Result], metrics: Sequence[str] = METRICS) -> str:
    """The results as a Markdown table, a row per name; several seeds as mean ± sample standard deviation."""
    figures = " | ".join(_label(metric) for metric in metrics)
    lines = [
        f"| variant | {figures} | trainable | % | file | s / step | peak memory |",
        "|---" * (len(metrics) + 6) + "|",
    ]
    for name, rows in _by_name(results).items():
        first = rows[0]
        figures = " | ".join(_spread([row.metrics[metric] for row in rows]) for metric in metrics)
        lines.append(
            f"| {name} | {figures} | {first.trainable:,} "
            f"| {_share(first):.2f} | {first.file_bytes / 1e6:.2f} MB "
            f"| {statistics.mean(r.seconds_per_step for r in rows):.3f} "
            f"| {max(r.peak_bytes for r in rows) / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


def side_by_side(models: Mapping[str, Sequence[Result]], metric: str = METRICS[0]) -> str:
    """One figure of several models as a Markdown table: a row per variant, two columns per model."""
    columns = {model: _by_name(results) for model, results in models.items()}
    heads = " | ".join(f"{model}: {_label(metric)} | % trained" for model in columns)
    lines = [f"| variant | {heads} |", "|---" * (2 * len(columns) + 1) + "|"]
    for name in dict.fromkeys(name for groups in columns.values() for name in groups):
        cells = []
        for groups in columns.values():
            rows = groups.get(name, [])
            cells += [_spread([row.metrics[metric] for row in rows]), f"{_share(rows[0]):.2f}"] if rows else ["", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _label(metric: str) -> str:
    return _LABELS.get(metric, metric)


def _by_name(results: Sequence[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.name, []).append(result)
    return groups


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def plot_curves(results: Sequence[Result], path: str | Path, title: str = "", metric: str = METRICS[0]) -> None:
    """Draw a figure over training steps, a line per name; several seeds as their mean with the range shaded."""
    with _axes(path, "training steps", metric, title) as axes:
        for name, rows in _by_name(results).items():
            steps = [step for step, _ in rows[0].curves[metric]]
            curves = [[value for _, value in row.curves[metric]] for row in rows]
            columns = list(zip(*(curve for curve in curves if len(curve) == len(steps)), strict=True))
            label = f"{name} ({_share(rows[0]):.3g} % trained)"
            (line,) = axes.plot(steps, [statistics.mean(c) for c in columns], marker="o", markersize=3, label=label)
            if len(curves) > 1:
                low, high = [min(c) for c in columns], [max(c) for c in columns]
                axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
        axes.set_ylim(0, None)
        axes.legend(fontsize=8)


def plot_tradeoff(
    models: Mapping[str, Sequence[Result]], path: str | Path, title: str = "", metric: str = METRICS[0]
) -> None:
    """Draw a figure over the number of trainable parameters, a point per name and a colour per model.

    Several seeds are their mean, with a bar from the least to the greatest.
    """
    labels: list[tuple[str, float, float]] = []
    with _axes(path, "trainable parameters", metric, title) as axes:
        for model, results in models.items():
            groups = sorted(_by_name(results).items(), key=lambda item: item[1][0].trainable)
            values = [[row.metrics[metric] for row in rows] for _, rows in groups]
            means = [statistics.mean(figures) for figures in values]
            bars = [
                [mean - min(figures) for mean, figures in zip(means, values, strict=True)],
                [max(figures) - mean for mean, figures in zip(means, values, strict=True)],
            ]
            counts = [rows[0].trainable for _, rows in groups]
            axes.errorbar(counts, means, yerr=bars, fmt="o", markersize=4, capsize=2, label=model)
            labels += zip((name for name, _ in groups), counts, means, strict=True)
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.figure.set_figheight(max(4.2, 0.16 * len(labels)))
        write_names(axes, labels)
        if len(models) > 1:
            axes.legend(fontsize=8)


def write_names(axes: Any, labels: Sequence[tuple[str, float, float]]) -> None:
    """Write (name, x, y) at the free place nearest to its point and inside the frame, with a line where that is far.

    Where there is none, a name stands beside its point, over others.
    """
    from matplotlib.transforms import Bbox

    axes.figure.tight_layout()  # places are free or not in the frame as it will be
    places = sorted(product((6, -6, 24, -24, 48, -48, 80, -80), range(-96, 97, 8)), key=lambda at: math.hypot(*at))
    points = axes.transData.transform([at for _, *at in labels])
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    for name, *point in labels:
        text = axes.annotate(name, point, places[0], textcoords="offset points", va="center", fontsize=7)
        for place in (*places, places[0]):
            text.set(position=place, horizontalalignment="left" if place[0] > 0 else "right")
            box = text.get_window_extent()
            if axes.bbox.count_contains(box.corners()) == 4 and not box.count_overlaps(taken):
                break
        taken.append(box)
        if math.hypot(*place) > 10:
            axes.annotate("", point, place, textcoords="offset points", arrowprops={"arrowstyle": "-", "lw": 0.4})


def _share(result: Result) -> float:
    return 100 * result.trainable / result.total


@contextmanager
def _axes(path: str | Path, across: str, metric: str, title: str) -> Iterator[Any]:
    """Axes of a picture that is written when the block ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    axes.set(xlabel=across, ylabel=_label(metric), title=title)
    axes.grid(alpha=0.3)
    yield axes
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _names(configs: Sequence[str]) -> list[str]:
    """What the rows and folders of configs are called: their files, and the folders of these where files share a name.

    Raises:
        ConfigError: a file that is not there, or two of one name, which would be one run.
    """
    paths = [Path(config) for config in configs]
    if missing := next((path for path in paths if not path.is_file()), None):
        raise ConfigError(
            f"--configs: config file {missing} {'is a folder' if missing.is_dir() else 'does not exist'}."
        )
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.absolute().parent.name}_{path.stem}" for path in paths]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise ConfigError(f"--configs: two of them would be called {twice}, and be one run. Give one another name.")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", required=True, metavar="FILE", help="config files, a row each")
    parser.add_argument(
        "--seeds", nargs="+", type=bounded(int, 0), default=[1], help="each config is trained once per seed"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="gets a folder per run, a table and plots")
    parser.add_argument(
        "--metrics", nargs="+", default=METRICS, help="figures of the table, as metrics.json names them"
    )
    parser.add_argument("--title", default="", help="of the plot")
    for flag in OWN_DATA:
        parser.add_argument(f"--{flag}", help="as in tools/train_net.py")
    take_pairs(parser, "config KEY VALUE pairs for every run")
    args = parser.parse_args()

    given = {flag: getattr(args, flag.replace("-", "_")) for flag in OWN_DATA}
    own_data = [word for flag, value in given.items() if value for word in (f"--{flag}", value)]
    names = _names(args.configs)
    if twice := [seed for seed in args.seeds if args.seeds.count(seed) > 1]:
        raise ConfigError(f"--seeds: {twice[0]} is there twice, and would be one run.")
    runs = [Run(name, config, seed) for name, config in zip(names, args.configs, strict=True) for seed in args.seeds]
    command = [sys.executable, str(TRAIN_NET), *own_data]
    results = compare(runs, args.output, command, args.opts, args.metrics)
    print(table(results, args.metrics))
    output = Path(args.output)
    (output / "table.md").write_text(table(results, args.metrics) + "\n")
    plot_curves(results, output / "curves.png", args.title, args.metrics[0])
    plot_tradeoff({args.title: results}, output / "tradeoff.png", args.title, args.metrics[0])


if __name__ == "__main__":
    one_line_errors(main)
