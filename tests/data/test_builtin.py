"""Published sets by name: lazily, twice without harm, beside Detectron2's and others' registrations."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="needs Detectron2")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from prepare_ade20k import convert_ade20k  # noqa: E402
from prepare_coco_panoptic import convert_coco_panoptic  # noqa: E402
from prepare_ndd20 import convert_ndd20  # noqa: E402

from peft_d2.data.classes import class_names  # noqa: E402
from peft_d2.data.config import add_data_config  # noqa: E402
from peft_d2.data.registration import (  # noqa: E402
    COCO_SETS,
    NAMES,
    load_lvis,  # noqa: E402
    register_builtin,  # noqa: E402
    register_from_config,  # noqa: E402
    remedy,
)
from peft_d2.data.validation import DatasetError, check_datasets  # noqa: E402

from . import published  # noqa: E402


@pytest.fixture(autouse=True)
def datasets(tmp_path, monkeypatch):
    """An empty folder of all data sets; the names are free before and after."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget():
    for name in NAMES:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)


def _cfg(*names):
    cfg = get_cfg()
    add_data_config(cfg)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = names
    return cfg


def _coco(folder, entry, classes):
    data = {"images": [{"id": 1, "file_name": "a.png", "width": published.WIDTH, "height": published.HEIGHT}]}
    data["categories"] = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    polygon = [5, 5, 30, 5, 30, 30]
    data["annotations"] = [
        {"id": i, "image_id": 1, "category_id": i, "bbox": [5, 5, 25, 25], "area": 312.5, "iscrowd": 0,
         "segmentation": [polygon]} for i in range(1, len(classes) + 1)
    ]  # fmt: skip
    published.write(folder / entry.paths["json_file"], data)
    published.save(published.picture(0), folder / entry.paths["image_root"] / "a.png")


def test_a_config_registers_what_it_names_and_nothing_else():
    assert not set(NAMES) & set(DatasetCatalog)
    register_from_config(_cfg("ndd20_train", "coco_2017_val"))
    assert set(NAMES) & set(DatasetCatalog) == {"ndd20_train"}
    assert register_builtin(["ndd20_train", "ndd20_train", "ssdd_test", "nothing"]) == ["ssdd_test"]
    assert register_builtin() and register_builtin() == []
    assert set(NAMES) <= set(DatasetCatalog)


def test_every_set_says_what_it_is_and_where_it_belongs():
    register_builtin()
    counts = {"ndd20": 1, "zerowaste": 4, "trashcan_instance": 22, "trashcan_material": 16, "ssdd": 1, "nwpu": 10,
              "ade20k": 100, "coco": 80, "wixray": 0}  # fmt: skip
    for name in NAMES:
        meta = MetadataCatalog.get(name)
        assert meta.evaluator_type in ("coco", "ade20k_panoptic_seg", "coco_panoptic_seg")
        expected = next(n for prefix, n in counts.items() if name.startswith(prefix))
        assert len(meta.get("thing_classes", [])) == len(set(meta.get("thing_classes", []))) == expected
        assert remedy(name)
    assert remedy("coco_2017_val") == ""


@pytest.mark.parametrize("name", [name for name, entry in COCO_SETS.items() if not name.startswith("ade20k")])
def test_sets_load_from_the_published_layout(datasets, name):
    entry = COCO_SETS[name]
    _coco(datasets, entry, entry.classes or ("a", "b", "c"))
    cfg = _cfg(name)
    assert class_names(cfg) == list(entry.classes or ("a", "b", "c"))
    [record] = DatasetCatalog.get(name)
    assert Path(record["file_name"]).is_file() and record["annotations"][0]["category_id"] == 0
    check_datasets(cfg)


def test_missing_files_are_told_with_what_brings_them(datasets):
    for name, message in (("ssdd_train", "prepare_ssdd.py"), ("zerowaste_val", "Unpack the published files")):
        cfg = _cfg(name)
        register_from_config(cfg)
        with pytest.raises(DatasetError, match=message) as caught:
            check_datasets(cfg)
        assert str(datasets) in str(caught.value)
    register_builtin(["ade20k_panoptic_val"])
    with pytest.raises(FileNotFoundError, match="ade20k_panoptic_val.json does not exist.*prepare_ade20k"):
        DatasetCatalog.get("ade20k_panoptic_val")


def test_other_classes_in_the_json_are_used_with_a_warning(datasets, caplog):
    _coco(datasets, COCO_SETS["zerowaste_train"], ("metal", "cardboard"))
    assert class_names(_cfg("zerowaste_train")) == ["metal", "cardboard"]
    assert "expected ['rigid_plastic'" in caplog.text
    assert len(DatasetCatalog.get("zerowaste_train")) == 1


