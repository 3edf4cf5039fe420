"""The benchmark's rows: each can be injected into its model, and trains what its name says."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

pytest.importorskip("detectron2")
pytest.importorskip("timm")

import peft_d2
from peft_d2 import peft
from peft_d2.engine.checks import build_without_weights
from peft_d2.engine.config import load_config

ROOT = Path(__file__).parents[2]
ROWS: dict[str, Any] = yaml.safe_load((ROOT / "projects" / "peft_benchmark" / "rows.yaml").read_text())
sys.path.insert(0, str(ROOT / "projects" / "peft_benchmark"))
from benchmark import HEADS, RATES, write  # noqa: E402


@pytest.fixture(scope="module")
def base() -> nn.Module:
    peft_d2.register()
    return build_without_weights(load_config(str(ROOT / "configs/nuclei/efficientnet/model.yaml")).cfg)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.get("METHODS") != "auto"])
def test_every_row_can_be_injected(base: nn.Module, name: str) -> None:
    row = ROWS[name]
    model = copy.deepcopy(base)
    report = peft.inject(model, row.get("METHODS", []), train=row.get("TRAIN", HEADS))
    if "TRAIN" in row:
        assert report.percent > 15
    else:
        assert report.percent <= (22 if name == "last block of the backbone" else 6.5)
    trained = {item.name for item in peft.trained_parameters(model)}
    in_backbone = {key for key in trained if key.startswith("backbone.")}
    if name.endswith(("everywhere", "backbone")) and "but" not in name or name in ("norms", "BitFit", "full"):
        assert in_backbone
    else:
        assert not in_backbone


def test_rows_that_were_not_run_are_said_so(tmp_path: Path) -> None:
    from compare import Result

    done = {"heads": [Result("heads", 1, "", {"segm/AP": 12.34, "segm/AP50": 30.0}, trainable=10, total=100)]}
    write(ROWS, done, tmp_path)
    lines = (tmp_path / "rows.md").read_text().splitlines()
    assert (
        sum("not run" in line for line in lines) == len(ROWS) - 1 and "| heads | 12.3 | 30.0 | 10 | 10.00 |" in lines[2]
    )
    assert len({line.count("|") for line in lines}) == 1 and len(RATES) == 4 and (tmp_path / "tradeoff.png").is_file()
