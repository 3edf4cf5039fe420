"""MODEL_ZOO.md lists every config with the figures of the code at hand."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import zoo  # noqa: E402

from peft_d2.engine.errors import ConfigError  # noqa: E402
from peft_d2.engine.factory import register  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / zoo.ZOO).read_text(encoding="utf-8")


def test_every_config_and_method_is_listed() -> None:
    """A method that fits no example of its family is not."""
    listed = set(re.findall(r"^\| \[.*?\]\((configs/.*?\.yaml)\)", TEXT, flags=re.MULTILINE))
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    bases = {file for file in files if "_base_/" in file or Path(file).stem.startswith("_")}
    # The one for Detectron2's own models has none of them here.
    assert listed == files - bases - {"configs/peft/mask_rcnn/lora.yaml"}


@pytest.mark.parametrize("title", ["The toy world", "Small models for nuclei"])
def test_chapters_are_up_to_date(title: str) -> None:
    register()
    (family,) = (family for family in zoo.FAMILIES if family.title == title)
    assert "\n".join(zoo.Zoo(ROOT).chapter(family)) in TEXT


@pytest.mark.parametrize("config", ["coco/instance/mask2former_r50", "mask_dino/coco/instance_r50"])
def test_rows_are_up_to_date(config: str) -> None:
    register()
    family = next(family for family in zoo.FAMILIES if config in family.examples)
    book = zoo.Zoo(ROOT)
    assert book.model_row(family, config) in TEXT.splitlines()


def test_results_are_of_configs_that_exist() -> None:
    stored = json.loads((ROOT / zoo.MEASURED).read_text(encoding="utf-8"))
    for config, entry in stored["results"].items():
        assert (ROOT / "configs" / f"{config}.yaml").exists() and entry["setting"] in stored["settings"], config


def test_what_is_out_of_date_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "configs" / "demo", tmp_path / "configs" / "demo")
    monkeypatch.setattr(zoo, "FAMILIES", [family for family in zoo.FAMILIES if family.title == "The toy world"])
    with pytest.raises(ConfigError, match="out of date"):
        zoo.write(tmp_path, check=True)
    zoo.write(tmp_path)
    zoo.write(tmp_path, check=True)
    (tmp_path / "docs").mkdir()
    results = {"demo/lora": {"mask AP": 12.5, "setting": "here"}}
    (tmp_path / zoo.MEASURED).write_text(json.dumps({"settings": {"here": "By hand."}, "results": results}))
    with pytest.raises(ConfigError, match="out of date"):
        zoo.write(tmp_path, check=True)
    zoo.write(tmp_path, only="The toy world")
    zoo.write(tmp_path, check=True)
    text = (tmp_path / zoo.ZOO).read_text(encoding="utf-8")
    assert re.search(r"demo/lora\b.* %, [\d.]+ MB \| 12.5 \| here \|", text) and "Setting here: By hand." in text
    with pytest.raises(ConfigError, match="no folder 'configs'"):
        zoo.write(tmp_path / "elsewhere")
