"""Comparisons of runs: what is read from a run's folder, what is kept, what a failed run says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from compare import (
    Run,
    RunFailed,
    compare,
    plot_curves,
    plot_tradeoff,
    read_result,
    side_by_side,
    table,
    write_names,
)

from peft_d2.engine.errors import ConfigError

# Stands for a training program: takes the same arguments and leaves the same files.
PROGRAM = """
import json, pathlib, sys
arguments = sys.argv[1:]
pairs = dict(zip(arguments[3::2], arguments[4::2]))
folder = pathlib.Path(pairs["OUTPUT_DIR"])
if "broken" in arguments[1]:
    sys.exit("error: the config is broken")
rows = [{"iteration": 19, "time": 0.5}, {"iteration": 39, "time": 0.1}, {"iteration": 39, "time": 0.2}]
rows.insert(1, {"iteration": 19, "segm/AP": 10.0, "segm/AP50": 20.0})
rows.append({"iteration": 40, "segm/AP": 30.0 + int(pairs["SEED"]), "segm/AP50": 50.0})
(folder / "metrics.json").write_text("\\n".join(map(json.dumps, rows)))
(folder / "peft_report.json").write_text(json.dumps({"trainable": 25, "total": 1000}))
(folder / "adapter_final").mkdir(exist_ok=True)
(folder / "adapter_final" / "adapter_model.safetensors").write_bytes(bytes(2_500_000))
with open(folder.parent / "runs.txt", "a") as stream:
    stream.write(folder.name + "\\n")
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c", "good", "broken"):
        Path(f"{name}.yaml").write_text("SOLVER: {MAX_ITER: 40}")
    return [sys.executable, str(program)]


def test_runs_are_trained_once_read_and_averaged(tmp_path: Path, command: list[str]) -> None:
    runs = [Run("a b", "a.yaml", seed=1), Run("a b", "a.yaml", seed=3), Run("c", "c.yaml", seed=1)]
    results = compare(runs, tmp_path / "out", command)
    assert [r.metrics["segm/AP"] for r in results] == [31.0, 33.0, 31.0]
    # iteration 19 is the 20th step; the end is MAX_ITER itself
    assert results[0].curves["segm/AP"] == [
        [20, 10.0],
        [40, 31.0],
    ]
    assert results[0].seconds_per_step == pytest.approx(0.2)
    assert results[0].file_bytes == 2_500_000
    if sys.platform == "linux":
        assert results[0].peak_bytes > 1_000_000
    assert compare(runs, tmp_path / "out", command)[1].metrics["segm/AP"] == 33.0
    assert (tmp_path / "out" / "runs.txt").read_text().split() == ["a_b-seed1", "a_b-seed3", "c-seed1"]

    lines = table(results).splitlines()
    assert lines[2].startswith("| a b | 32.0 ± 1.4 | 50.0 ± 0.0 | 25 | 2.50 | 2.50 MB | 0.200 |")
    assert lines[3].startswith("| c | 31.0 | 50.0 |")
    both = side_by_side({"model": results, "other": results[2:]}).splitlines()
    assert both[0] == "| variant | model: mask AP | % trained | other: mask AP | % trained |"
    assert both[2:] == ["| a b | 32.0 ± 1.4 | 2.50 |  |  |", "| c | 31.0 | 2.50 | 31.0 | 2.50 |"]
    plot_curves(results, tmp_path / "curves.png")
    plot_tradeoff({"model": results, "other": results[2:]}, tmp_path / "tradeoff.png")
    assert all((tmp_path / name).stat().st_size > 5_000 for name in ("curves.png", "tradeoff.png"))


def test_the_figures_are_chosen_and_a_missing_one_is_named(tmp_path: Path, command: list[str]) -> None:
    results = compare([Run("a", "a.yaml")], tmp_path / "out", command, metrics=["segm/AP50"])
    assert table(results, ["segm/AP50"]).splitlines()[2].startswith("| a | 50.0 | 25 |")
    with pytest.raises(RunFailed, match=r"no masks/mIoU .*has segm/AP, segm/AP50"):
        compare([Run("b", "b.yaml")], tmp_path / "out", command, metrics=["segm/AP", "masks/mIoU"])


