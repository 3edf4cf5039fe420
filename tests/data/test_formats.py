"""Every format from its files to figures: two steps of training, evaluation, and figures against plain computations."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="needs Detectron2")

import toy  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata  # noqa: E402
from detectron2.data.datasets.cityscapes import load_cityscapes_instances, load_cityscapes_semantic  # noqa: E402
from detectron2.data.datasets.cityscapes_panoptic import load_cityscapes_panoptic  # noqa: E402
from detectron2.data.datasets.coco import load_sem_seg  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from prepare_ade20k import convert_ade20k  # noqa: E402
from prepare_cityscapes import convert_cityscapes  # noqa: E402
from prepare_coco_panoptic import convert_coco_panoptic  # noqa: E402
from prepare_ndd20 import convert_ndd20  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402

import peft_d2  # noqa: E402
from peft_d2.compat import require_cityscapes  # noqa: E402
from peft_d2.data.loader import build_test_loader  # noqa: E402
from peft_d2.data.registration import (
    NAMES,  # noqa: E402
    load_lvis,  # noqa: E402
    register_builtin,  # noqa: E402
    register_coco,  # noqa: E402
)
from peft_d2.data.segmentation import mask_to_compressed_rle, segmentation_to_mask  # noqa: E402
from peft_d2.engine.config import load_config  # noqa: E402
from peft_d2.engine.trainer import Trainer  # noqa: E402
from peft_d2.evaluation.build import build_evaluator  # noqa: E402

from . import published  # noqa: E402

TINY = Path(__file__).parents[1] / "engine" / "tiny.yaml"


@dataclass
class Format:
    """A registered set: its name, its number of classes, its mapper, and which results the model gives."""

    name: str
    classes: int
    mapper: str = "mask_former_instance"
    outputs: dict[str, bool] = field(default_factory=lambda: {"INSTANCE_ON": True})

    def cfg(self, output: Path) -> Any:
        peft_d2.register()
        cfg = load_config(str(TINY)).cfg
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (self.name,)
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = self.classes
        for key in ("INSTANCE_ON", "SEMANTIC_ON", "PANOPTIC_ON"):
            cfg.MODEL.MASK_FORMER.TEST[key] = self.outputs.get(key, False)
        cfg.INPUT.DATASET_MAPPER_NAME = self.mapper
        cfg.SOLVER.MAX_ITER, cfg.OUTPUT_DIR = 2, str(output)
        return cfg


PANOPTIC = {"INSTANCE_ON": True, "SEMANTIC_ON": True, "PANOPTIC_ON": True}
SEMANTIC = {"SEMANTIC_ON": True}


def _register(name, load, **meta):
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**meta)


def _coco(folder, form):
    made = toy.generate(folder, "day", 3, 5, size=64, masks="rle" if form == "rle" else "polygon")
    if form == "compressed":
        data = json.loads(made.json.read_text())
        for a in data["annotations"]:
            a["segmentation"] = mask_to_compressed_rle(segmentation_to_mask(a["segmentation"], 64, 64))
        made.json.write_text(json.dumps(data))
    register_coco(f"format_{form}", made.json, made.images)
    return Format(f"format_{form}", 3)


def _lvis(folder):
    """Each class is judged in each image, so that COCO's rules give the same figures."""
    made = toy.generate(folder / "val2017", "day", 3, 5, size=64)
    data = json.loads(made.json.read_text())
    for category, frequency in zip(data["categories"], "rcf", strict=True):
        category["frequency"] = frequency
    for image in data["images"]:
        present = {a["category_id"] for a in data["annotations"] if a["image_id"] == image["id"]}
        image["neg_category_ids"] = sorted({1, 2, 3} - present)
        image["not_exhaustive_category_ids"] = []
        image["coco_url"] = f"http://images/val2017/images/{image.pop('file_name')}"
    made.json.write_text(json.dumps(data))
    path, root = str(made.json), str(folder / "val2017")
    _register("format_lvis", lambda: load_lvis(path, root), json_file=path, image_root=root, evaluator_type="lvis")
    return Format("format_lvis", 3)


def _ndd20(folder):
    published.ndd20(folder / "NDD20", images=6)
    convert_ndd20(folder / "NDD20")
    register_builtin(["ndd20_train"])
    return Format("ndd20_train", 1)


