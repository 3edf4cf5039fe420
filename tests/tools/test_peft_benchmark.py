"""The benchmark's rows: each can be injected into its model, and trains what its name says."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import nn

pytest.importorskip("detectron2")
pytest.importorskip("timm")

import peft_d2
from peft_d2 import peft
from peft_d2.engine.config import load_config
from peft_d2.engine.factory import build_without_weights

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "projects" / "peft_benchmark"))
import benchmark  # noqa: E402
from benchmark import MODELS, RATES, rows_of, verdict, write  # noqa: E402

ROWS = {model: rows_of(described) for model, described in MODELS.items()}
CASES = [(model, name) for model, rows in ROWS.items() for name, row in rows.items() if row.get("METHODS") != "auto"]
LARGE = {  # percent that a row may train other than 6.5
    "last block of the backbone": 22,
    "2 adapters, everywhere": 8,
    "LoRA, everywhere": 8,
}


@cache
def base(model: str) -> nn.Module:
    peft_d2.register()
    folder = ROOT / "configs" / "nuclei" / MODELS[model].folder
    for name in ("fluorescence.yaml", "adapt.yaml"):
        load_config(str(folder / name))
    return build_without_weights(load_config(str(folder / "model.yaml")).cfg)


@pytest.mark.parametrize(("model", "name"), CASES)
def test_every_row_can_be_injected(model: str, name: str) -> None:
    row = ROWS[model][name]
    injected = copy.deepcopy(base(model))
    heads = MODELS[model].train
    report = peft.inject(injected, row.get("METHODS", []), train=row.get("TRAIN", heads))
    decoder = 0.0 if model != "sam" else peft.inject(copy.deepcopy(base(model)), train=heads).percent
    if "TRAIN" in row:
        assert report.percent > 15
    else:
        assert report.percent <= decoder + LARGE.get(name, 6.5)
    trained = {item.name for item in peft.trained_parameters(injected)}
    in_backbone = {key for key in trained if "backbone." in key}
    if name.endswith(("everywhere", "backbone")) and "but" not in name or name in ("norms", "BitFit", "full"):
        assert in_backbone
    else:
        assert not in_backbone


def result(name: str, ap: float, trainable: int = 5) -> Any:
    from compare import Result

    return Result(name, 1, "", {"segm/AP": ap, "segm/AP50": 30.0}, trainable=trainable, total=100)


def test_all_rows_are_written_those_of_earlier_calls_too(tmp_path: Path) -> None:
    rows = list(ROWS["mask2former"])
    assert len({benchmark.folder_of(name, tmp_path) for name in rows}) == len(rows)
    for name, seed, ap in (("heads", 1, 12.0), ("heads", 2, 14.0), ("LoRA, everywhere", 1, 20.0)):
        folder = benchmark.folder_of(name, tmp_path) / "tests" / f"seed_{seed}"
        folder.mkdir(parents=True)
        (folder / "comparison_result.json").write_text(json.dumps(asdict(result(f"seed {seed}", ap, 10))))
    write(rows, tmp_path)
    lines = (tmp_path / "rows.md").read_text().splitlines()
    assert lines[2].startswith("| heads | 13.0 ± 1.4 | 30.0 ± 0.0 | 10 | 10.00 |")
    assert lines[3].startswith("| LoRA, everywhere | 20.0 | 30.0 |")
    assert sum("not run" in line for line in lines) == len(rows) - 2
    assert len({line.count("|") for line in lines}) == 1 and len(RATES) == 4 and (tmp_path / "tradeoff.png").is_file()


def test_what_is_recommended_is_compared_with_rows_that_train_as_little() -> None:
    others = [result("a", 20.0), result("a", 22.0), result("b", 19.0, 6), result("full", 40.0, 100), result("c", 39, 7)]
    assert verdict(others, "segm/AP") == verdict([result("recommended", 1)], "segm/AP") == ""
    for own, said in ((20.0, "yes"), (19.9, "no")):
        text = verdict([*others, result("recommended", own, 6)], "segm/AP")
        assert text.startswith(f"Recommended: {own}. The best of 2 rows") and "a, 21.0" in text
        assert text.endswith(f"Within 1: {said}.")


@pytest.mark.parametrize("task", benchmark.TOY)
def test_the_check_has_pictures_of_its_own(tmp_path: Path, task: str) -> None:
    folders = {part: benchmark.toy_pictures(tmp_path, task, part, images=3) for part in benchmark.TOY_PARTS}
    contents = {part: json.loads((folder / "annotations.json").read_text()) for part, folder in folders.items()}
    assert [len(content["images"]) for content in contents.values()] == [3, 24, 48]
    first = {part: (folder / "images" / "00000.png").read_bytes() for part, folder in folders.items()}
    assert len(set(first.values())) == 3


def test_a_base_that_does_not_ship_is_asked_for(tmp_path: Path) -> None:
    from peft_d2.engine.errors import ConfigError

    with pytest.raises(ConfigError, match="--nuclei: the base of efficientnet_sam is trained first"):
        benchmark.make_base(MODELS["sam"], tmp_path, "")
    (tmp_path / "base" / "base").mkdir(parents=True)
    (made := tmp_path / "base" / "base" / "model_final.pth").touch()
    assert benchmark.make_base(MODELS["sam"], tmp_path, "") == made