def test_a_failed_run_is_named_with_its_last_words_and_not_kept(tmp_path: Path, command: list[str]) -> None:
    runs = [Run("good", "good.yaml"), Run("bad", "broken.yaml")]
    with pytest.raises(RunFailed, match=r"(?s)bad: .*console.txt.*the config is broken"):
        compare(runs, tmp_path / "out", command)
    assert (tmp_path / "out" / "good" / "comparison_result.json").exists()
    assert not (tmp_path / "out" / "bad" / "comparison_result.json").exists()


def test_a_run_of_other_settings_is_refused_and_stays(tmp_path: Path, command: list[str]) -> None:
    base, out = tmp_path / "base.pth", tmp_path / "out"
    base.write_bytes(b"one")
    opts = ["MODEL.WEIGHTS", str(base)]
    runs = [Run("b", "b.yaml"), Run("a", "a.yaml")]
    compare(runs[1:], out, command, opts)

    Path("below.yaml").write_text("SOLVER: {MAX_ITER: 40}")
    Path("a.yaml").write_text("_BASE_: below.yaml")  # says the same
    (tmp_path / "moved").mkdir()
    base = base.rename(tmp_path / "moved" / base.name)
    opts = ["MODEL.WEIGHTS", str(base)]
    compare(runs[1:], out, command, opts)
    assert (out / "runs.txt").read_text().split() == ["a"]

    Path("below.yaml").write_text("SOLVER: {MAX_ITER: 80}")
    with pytest.raises(ConfigError, match=r"out/a has a run of other settings: SOLVER.MAX_ITER 40 there, 80 now\."):
        compare(runs, out, command, opts)
    assert not (out / "b").exists()  # nothing was begun
    Path("below.yaml").write_text("SOLVER: {MAX_ITER: 40}")
    with pytest.raises(ConfigError, match=r"SOLVER.BASE_LR 0.001 there, 0.1 now"):
        compare(runs, out, command, [*opts, "SOLVER.BASE_LR", "0.1"])
    with pytest.raises(ConfigError, match=r"a.yaml: config key 'SOLVER.BASE_LT' does not exist"):
        Path("a.yaml").write_text("SOLVER: {BASE_LT: 0.1}")
        compare(runs, out, command, opts)
    Path("a.yaml").write_text("_BASE_: below.yaml")
    base.write_bytes(b"two")
    with pytest.raises(ConfigError, match=r"MODEL.WEIGHTS base.pth \(sha256 \w+\) there, base.pth \("):
        compare(runs, out, command, opts)

    (out / "a" / "comparison_result.json").unlink()
    (out / "a" / "last_checkpoint").touch()  # interrupted: it would go on with what it began with
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS"):
        compare(runs, out, command, opts)
    (out / "a" / "last_checkpoint").unlink()
    compare(runs, out, command, opts)  # it ended before its first checkpoint, so there is nothing to mix


def test_a_run_without_evaluation_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"iteration": 1, "time": 0.1}))
    with pytest.raises(RunFailed, match=r"DATASETS\.TEST"):
        read_result(tmp_path, "name", 1)


def test_names_of_points_close_together_are_not_written_over_each_other() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    labels = [("LoRA, linear layers", 4e4, y) for y in (20.5, 20.8, 21.2)] + [
        ("LoRA + COBOT", 4.1e4, 20.6),
        ("at the top", 3.9e4, 31),
        ("also at the top, at the right", 1e6, 31),
        ("x", 1e6, 5),
    ]
    axes.scatter([x for _, x, _ in labels], [y for *_, y in labels])
    axes.set_xscale("log")
    write_names(axes, labels)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in axes.texts if text.get_text()]
    assert len(boxes) == 7
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(axes.bbox.count_contains(box.corners()) == 4 for box in boxes)