def _cityscapes(folder, task):
    pytest.importorskip("cityscapesscripts", reason="the extra 'cityscapes'")
    published.cityscapes(folder / "cityscapes")
    require_cityscapes(polygons=True)
    images, truth = folder / "cityscapes/leftImg8bit/val", folder / "cityscapes/gtFine/val"
    meta = {"gt_dir": str(truth), "image_dir": str(images)}
    name = f"format_cityscapes_{task}"
    if task == "instance":
        meta |= _get_builtin_metadata("cityscapes")
        _register(name, lambda: load_cityscapes_instances(images, truth), evaluator_type="cityscapes_instance", **meta)
        return Format(name, 8)
    convert_cityscapes(folder / "cityscapes")
    if task == "semantic":
        meta |= _get_builtin_metadata("cityscapes")
        _register(name, lambda: load_cityscapes_semantic(images, truth), evaluator_type="cityscapes_sem_seg",
                  ignore_label=255, **meta)  # fmt: skip
        return Format(name, 19, "mask_former_semantic", SEMANTIC)
    known = MetadataCatalog.get("cityscapes_fine_panoptic_val").as_dict()
    meta |= {k: known[k] for k in known if "classes" in k or "contiguous" in k}
    root = truth.parent / "cityscapes_panoptic_val"
    load = lambda: load_cityscapes_panoptic(str(images), str(root), f"{root}.json", meta)  # noqa: E731
    _register(name, load, evaluator_type="cityscapes_panoptic_seg", ignore_label=255, label_divisor=1000,
              panoptic_root=str(root), panoptic_json=f"{root}.json", **meta)  # fmt: skip
    return Format(name, 19, "mask_former_panoptic", PANOPTIC)


def _ade20k(folder, task):
    root = folder / "ADEChallengeData2016"
    published.ade20k(root)
    convert_ade20k(root)
    if task == "semantic":
        images, labels = str(root / "images/validation"), str(root / "annotations_detectron2/validation")
        known = MetadataCatalog.get("ade20k_sem_seg_val").stuff_classes
        _register("format_ade20k", lambda: load_sem_seg(labels, images, gt_ext="png", image_ext="jpg"),
                  evaluator_type="sem_seg", ignore_label=255, stuff_classes=known)  # fmt: skip
        return Format("format_ade20k", 150, "mask_former_semantic", SEMANTIC)
    register_builtin([f"ade20k_{task}_val"])
    if task == "instance":
        return Format("ade20k_instance_val", 100)
    return Format("ade20k_panoptic_val", 150, "mask_former_panoptic", PANOPTIC)


def _coco_panoptic(folder):
    published.coco_panoptic(folder / "coco")
    convert_coco_panoptic(folder / "coco")
    name = "coco_2017_val_panoptic_with_sem_seg"
    register_builtin([name])
    return Format(name, 133, "coco_panoptic_lsj", PANOPTIC)


FORMATS = {
    "coco polygons": lambda f: _coco(f, "polygon"),
    "coco run lengths": lambda f: _coco(f, "rle"),
    "coco compressed": lambda f: _coco(f, "compressed"),
    "lvis": _lvis,
    "via": _ndd20,
    "cityscapes instance": lambda f: _cityscapes(f, "instance"),
    "cityscapes semantic": lambda f: _cityscapes(f, "semantic"),
    "cityscapes panoptic": lambda f: _cityscapes(f, "panoptic"),
    "ade20k instance": lambda f: _ade20k(f, "instance"),
    "ade20k semantic": lambda f: _ade20k(f, "semantic"),
    "ade20k panoptic": lambda f: _ade20k(f, "panoptic"),
    "coco panoptic": _coco_panoptic,
}
COCO_LIKE = ("coco polygons", "coco run lengths", "coco compressed", "lvis", "via", "ade20k instance")


