"""Data sets named in the config."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="needs Detectron2")

import toy  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402

from peft_d2.data.classes import class_names  # noqa: E402
from peft_d2.data.registration import register_from_config  # noqa: E402


@pytest.fixture
def entry(tmp_path, request):
    made = toy.generate(tmp_path / "set", "day", 2, 0, size=48)
    return {"NAME": request.node.name.replace("/", "_"), "JSON": str(made.json), "IMAGES": str(made.images)}


def _with(cfg, *entries):
    cfg.DATASETS.REGISTER = list(entries)
    cfg.DATASETS.TRAIN = tuple(e["NAME"] for e in entries)
    return cfg


def _edit(path, change):
    data = json.loads(Path(path).read_text())
    change(data)
    Path(path).write_text(json.dumps(data))


@pytest.fixture
def cfg(make_cfg, toy_set):
    return make_cfg(toy_set)


def test_category_ids_become_contiguous(cfg, entry):
    def spread(data):
        for category in data["categories"]:
            category["id"] = {1: 30, 2: 7, 3: 11}[category["id"]]
        for annotation in data["annotations"]:
            annotation["category_id"] = {1: 30, 2: 7, 3: 11}[annotation["category_id"]]

    before = json.loads(Path(entry["JSON"]).read_text())
    _edit(entry["JSON"], spread)
    assert register_from_config(_with(cfg, entry)) == [entry["NAME"]]
    assert class_names(cfg) == ["square", "triangle", "circle"]
    records = DatasetCatalog.get(entry["NAME"])
    named = [class_names(cfg)[a["category_id"]] for r in records for a in r["annotations"]]
    assert named == [("circle", "square", "triangle")[a["category_id"] - 1] for a in before["annotations"]]
    assert MetadataCatalog.get(entry["NAME"]).evaluator_type == "coco"


def test_twice_is_once_but_another_content_is_an_error(cfg, entry, tmp_path):
    register_from_config(_with(cfg, entry))
    register_from_config(cfg)
    other = toy.generate(tmp_path / "other", "day", 1, 9, size=48)
    with pytest.raises(ValueError, match="is taken by another data set"):
        register_from_config(_with(cfg, {**entry, "JSON": str(other.json)}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"JSON": "/nowhere/a.json"}, FileNotFoundError, "/nowhere/a.json"),
        ({"IMAGES": "/nowhere"}, FileNotFoundError, "/nowhere"),
        ({"NAME": ""}, ValueError, "lacks NAME"),
        ({"IMAGE": "x"}, ValueError, "unknown key 'IMAGE'.*did you mean IMAGES"),
    ],
)
def test_bad_entries_are_named(cfg, entry, change, error, message):
    with pytest.raises(error, match=message):
        register_from_config(_with(cfg, {**entry, **change}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("categories"), "not a COCO-format json"),
        (lambda d: d.update(categories=[]), "lists no categories"),
        (lambda d: d["categories"][0].update(id=2), "a category id twice"),
    ],
)
def test_bad_categories_are_named(cfg, entry, change, message):
    _edit(entry["JSON"], change)
    with pytest.raises(ValueError, match=message):
        register_from_config(_with(cfg, entry))


def test_sets_that_are_trained_on_together_have_the_same_classes(cfg, entry, tmp_path):
    night = toy.generate(tmp_path / "night", "night", 1, 0, size=48)
    other = {"NAME": entry["NAME"] + "-night", "JSON": str(night.json), "IMAGES": str(night.images)}
    with pytest.raises(ValueError, match="different classes"):
        class_names(_with(cfg, entry, other))


def test_unregistered_name_has_its_nearest_names(cfg, entry):
    register_from_config(_with(cfg, entry))
    cfg.DATASETS.TRAIN = (entry["NAME"] + "s",)
    with pytest.raises(ValueError, match=re.escape(entry["NAME"])):
        class_names(cfg)
