"""The notebook runs from its first cell to its last, with few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2")
pytest.importorskip("timm")
NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "own_data.ipynb"


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OUTPUT", str(tmp_path))
    monkeypatch.setenv("STEPS", "3")
    monkeypatch.chdir(NOTEBOOK.parent)
    namespace: dict[str, Any] = {"__name__": "notebook"}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
    assert float((namespace["adapted"] - namespace["merged"]).abs().max()) < 1e-4
    assert float((namespace["adapted"] - namespace["base"]).abs().max()) > 1e-5
    assert "adapter_model.safetensors" in capsys.readouterr().out