@pytest.fixture
def made(request, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    _forget()
    yield FORMATS[request.param](tmp_path)
    _forget()


def _forget():
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in [n for n in catalog.list() if n.startswith("format_") or n in NAMES]:
            catalog.remove(name)


@pytest.mark.parametrize("made", FORMATS, indirect=True)
def test_two_steps_and_an_evaluation(made, tmp_path):
    cfg = made.cfg(tmp_path / "out")
    trainer = Trainer(cfg)
    trainer.resume_or_load()
    results = trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    assert any(np.isfinite(row["total_loss"]) for row in rows if "total_loss" in row)
    expected = {
        "INSTANCE_ON": {"segm"}, "SEMANTIC_ON": {"sem_seg"}, "PANOPTIC_ON": {"panoptic_seg"},
    }  # fmt: skip
    for key, tasks in expected.items():
        assert made.outputs.get(key, False) == (tasks <= results.keys()), results.keys()


def _evaluated(made, tmp_path, predict):
    """Figures of what ``predict`` makes of each record of the test loader."""
    cfg = made.cfg(tmp_path / "out")
    evaluator = build_evaluator(cfg, made.name, None)
    evaluator.reset()
    for [record] in build_test_loader(cfg, made.name):
        evaluator.process([record], [predict(record)])
    return evaluator.evaluate()


def _instances(masks, classes):
    shape = np.asarray(masks).shape[1:]
    found = Instances(shape)
    found.pred_masks = torch.from_numpy(np.asarray(masks).astype(bool))
    corners = []
    for mask in np.asarray(masks):
        ys, xs = np.nonzero(mask)
        corners.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    found.pred_boxes = Boxes(torch.tensor(np.array(corners), dtype=torch.float32))
    found.pred_classes = torch.tensor(classes)
    found.scores = torch.ones(len(classes))
    return found


def _moved(array, shift, fill=0):
    """Moved to the right."""
    moved = np.full_like(array, fill)
    moved[..., shift:] = array[..., : array.shape[-1] - shift]
    return moved


def _truth(made):
    """The json by pycocotools, the masks of each image, and the index of each category."""
    coco = COCO(MetadataCatalog.get(made.name).json_file)
    order = {c: i for i, c in enumerate(sorted(coco.cats))}
    masks = {
        i: [(a["category_id"], coco.annToMask(a)) for a in coco.loadAnns(coco.getAnnIds([i]))] for i in coco.getImgIds()
    }
    return coco, masks, order


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("made", COCO_LIKE, indirect=True)
def test_instances_as_pycocotools(made, tmp_path, shift):
    coco, masks, order = _truth(made)

    def predict(record):
        objects = masks[record["image_id"]]
        return {"instances": _instances([_moved(m, shift) for _, m in objects], [order[c] for c, _ in objects])}

    found = _evaluated(made, tmp_path, predict)["segm"]
    for image in coco.imgs.values():
        image.setdefault("file_name", "")
    results = [
        {"image_id": i, "category_id": c, "score": 1.0, "segmentation": mask_to_compressed_rle(_moved(m, shift))}
        for i, objects in masks.items() for c, m in objects
    ]  # fmt: skip
    evaluation = COCOeval(coco, coco.loadRes(results), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    expected = dict(zip(("AP", "AP50", "AP75"), 100 * evaluation.stats[:3], strict=True))
    assert {k: found[k] for k in expected} == pytest.approx(expected, abs=1e-6)
    assert (found["AP"] == pytest.approx(100)) == (shift == 0) and found["AP"] > 20


def _read(path):
    return np.asarray(Image.open(path)).astype(np.int64)


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("made", ["cityscapes instance"], indirect=True)
def test_cityscapes_instances(made, tmp_path, shift, monkeypatch):
    """One score for all: of n objects with k found, precision and recall are k / n and the AP is r (r + 1) / 2."""
    monkeypatch.chdir(tmp_path)
    overlaps: dict[int, list[float]] = {}

    def predict(record):
        ids = _read(record["file_name"].replace("leftImg8bit/", "gtFine/").replace("leftImg8bit", "gtFine_instanceIds"))
        masks, classes = [], []
        for instance in np.unique(ids[ids >= 1000]).tolist():
            mask = ids == instance
            moved = _moved(mask, shift)
            masks.append(moved)
            classes.append(instance // 1000)
            overlaps.setdefault(instance // 1000, []).append((mask & moved).sum() / (mask | moved).sum())
        return {"instances": _instances(masks, [{24: 0, 26: 2}[c] for c in classes])}

    found = _evaluated(made, tmp_path, predict)["segm"]
    recalls = np.array([[np.mean(np.array(o) > t) for t in np.arange(0.5, 1, 0.05)] for o in overlaps.values()])
    expected = 100 * (recalls * (recalls + 1) / 2).mean(axis=1)
    assert found["AP"] == pytest.approx(expected.mean())
    assert found["AP50"] == pytest.approx(100)
    assert not list(tmp_path.glob("*.json"))  # cityscapesscripts leaves its matches in the current folder
    assert (found["AP"] == pytest.approx(100)) == (shift == 0) and found["AP"] > 20


SEMANTIC_FORMATS = ("cityscapes semantic", "ade20k semantic")


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("made", SEMANTIC_FORMATS, indirect=True)
def test_semantic_maps(made, tmp_path, shift):
    counts = np.zeros((256, 256))
    labels_of = {r["file_name"]: r["sem_seg_file_name"] for r in DatasetCatalog.get(made.name)}

    def predict(record):
        labels = _read(labels_of[record["file_name"]])
        moved = _moved(np.where(labels == 255, 0, labels), shift)
        np.add.at(counts, (labels.ravel(), moved.ravel()), 1)
        return {"sem_seg": torch.nn.functional.one_hot(torch.from_numpy(moved), made.classes).permute(2, 0, 1).float()}

    found = _evaluated(made, tmp_path, predict)["sem_seg"]
    judged = counts[:255, :255]  # what is not labelled does not count
    hit = np.diag(judged)
    occurs = judged.sum(axis=1) > 0
    ious = hit[occurs] / (judged.sum(axis=1) + judged.sum(axis=0) - hit)[occurs]
    assert found.get("mIoU", found.get("IoU")) == pytest.approx(100 * ious.mean())
    assert (ious.mean() == 1) == (shift == 0)


@pytest.mark.parametrize("shift", [0, 5])
@pytest.mark.parametrize("made", ["cityscapes panoptic", "ade20k panoptic", "coco panoptic"], indirect=True)
def test_panoptic_quality(made, tmp_path, shift):
    """PQ by its definition: segments match where they share more than half of their union; void does not count."""
    meta = MetadataCatalog.get(made.name)
    rows: dict[int, list[float]] = {}  # class: sum of IoU, matches, segments on both sides

    def predict(record):
        colours = _read(record["pan_seg_file_name"])
        ids = colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
        crowds = [s["id"] for s in record["segments_info"] if s["iscrowd"]]
        plain = {s["id"]: s["category_id"] for s in record["segments_info"] if not s["iscrowd"]}
        kept = np.where(np.isin(ids, crowds), 0, ids)
        moved = _moved(kept, shift)
        for instance, category in plain.items():
            row = rows.setdefault(category, [0.0, 0, 0])
            one, other = ids == instance, moved == instance
            judged = other & (ids != 0)
            iou = (one & other).sum() / (one | judged).sum()
            row[0], row[1] = row[0] + iou * (iou > 0.5), row[1] + (iou > 0.5)
            unjudged = (other & np.isin(ids, [0, *[c for c in crowds if _same(record, c, category)]])).sum()
            row[2] += 2 if iou > 0.5 or unjudged <= 0.5 * other.sum() else 1
        info = [{"id": i, "category_id": c, "isthing": _thing(meta, c)} for i, c in plain.items()]
        semantic = torch.zeros(made.classes, *ids.shape)
        return {"panoptic_seg": (torch.from_numpy(moved), info), "sem_seg": semantic, "instances": Instances(ids.shape,
                pred_masks=torch.zeros(0, *ids.shape, dtype=torch.bool), pred_boxes=Boxes(torch.zeros(0, 4)),
                pred_classes=torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0))}  # fmt: skip

    found = _evaluated(made, tmp_path, predict)["panoptic_seg"]
    qualities = [iou / (0.5 * segments) for iou, _, segments in rows.values()]
    assert found["PQ"] == pytest.approx(100 * np.mean(qualities))
    assert (found["PQ"] == pytest.approx(100)) == (shift == 0) and found["PQ"] > 20


def _thing(meta, category):
    return category in meta.thing_dataset_id_to_contiguous_id.values()


def _same(record, crowd, category):
    return any(s["id"] == crowd and s["category_id"] == category for s in record["segments_info"])
