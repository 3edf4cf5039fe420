"""Curves of runs: the right points, also after kills; a picture that is none of an empty axis."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from plot_metrics import main, read_metrics


def _run(folder: Path, *lines: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("\n".join(lines))
    return folder


def _rows(iterations: range, **more: float) -> list[str]:
    return [json.dumps({"iteration": i, "total_loss": 9 / (i + 1), "loss_mask": 1.0, **more}) for i in iterations]


def test_what_a_resumed_run_repeats_counts_once(tmp_path: Path) -> None:
    first, again = _rows(range(0, 100, 20)), _rows(range(60, 140, 20), lr=1.0)
    folder = _run(tmp_path / "a", *first, '{"iteration": 100, "total_lo', *again, '{"iteration": 120, "segm/AP": 7.5}')
    rows = read_metrics(folder)
    assert [row["iteration"] for row in rows] == [0, 20, 40, 60, 80, 100, 120]
    assert [row["iteration"] for row in rows if "lr" in row] == [60, 80, 100, 120]
    assert rows[-1]["segm/AP"] == 7.5 and rows[-1]["loss_mask"] == 1.0


@pytest.mark.parametrize("count", [1, 3])
def test_a_picture_of_each_run(tmp_path: Path, count: int) -> None:
    folders = [
        _run(tmp_path / str(k) / "run", *_rows(range(0, 100, 20)), '{"iteration": 99, "segm/AP": 7.5}')
        for k in range(count)
    ]
    main([*map(str, folders), "--output", str(tmp_path / "a.svg"), "--smooth", "2"])
    lines = [e for e in ElementTree.parse(tmp_path / "a.svg").iter() if (e.get("id") or "").startswith("line2d")]
    assert len(lines) > 2 * count
    main([*map(str, folders), "--output", str(tmp_path / "a.png")])
    assert Image.open(tmp_path / "a.png").size == (1560, 585)


@pytest.mark.parametrize("content", [None, "", "{half"])
def test_no_figures_are_one_line(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        _run(tmp_path / "run", content)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "run"), "--output", str(tmp_path / "a.png")])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "metrics.json" in error and error.count("\n") == 1
