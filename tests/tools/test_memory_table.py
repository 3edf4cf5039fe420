"""The table of methods x memory budgets: its rows, a budget that follows from full fine-tuning's peak, and going on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "projects" / "memory_budget"))
import memory_table  # noqa: E402

METHODS = [{"NAME": "lora", "RANK": 2, "TARGETS": ["predictor.*.multihead_attn"]}]
TINY = {
    "config": "tests/engine/tiny.yaml",
    "size": 64,
    "train": ["predictor.mask_embed"],
    "rows": {"full": {"TRAIN": ["*"]}, "LoRA": {"METHODS": METHODS, "budgets": [0.001, 0]}},
}


def test_the_table_is_made_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_table, "MODELS", {"Tiny": TINY})
    monkeypatch.setattr(sys, "argv", ["memory_table.py", "--output", str(tmp_path), "--rounds", "1", "--clock", "cpu"])
    memory_table.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[2:]] == ["**Tiny, 64 px**", "full", "LoRA", "LoRA, smallest budget"]
    full, lora, fitted = rows[3:]
    assert full[1:5:2] == ["100.0", "1.00"] and float(lora[1]) < 20 and fitted[1] == lora[1]
    assert int(lora[2]) < int(full[2]) and lora[5] == "" and int(fitted[5]) > 0
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")

    before = (tmp_path / "Tiny.json").stat().st_mtime_ns
    memory_table.main()
    output = capsys.readouterr()
    assert (tmp_path / "Tiny.json").stat().st_mtime_ns == before and "LoRA, smallest budget" in output.out
    assert "budget" not in output.err