def test_who_comes_first_keeps_the_name(datasets):
    DatasetCatalog.register("ade20k_instance_train", lambda: ["somebody's"])
    assert "ade20k_instance_train" not in register_builtin()
    assert DatasetCatalog.get("ade20k_instance_train") == ["somebody's"]
    made = {"NAME": "ndd20_test", "JSON": str(datasets / "a.json"), "IMAGES": str(datasets)}
    DatasetCatalog.remove("ndd20_test")
    MetadataCatalog.remove("ndd20_test")
    published.write(datasets / "a.json", {"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]})
    cfg = _cfg("ndd20_test")
    cfg.DATASETS.REGISTER = [made]
    assert class_names(cfg) == ["x"]  # a set of one's own comes before the built-in one of that name


def test_ade20k_and_coco_panoptic_as_mask2former_has_them(datasets):
    published.ade20k(datasets / "ADEChallengeData2016")
    convert_ade20k(datasets / "ADEChallengeData2016")
    published.coco_panoptic(datasets / "coco")
    convert_coco_panoptic(datasets / "coco")
    names = ["ade20k_panoptic_val", "ade20k_instance_val", "coco_2017_val_panoptic_with_sem_seg"]
    register_builtin(names)
    for name in (names[0], names[2]):
        records = DatasetCatalog.get(name)
        assert records and all(record["segments_info"] for record in records)
        for record in records:
            assert all(Path(record[k]).is_file() for k in ("file_name", "pan_seg_file_name", "sem_seg_file_name"))
            meta = MetadataCatalog.get(name)
            for segment in record["segments_info"]:
                assert segment["isthing"] == (meta.stuff_classes[segment["category_id"]] in meta.thing_classes)
    classes = {s["category_id"] for s in DatasetCatalog.get(names[0])[0]["segments_info"]}
    assert classes == {0, 3, 7, 12}
    objects = DatasetCatalog.get(names[1])[0]["annotations"]
    assert [MetadataCatalog.get(names[1]).thing_classes[o["category_id"]] for o in objects] == ["bed", "person"]


def test_ndd20_from_its_archive_to_records(datasets):
    published.ndd20(datasets / "NDD20")
    convert_ndd20(datasets / "NDD20")
    register_builtin(["ndd20_below_train"])
    records = DatasetCatalog.get("ndd20_below_train")
    assert len(records) == 10 and all("BELOW" in r["file_name"] and len(r["annotations"]) == 1 for r in records)


def test_lvis_loads_without_its_package(datasets):
    image = {"id": 3, "coco_url": "http://x/val2017/a b.jpg", "height": 8, "width": 9, "neg_category_ids": [5]}
    annotation = {
        "id": 1,
        "image_id": 3,
        "category_id": 1203,
        "bbox": [0, 0, 1, 1],
        "segmentation": [[0, 0, 1, 0, 1, 1]],
    }
    published.write(datasets / "a.json", {"images": [image], "annotations": [annotation], "categories": []})
    [record] = load_lvis(str(datasets / "a.json"), str(datasets / "coco"))
    assert record["file_name"] == str(datasets / "coco" / "val2017" / "a b.jpg")
    assert record["annotations"][0]["category_id"] == 1202
    assert (record["neg_category_ids"], record["not_exhaustive_category_ids"]) == ([5], [])
    published.write(datasets / "b.json", {"images": [{"id": 1}]})
    with pytest.raises(ValueError, match="not an LVIS json"):
        load_lvis(str(datasets / "b.json"), "")


CONFIGS = Path(__file__).parents[2] / "configs"
PAPERS = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.glob("*/paper/*.yaml") if not p.name.startswith("_"))


def test_every_config_names_sets_that_there_are():
    from peft_d2.engine.config import read_tree

    found = {}
    for path in CONFIGS.rglob("*.yaml"):
        tree = read_tree(str(path))
        own = {entry["NAME"] for entry in tree.get("DATASETS", {}).get("REGISTER", ())}
        for key in ("TRAIN", "TEST"):
            names = tree.get("DATASETS", {}).get(key, ())
            for name in [names] if isinstance(names, str) and not names.startswith("(") else _strings(names):
                if name not in own and name not in NAMES and name not in DatasetCatalog:
                    found[str(path)] = name
    assert not found


def _strings(names):
    import ast

    return ast.literal_eval(names) if isinstance(names, str) else names


@pytest.mark.parametrize("path", PAPERS)
def test_the_papers_configs_have_the_classes_of_their_sets(path):
    import peft_d2
    from peft_d2.engine.config import load_config

    peft_d2.register()
    cfg = load_config(str(CONFIGS / path)).cfg
    [name] = cfg.DATASETS.TRAIN
    register_from_config(cfg)
    names = MetadataCatalog.get(name).get("thing_classes", [])
    if names and "sam" not in path:  # boxes prompt Segment Anything, which has no classes
        assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == len(names)
    assert cfg.DATASETS.TEST[0].rpartition("_")[0] == name.rpartition("_")[0]


def test_the_papers_recipe_feeds_what_it_says(datasets):
    import peft_d2
    from peft_d2.data.loader import build_train_loader
    from peft_d2.engine.config import load_config

    published.ndd20(datasets / "NDD20")
    convert_ndd20(datasets / "NDD20")
    peft_d2.register()
    cfg = load_config(str(CONFIGS / "mask_dino/paper/ndd20_r50.yaml"), opts=["DATALOADER.NUM_WORKERS", "0"]).cfg
    batch = next(iter(build_train_loader(cfg)))
    assert len(batch) == 4 and all(sample["image"].shape == (3, 512, 512) for sample in batch)
    assert all(sample["instances"].gt_masks.shape[1:] == (512, 512) for sample in batch)
    assert sum(len(sample["instances"]) for sample in batch) > 0
