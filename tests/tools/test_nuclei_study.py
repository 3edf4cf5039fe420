"""The nuclei study: tiles are cut once, variants start from the base, which is trained first; tables name every one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import study
from compare import Result
from PIL import Image

from peft_d2.engine.errors import ConfigError


@pytest.fixture
def tool():
    return study


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four splits of one 96-px image with one square nucleus."""
    folder = tmp_path / "data"
    for split in ("fluorescence_train", "fluorescence_val", "histology_train", "histology_val"):
        (folder / split).mkdir(parents=True)
        Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(folder / split / "a.png")
        square = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": [10, 10, 20, 20], "area": 400}
        square["segmentation"] = [[10, 10, 30, 10, 30, 30, 10, 30]]
        coco = {"images": [{"id": 1, "file_name": "a.png", "height": 96, "width": 96}], "annotations": [square]}
        (folder / f"{split}.json").write_text(json.dumps({**coco, "categories": [{"id": 1, "name": "nucleus"}]}))
    return folder


def run(tool, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[tuple[list, list, list]]:
    """The tool's trainings, as they were asked for; what they would give is made up here."""
    asked: list[tuple[list, list, list]] = []

    def compare(runs, output, command, shared_opts, metrics):
        asked.append((list(runs), list(command), list(shared_opts)))
        figures = dict.fromkeys(metrics, 10.0 + len(asked))
        sizes = {"full": 900, "base": 900}
        return [
            Result(r.name, r.seed, str(output / r.name), figures, trainable=sizes.get(r.name, 9), total=1000)
            for r in runs
        ]

    monkeypatch.setattr(tool, "compare", compare)
    monkeypatch.setattr(sys, "argv", ["nuclei_study.py", *arguments])
    tool.main()
    return asked


def test_variants_start_from_their_models_base(tool, data, tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "out"
    arguments = ("--models", "mask2former", "sam", "--data", str(data), "--output", str(output), "--seeds", "1", "2")
    base, variants, *_ = asked = run(tool, monkeypatch, *arguments)
    assert len(asked) == 4
    assert [r.name for r in base[0]] == ["base"] and "fluorescence" in base[1] and base[2] == []
    assert {(r.name, r.seed) for r in variants[0]} >= {("heads", 1), ("heads", 2), ("lora", 1), ("full", 2)}
    assert "histology" in variants[1]
    assert variants[2] == ["MODEL.WEIGHTS", str(output / "mask2former" / "base" / "model_final.pth")]
    tiles = json.loads(Path(variants[1][variants[1].index("--val-json") + 1]).read_text())
    assert tiles["images"][0]["height"] == 192

    text = (output / "table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert rows.index("heads") < rows.index("full")  # from the fewest trained parameters to the most
    assert "mIoU | DSC | mask AP" in text  # Segment Anything is prompted
    assert (output / "tradeoff_segm_AP.png").exists() and (output / "tradeoff_masks_mIoU.png").exists()


def test_models_with_one_figure_stand_side_by_side(tool, data, tmp_path, monkeypatch) -> None:
    output = tmp_path / "out"
    run(tool, monkeypatch, "--models", "mask_dino", "seem", "--data", str(data), "--output", str(output))
    text = (output / "table.md").read_text()
    assert "| variant | mask_dino: mask AP | % trained | seem: mask AP | % trained |" in text
    assert "| adapters2 | 12.0 | 0.90 | 14.0 | 0.90 |" in text
    assert (output / "tradeoff.png").exists()


def test_tiles_are_those_of_the_data_given(tool, data, tmp_path) -> None:
    """Cut once; of other data under the same --output anew, beside the first ones."""
    first, again = (tool.own_data(data, tmp_path / "tiles", "histology") for _ in range(2))
    cut = Path(first[first.index("--train-json") + 1])
    moment = cut.stat().st_mtime_ns
    source = json.loads((data / "histology_train.json").read_text())
    (data / "histology_train.json").write_text(json.dumps({**source, "annotations": []}))
    other = tool.own_data(data, tmp_path / "tiles", "histology")
    found = Path(other[other.index("--train-json") + 1])
    assert first == again and cut.stat().st_mtime_ns == moment
    assert [len(json.loads(path.read_text())["annotations"]) for path in (cut, found)] == [1, 0]
    assert first[first.index("--val-json") + 1] == other[other.index("--val-json") + 1]


def test_wrong_arguments_are_named(tool, data, tmp_path, monkeypatch) -> None:
    here = ("--output", str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"--variants loar: mask2former has .*lora"):
        run(tool, monkeypatch, "--models", "mask2former", "--data", str(data), *here, "--variants", "loar")
    with pytest.raises(ConfigError, match=r"no fluorescence_train.json.*prepare_dsb2018"):
        run(tool, monkeypatch, "--models", "mask2former", "--data", str(tmp_path), *here)
