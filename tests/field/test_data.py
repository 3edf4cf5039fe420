"""Other people's data: a situation a row, through the command lines and public names."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import struct
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

from detectron2 import model_zoo  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.data.datasets import register_coco_instances  # noqa: E402
from detectron2.data.datasets.coco import load_sem_seg  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402

import peft_d2  # noqa: E402
from peft_d2.data.classes import check_classes  # noqa: E402
from peft_d2.data.images import DatasetError, read_header  # noqa: E402
from peft_d2.data.registration import register_coco, register_from_config  # noqa: E402
from peft_d2.data.segmentation import segmentation_to_mask  # noqa: E402
from peft_d2.data.validation import Rules, check_coco, check_datasets  # noqa: E402
from peft_d2.engine.checks import apply_class_count  # noqa: E402
from peft_d2.engine.config import load_config  # noqa: E402
from peft_d2.evaluation import lvis  # noqa: E402
from peft_d2.evaluation.build import build_evaluator  # noqa: E402
from peft_d2.evaluation.coco import evaluate_coco  # noqa: E402
from peft_d2.evaluation.panoptic import PanopticQualityEvaluator  # noqa: E402
from peft_d2.storage.adapter_file import classes_of  # noqa: E402

from .conftest import TINY, Own  # noqa: E402

# ---------------------------------------------------------------------------------- ids (A7)

ANNOTATION_IDS = {
    "from 0": lambda i: i - 1,
    "negative": lambda i: -i,
    "huge": lambda i: 2**63 + 7 * i,
    "all the same": lambda i: 0,
    "text": lambda i: f"object {i}",
}
IMAGE_IDS = {
    "from 0": lambda i: i - 1,
    "negative": lambda i: -i,
    "above 2**53": lambda i: 2**53 + i,
    "above 2**63": lambda i: 2**64 - i,
    "text": lambda i: f"img/{100 - i}",
    "text and numbers": lambda i: i if i % 2 else str(i),
}
CATEGORY_IDS = {"from 0": lambda i: i // 2 - 1, "negative": lambda i: i - 100, "huge": lambda i: 2**60 + i}


def _predicted(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A truth of boxes and predictions that hit some; many scores are equal, whose order is then that of the images."""
    rng = np.random.default_rng(seed)
    data: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    data["categories"] = [{"id": 2 * k, "name": f"class {k}", "frequency": "rcf"[k % 3]} for k in (1, 2, 3)]
    results = []
    for image in range(1, 6):
        everything = {"neg_category_ids": [2, 4, 6], "not_exhaustive_category_ids": []}
        data["images"].append({"id": image, "height": 100, "width": 100, "file_name": f"{image}.png", **everything})
        for _ in range(6):
            x, y, w, h = rng.uniform(4, 50, 4).round(1).tolist()
            thing = {"image_id": image, "category_id": 2 * int(rng.integers(1, 4)), "bbox": [x, y, w, h]}
            data["annotations"].append({**thing, "id": len(data["annotations"]) + 1, "area": w * h, "iscrowd": 0})
            moved = [x + rng.uniform(-4, 4), y + rng.uniform(-4, 4), w, h]
            results.append({**thing, "bbox": moved, "score": round(float(rng.random()), 1)})
    return data, results


def _renamed(data, results, kind, rename):
    data, results = copy.deepcopy(data), copy.deepcopy(results)
    key = {"annotation": "", "image": "image_id", "category": "category_id"}[kind]
    for entry in data[{"annotation": "annotations", "image": "images", "category": "categories"}[kind]]:
        entry["id"] = rename(entry["id"])
    for entry in [*data["annotations"], *results] if key else []:
        entry[key] = rename(entry[key])
    for image in data["images"] if kind == "category" else []:
        image["neg_category_ids"] = [rename(c) for c in image["neg_category_ids"]]
    return data, results


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, forms in (("annotation", ANNOTATION_IDS), ("image", IMAGE_IDS), ("category", CATEGORY_IDS))
     for name in forms],
)  # fmt: skip
@pytest.mark.parametrize("seed", [0, 1])
def test_figures_do_not_depend_on_ids(kind, name, seed):
    rename = {"annotation": ANNOTATION_IDS, "image": IMAGE_IDS, "category": CATEGORY_IDS}[kind][name]
    data, results = _predicted(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(data)
        truth.createIndex()
        reference = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "bbox")
        reference.evaluate(), reference.accumulate(), reference.summarize()
    clean = lvis.figures(lvis.lvis_evaluation(copy.deepcopy(data), results, "bbox"))
    other = _renamed(data, results, kind, rename)
    assert 0.05 < reference.stats[0] < 0.95
    assert evaluate_coco(*copy.deepcopy(other), "bbox").stats[:12].tolist() == pytest.approx(reference.stats.tolist())
    assert lvis.figures(lvis.lvis_evaluation(*other, "bbox")) == pytest.approx(clean)


# ---------------------------------------------------------------------------------- classes (A8)


def _config(train: Own | None, *tests: Own) -> Any:
    """A config of the tiny model, with sets of new names."""
    peft_d2.register()
    cfg = load_config(str(TINY)).cfg
    names = [f"field_{uuid.uuid4().hex}" for _ in (train, *tests)]
    sets = [(n, s) for n, s in zip(names, (train, *tests), strict=True) if s]
    cfg.DATASETS.REGISTER = [{"NAME": n, "JSON": str(s.json), "IMAGES": str(s.images)} for n, s in sets]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(names[:1] if train else ()), tuple(names[1:])
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    register_from_config(cfg)
    return cfg


TRAINED = ("circle", "square", "triangle")  # the toy world's classes by day, in the training set's order


def _perfect(cfg: Any, name: str, data: dict[str, Any]) -> dict[str, Any]:
    """Figures of a model that sees all objects and knows the classes that it was trained on."""
    evaluator = build_evaluator(cfg, name, None)
    evaluator.reset()
    labels = {c["id"]: c["name"] for c in data["categories"]}
    for image in data["images"]:
        objects = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        instances = Instances((64, 64))
        masks = [segmentation_to_mask(a["segmentation"], 64, 64) for a in objects]
        instances.pred_masks = torch.from_numpy(np.array(masks).reshape(-1, 64, 64))
        boxes = np.array([a["bbox"] for a in objects], dtype=np.float32).reshape(-1, 4)
        instances.pred_boxes = Boxes(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1))
        instances.scores = torch.full((len(objects),), 0.9)
        instances.pred_classes = torch.tensor([TRAINED.index(labels[a["category_id"]]) for a in objects]).long()
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    return evaluator.evaluate()


def _give_ids(data, **ids):
    """Category ids by class name."""
    old = {c["id"]: c["name"] for c in data["categories"]}
    for annotation in data["annotations"]:
        annotation["category_id"] = ids[old[annotation["category_id"]]]
    data["categories"] = [{"id": i, "name": n} for n, i in ids.items()]


def _keep(data, *names):
    kept = [c for c in data["categories"] if c["name"] in names]
    ids = {c["id"] for c in kept}
    data["categories"], data["annotations"] = kept, [a for a in data["annotations"] if a["category_id"] in ids]


PAIRED = {
    "the same": None,
    "other ids": lambda d: _give_ids(d, circle=7, square=8, triangle=30),
    "another order": lambda d: _give_ids(d, circle=9, square=2, triangle=5),
    "a subset": lambda d: _keep(d, "square", "triangle"),
    "the last alone": lambda d: _keep(d, "triangle"),
    "a class more, without objects": lambda d: d["categories"].append({"id": 9, "name": "ring"}),
}


@pytest.mark.parametrize("registered", ["by the config", "by Detectron2"])
@pytest.mark.parametrize("name", PAIRED)
def test_classes_are_paired_by_name(own, name, registered):
    train, test = own("train"), own("test", seed=1).change(PAIRED[name])
    cfg = _config(train, test, own("other", seed=2))
    if registered == "by Detectron2":
        register_coco_instances("foreign " + cfg.DATASETS.TEST[0], {}, str(test.json), str(test.images))
        cfg.DATASETS.TEST = ("foreign " + cfg.DATASETS.TEST[0], cfg.DATASETS.TEST[1])
    check_classes(cfg)
    for task, figures in _perfect(cfg, cfg.DATASETS.TEST[0], test.data).items():
        assert figures["AP"] == pytest.approx(100), task
    assert _perfect(cfg, cfg.DATASETS.TEST[1], own("other", seed=2).data)["segm"]["AP"] == pytest.approx(100)


def test_what_a_model_says_of_other_classes_is_not_judged(own):
    test = own("test", seed=1).change(lambda d: _keep(d, "square"))
    cfg = _config(own("train"), test)
    whole = own("again", seed=1).data  # the model sees circles and triangles, too
    figures = _perfect(cfg, cfg.DATASETS.TEST[0], whole)
    assert figures["segm"]["AP"] == pytest.approx(100)


UNPAIRED = {
    "other names": (lambda d: d["categories"][0].update(name="Circle"), r"not trained on: 'Circle'.*'circle'"),
    "a class more": (lambda d: (d["categories"].append({"id": 9, "name": "ring"}),
                                d["annotations"][0].update(category_id=9)), "not trained on: 'ring'"),
    "a name twice": (lambda d: d["categories"][0].update(name="square"), "square"),
}  # fmt: skip


def test_a_run_whose_validation_has_other_ids_and_fewer_classes(own, tool, tmp_path):
    options = _run(own, tmp_path / "run")
    Own(tmp_path / "val", seed=1).change(lambda d: (_give_ids(d, circle=9, square=2, triangle=5), _keep(d, "square")))
    code, text = tool("train_net", *options)
    assert code == 0 and "lacks the class(es) 'circle', 'triangle'" in text, text
    results = json.loads(next((tmp_path / "run" / "inference").rglob("coco_instances_results.json")).read_text())
    assert {r["category_id"] for r in results} <= {2}


@pytest.mark.parametrize("name", UNPAIRED)
def test_what_cannot_be_paired_is_refused_before_the_first_step(own, tool, tmp_path, name):
    change, said = UNPAIRED[name]
    train, val = own("train"), own("val").change(change)
    options = ["--config-file", TINY, "--train-json", train.json, "--train-images", train.images]
    options += ["--val-json", val.json, "--val-images", val.images, "--name", uuid.uuid4().hex]
    code, text = tool("train_net", *options, "OUTPUT_DIR", tmp_path / "run")
    assert code == 1 and "error: " in text and "Traceback" not in text
    assert re.search(said, text), text
    assert not list(tmp_path.rglob("*.pth"))


# ---------------------------------------------------------------------------------- consistent nonsense (A11)


def _each(change):
    def all_of_them(data):
        for annotation in data["annotations"]:
            change(annotation)

    return all_of_them


def _scaled(segmentation):
    return [[v / 64 for v in polygon] for polygon in segmentation]


def _corners(a):
    x, y, w, h = a["bbox"]
    a["bbox"] = [x, y, x + w, y + h]


NONSENSE = {  # change, kind of the problem that names the cause, whether it is an error
    "normalised polygons": (_each(lambda a: a.update(segmentation=_scaled(a["segmentation"]))), "polygons in 0..1",
                            "nothing to learn"),
    "normalised boxes": (_each(lambda a: a.update(bbox=[v / 64 for v in a["bbox"]])), "boxes in 0..1", ""),
    "normalised boxes alone": (_each(lambda a: (a.pop("segmentation"), a.update(bbox=[v / 64 for v in a["bbox"]]))),
                               "boxes in 0..1", "nothing to learn"),
    "boxes as corners": (_each(_corners), "boxes as corners", ""),
    "boxes alone, as corners": (_each(lambda a: (a.pop("segmentation"), _corners(a))), "boxes as corners", ""),
    "all crowds": (_each(lambda a: a.update(iscrowd=1)), "crowds", "nothing to learn"),
    "most are crowds": (lambda d: [a.update(iscrowd=1) for a in d["annotations"][2:]], "crowds", ""),
    "area 0": (_each(lambda a: a.update(area=0)), "areas", ""),
    "area of another scale": (_each(lambda a: a.update(area=a["area"] / 4096)), "areas", ""),
    "axes swapped": (_each(lambda a: a.update(segmentation=[[p[i ^ 1] for i in range(len(p))]
                                                             for p in a["segmentation"]])), "swapped axes", ""),
    "boxes of another scale": (_each(lambda a: a.update(bbox=[2 * v for v in a["bbox"]])), "boxes and masks", ""),
    "copies": (lambda d: d["annotations"].extend([{**a, "id": 99 + a["id"]} for a in d["annotations"]]), "copies", ""),
    "masks of another image": (_each(lambda a: a.update(
        segmentation=[[v + 1000 for v in p] for p in a["segmentation"]])), "boxes and masks", "nothing to learn"),
}  # fmt: skip


@pytest.mark.parametrize("name", NONSENSE)
def test_consistent_nonsense_is_named_with_counts(own, tool, name):
    change, kind, error = NONSENSE[name]
    made = own("set", images=6).change(change)
    problems = check_coco(made.json, made.images)
    found = [p for p in problems if p.kind == kind]
    assert found and str(len(made.data["annotations"]))[:1] in found[0].what, [str(p) for p in problems]
    assert [p.kind for p in problems if p.level == "error"] == ([error] if error else [])
    code, text = tool("check_dataset", "--json", made.json, "--images", made.images)
    assert code == (1 if error else 0) and found[0].what in text


def test_a_good_set_has_none_of_these(own):
    made = own("set", images=6)
    assert check_coco(made.json, made.images) == []


def _numbers_as_text(d):
    for annotation in d["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])


OTHER_FORMS = {  # change, what is said, how many errors: what follows from another error is not said
    "sizes are not whole": (lambda d: [i.update(width=64.0) for i in d["images"]],
                            r"images\[0\]: lacks a usable width \(64.0\). Expected whole", 4),
    "class numbers are texts": (lambda d: [a.update(category_id=str(a["category_id"])) for a in d["annotations"]],
                                r"annotations\[0\]: lacks a usable category_id \('\d'\). Expected whole numbers", None),
    "class names are numbers": (lambda d: [c.update(name=c["id"]) for c in d["categories"]],
                                r"categories\[0\]: lacks a usable name \(1\). Expected .* texts for names", 3),
    "classes are names": (lambda d: d.update(categories=["circle"]), r"categories\[0\]: lacks a usable id, name", 1),
    "numbers without end": (lambda d: d["annotations"][0]["bbox"].__setitem__(0, 10**400), "is not finite or huge", 1),
    "sizes of masks are not whole": (
        lambda d: d["annotations"][0].update(segmentation={"size": [64.0, 64.0], "counts": [0, 4096]}),
        r"run lengths are of size \[64.0, 64.0\], the image is \[64, 64\]", 1),
    "ids of two kinds": (_numbers_as_text, "image_id '1' is not listed, but 1 is. Write both as numbers", None),
    "a name that no file can have": (lambda d: d["images"][0].update(file_name="data:" + "A" * 300), "A is no file", 1),
    "a missing number": (lambda d: d["annotations"][0].pop("id"), r"annotations\[0\]: lacks a usable id. Add it", 1),
    "labelme's own": (lambda d: (d.clear(), d.update(shapes=[], imagePath="a.png")),
                      r"the json is an object with \['shapes', 'imagePath'\]", 1),
    "panoptic": (lambda d: d.update(annotations=[{"image_id": 1, "segments_info": []}]), "this is a panoptic json", 1),
    "turned by EXIF": (lambda d: [i.update(width=48) for i in d["images"]], "exchanged: correct the json.*EXIF tag", 4),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_what_has_another_form_is_named_once(own, name):
    change, said, count = OTHER_FORMS[name]
    made = own("set").change(change)
    for path in made.images.iterdir() if name == "turned by EXIF" else ():
        turn = Image.Exif()
        turn[0x0112] = 6
        Image.open(path).resize((48, 64)).save(path, exif=turn)
    problems = check_coco(made.json, made.images)
    errors = [p for p in problems if p.level == "error"]
    assert re.search(said, str(errors[0])), errors[0]
    assert len(errors) == (len(made.data["annotations"]) if count is None else count)
    assert not [p for p in problems if p.kind in ("empty class", "no annotations")]


# ---------------------------------------------------------------------------------- sets that a function registers


def _each_thing(**values):
    return lambda r: [thing.update(values) for thing in r["annotations"]]


def _arrays(r):
    for thing in r["annotations"]:
        thing |= {"bbox": np.array(thing["bbox"]), "segmentation": [np.array(p) for p in thing["segmentation"]]}


RECORDS = {  # what is changed in each record, and what is said before the training
    "as Detectron2 has it": (lambda r: None, ""),
    "NumPy's arrays": (_arrays, ""),
    "paths": (lambda r: r.update(file_name=Path(r["file_name"])), ""),
    "a class too many": (_each_thing(category_id=3), r"category_id is 3. Expected a whole number from 0 to 2"),
    "a class below": (_each_thing(category_id=-1), "category_id is -1"),
    "a class by name": (_each_thing(category_id="circle"), "category_id is 'circle'"),
    "no mode": (lambda r: [thing.pop("bbox_mode") for thing in r["annotations"]], "bbox_mode is None"),
    "no box": (_each_thing(bbox=None), "bbox is None"),
    "run lengths as a list": (_each_thing(segmentation={"size": [64, 64], "counts": [9, 4087]}), "not compressed"),
    "no number": (lambda r: r.pop("image_id"), r"lacks a usable image_id \(None\)"),
    "one number": (lambda r: r.update(image_id=5), "image_id 5 is that of 4 records"),
    "no size": (lambda r: (r.pop("height"), r.pop("width")), "lacks a usable height"),
    "no file": (lambda r: r.update(file_name="gone.png"), r"gone.png\]: is no file"),
    "a name that no file can have": (lambda r: r.update(file_name="data:" + "A" * 300), r"A\]: is no file"),
    "no list of annotations": (lambda r: r.update(annotations=None), "annotations is None. Expected a list"),
}  # fmt: skip


def _function_set(made: Own, change: Any, **meta: Any) -> str:
    """A set that a function registers, as Detectron2's tutorial does; ``meta["records"]`` in place of the set's own."""
    name = f"function_{uuid.uuid4().hex}"
    register_coco_instances(f"{name}_json", {}, str(made.json), str(made.images))

    def load():
        records = copy.deepcopy(DatasetCatalog.get(f"{name}_json"))
        for record in records:
            change(record)
        return records

    DatasetCatalog.register(name, meta.pop("records", load))
    MetadataCatalog.get(name).set(**{"thing_classes": list(TRAINED), "evaluator_type": "coco", **meta})
    return name


@pytest.mark.parametrize("case", RECORDS)
def test_records_of_a_function_are_checked_before_training(own, case):
    change, said = RECORDS[case]
    name = _function_set(own("set"), change)
    cfg = _config(None)
    cfg.DATASETS.REGISTER, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [], (name,), (name,)
    if said:
        with pytest.raises(DatasetError, match=said):
            check_datasets(cfg)
    else:
        check_datasets(cfg)
        figures = _perfect(cfg, name, _counted_from_0(own("again").data))
        assert figures["segm"]["AP"] > 95 and figures["bbox"]["AP"] > 95  # of boxes that the json rounds


def _counted_from_0(data):
    _give_ids(data, circle=0, square=1, triangle=2)
    return data


@pytest.mark.parametrize(("classes", "records"), [("circle", None), (np.array(TRAINED), None), (TRAINED, list)])
def test_names_of_classes_are_a_list_and_some_image_is_there(own, classes, records):
    name = _function_set(own("set"), lambda r: None, thing_classes=classes, **({"records": records} if records else {}))
    cfg = _config(None)
    cfg.DATASETS.REGISTER, cfg.DATASETS.TRAIN = [], (name,)
    with pytest.raises(DatasetError, match="there are none" if records else "thing_classes are .*Expected a list"):
        check_classes(cfg)
        check_datasets(cfg)


FUNCTIONS = {"generator": lambda: (r for r in [{}]), "dict": lambda: {1: {}}, "NoneType": lambda: None}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_give_lists_of_records(own, kind):
    name = _function_set(own("set"), None, records=FUNCTIONS[kind])
    cfg = _config(None)
    cfg.DATASETS.REGISTER, cfg.DATASETS.TRAIN = [], (name,)
    with pytest.raises(DatasetError, match=f"its function gives a {kind}, not a list of dicts"):
        check_datasets(cfg)


def test_a_set_that_detectron2_knows_already_and_has_not_loaded(own):
    """Its classes were not known, and the config's class count stayed as it was."""
    made, name = own("set"), f"both_{uuid.uuid4().hex}"
    register_coco_instances(name, {}, str(made.json), str(made.images))
    cfg = _config(None)
    cfg.DATASETS.REGISTER = [{"NAME": name, "JSON": str(made.json), "IMAGES": str(made.images)}]
    cfg.DATASETS.TRAIN, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = (name,), 80
    apply_class_count(cfg)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    other = f"named_{uuid.uuid4().hex}"
    MetadataCatalog.get(other).thing_classes = ["balloon"]
    cfg.DATASETS.REGISTER[0]["NAME"] = other
    with pytest.raises(DatasetError, match=f"data set '{other}': Attribute 'thing_classes' .*Choose another name"):
        register_from_config(cfg)


def test_the_truth_is_that_of_today(own, tmp_path):
    """Detectron2 keeps the records as a json in the output folder, and reads that from the second run on."""
    made, changed = own("set"), []
    name = _function_set(made, lambda r: r.update(annotations=r["annotations"][len(changed) :]))
    cfg = _config(None)
    cfg.DATASETS.REGISTER, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [], (name,), (name,)
    for folder in (str(tmp_path / "out"), None):
        counts = []
        for _ in range(2):
            counts.append(len(build_evaluator(cfg, name, folder)._coco_api.anns))
            changed.append(1)
        assert counts[0] - counts[1] == 4
    assert "json_file" not in MetadataCatalog.get(name).as_dict()


# ---------------------------------------------------------------------------------- label images (A12)


def _semantic(folder: Path, labels: np.ndarray | Image.Image, classes=("ground", "thing"), **meta: Any) -> str:
    """A registered set of four images with the same label image."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    label = labels if isinstance(labels, Image.Image) else Image.fromarray(labels)
    for number in range(4):
        Image.new("RGB", (64, 48), (number, 90, 20)).save(folder / "images" / f"{number}.jpg")
        label.save(folder / "labels" / f"{number}.png")
    name = f"semantic_{uuid.uuid4().hex}"
    DatasetCatalog.register(name, lambda: load_sem_seg(str(folder / "labels"), str(folder / "images")))
    roots = {"image_root": str(folder / "images"), "sem_seg_root": str(folder / "labels")}
    MetadataCatalog.get(name).set(
        evaluator_type="sem_seg", stuff_classes=list(classes), ignore_label=255, **{**roots, **meta}
    )
    return name


def _semantic_config(name: str, classes: int = 2) -> Any:
    cfg = _config(None)
    cfg.DATASETS.REGISTER, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [], (name,), (name,)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.INPUT.DATASET_MAPPER_NAME = classes, "mask_former_semantic"
    return cfg


HALF = np.zeros((48, 64), dtype=np.uint8)
HALF[:, 32:] = 1
PALETTE = Image.fromarray(HALF).convert("P")
PALETTE.putpalette([200, 30, 30, 10, 60, 250] + [0] * 762)

LABELS = {
    "as they should be": (HALF, ""),
    "a palette": (PALETTE, ""),
    "one bit": (Image.fromarray(HALF.astype(bool)), ""),
    "16 bits": (HALF.astype(np.uint16), ""),
    "0 and 255 for two classes": (HALF * 255, r"0\.png: the labels hold 0 and 255 alone"),
    "a value too many": (HALF * 2, r"0\.png: has the value\(s\) 2, but there are 2 classes"),
    "a large value": (HALF.astype(np.uint16) * 1000, r"0\.png: has the value\(s\) 1000"),
    "another size": (HALF[:, :60], r"0\.png: is 60 x 48 px, its image .*0\.jpg 64 x 48"),
    "colours": (PALETTE.convert("RGB"), r"0\.png: is a colour image"),
}


@pytest.mark.parametrize("name", LABELS)
def test_label_images_are_checked_before_training(tmp_path, name):
    labels, said = LABELS[name]
    cfg = _semantic_config(_semantic(tmp_path / "set", labels))
    if not said:
        check_datasets(cfg)
        return
    with pytest.raises(DatasetError, match=said):
        check_datasets(cfg)


def test_label_images_that_are_broken_gone_or_few(tmp_path, caplog):
    name = _semantic(tmp_path / "set", HALF, classes=("ground", "thing", "other"))
    cfg = _semantic_config(name, 3)
    check_datasets(cfg)
    assert "class 2 'other'" in caplog.text
    path = tmp_path / "set" / "labels" / "2.png"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match=r"2\.png"):  # although the set was good before
        check_datasets(cfg)
    path.unlink()
    check_datasets(cfg)
    assert "image(s) have no label image" in caplog.text
    (tmp_path / "set" / "images" / "3.jpg").unlink()
    with pytest.raises(DatasetError, match=r"3\.png: 1 label image\(s\) have no image"):
        check_datasets(cfg)


def test_detectron2s_own_models_read_palettes_as_brightness(tmp_path):
    cfg = _semantic_config(_semantic(tmp_path / "set", PALETTE))
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    with pytest.raises(DatasetError, match="mode P"):
        check_datasets(cfg)


# ---------------------------------------------------------------------------------- images (A13, B)


def _tiff(bands: int, bits: int = 8, size: int = 64) -> bytes:
    """An uncompressed TIFF, which Pillow cannot write with so many bands."""
    extra = [(338, 3, bands - 3, [0] * (bands - 3))] if bands > 3 else []
    entries = [(256, 3, 1, [size]), (257, 3, 1, [size]), (258, 3, bands, [bits] * bands), (259, 3, 1, [1]),
               (262, 3, 1, [2]), (273, 4, 1, [0]), (277, 3, 1, [bands]), (278, 3, 1, [size]),
               (279, 4, 1, [size * size * bands * bits // 8]), *extra]  # fmt: skip
    start = 8 + 2 + 12 * len(entries) + 4
    more, directory = b"", struct.pack("<H", len(entries))
    for tag, kind, count, values in entries:
        packed = struct.pack(f"<{count}{'H' if kind == 3 else 'I'}", *values)
        if len(packed) > 4:
            packed, more = struct.pack("<I", start + len(more)), more + packed
        directory += struct.pack("<HHI", tag, kind, count) + packed.ljust(4, b"\0")
    body = b"II*\0" + struct.pack("<I", 8) + directory + b"\0" * 4
    place = struct.pack("<I", start + len(more))
    body = body.replace(struct.pack("<HHI", 273, 4, 1) + b"\0" * 4, struct.pack("<HHI", 273, 4, 1) + place)
    return body + more + bytes(size * size * bands * bits // 8)


def _png16(channels: int, size: int = 64) -> bytes:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", size, size, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + b"\x0f\xa0" * channels * size for _ in range(size))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _saved(mode: str, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert(mode if mode != "1" else "L").convert(mode).save(stream, kind)
    return stream.getvalue()


def _stack(kind: str) -> bytes:
    stream, first = io.BytesIO(), Image.effect_noise((64, 64), 80).convert("RGB")
    first.save(stream, kind, save_all=True, append_images=[first.rotate(90), first.rotate(180)])
    return stream.getvalue()


def _pyramid() -> bytes:
    """A TIFF with a smaller copy of itself behind it."""
    stream, first = io.BytesIO(), Image.effect_noise((64, 64), 80).convert("RGB")
    small = first.reduce(2)
    small.encoderinfo = {"tiffinfo": {254: 1}}
    first.save(stream, "TIFF", save_all=True, append_images=[small])
    return stream.getvalue()


MISREAD = {
    **{
        f"frames of a {kind}": (_stack(kind), "3 frames, of which training would see the first")
        for kind in ("TIFF", "GIF", "WEBP", "PNG")
    },
    "12 bits in 16, colours": (_png16(3), "more than 8 bits"),
    "12 bits in 16, grey": (_png16(1), "more than 8 bits"),
    "16 bits, grey and alpha": (_png16(2), "more than 8 bits"),
    "16 bits, colours and alpha": (_png16(4), "more than 8 bits"),
    "five bands": (_tiff(5), "5 bands"),
    "four bands, the fourth of unknown meaning": (_tiff(4), "4 bands"),
    "a TIFF of 16 bits a band": (_tiff(3, bits=16), "more than 8 bits"),
    "floats": (_saved("F", "TIFF"), "more than 8 bits"),
    "a PPM of 16 bits": (b"P6 64 64 65535\n" + bytes(64 * 64 * 6), "more than 8 bits"),
    "text": (b"404 not found", "cannot be opened"),
}
READ = {
    **{f"{mode} as {kind}": _saved(mode, kind) for mode, kind in (
        ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"),
        ("RGB", "WEBP"), ("RGB", "BMP"), ("L", "TIFF"))},
    "three bands": _tiff(3),
    "a preview in a photo": _stack("MPO"),
    "a smaller copy": _pyramid(),
    "a PPM of 12 bits": b"P6 64 64 4095\n" + bytes(64 * 64 * 6),
}  # fmt: skip


@pytest.mark.parametrize("name", [*MISREAD, *READ])
def test_images_are_read_right_or_refused_by_name(own, tool, tmp_path, name):
    content, said = MISREAD.get(name) or (READ[name], "")
    made = own("set", images=2)
    path = made.images / made.data["images"][0]["file_name"]
    path.write_bytes(content)
    size, defect, remedy = read_header(path)
    assert said in defect and bool(said) == bool(defect) == bool(remedy)
    code, text = tool("check_dataset", "--json", made.json, "--images", made.images)
    assert code == bool(said) and (not said or f"{path}: {defect}. {remedy}\n" in text)
    if name in ("five bands", "1 as PNG"):
        code, text = tool("demo", "--config-file", TINY, "--input", path, "--output", tmp_path / "out")
        assert code == bool(said) and said in text and "Traceback" not in text


GREY = ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", "[120.0]", "MODEL.PIXEL_STD", "[60.0]", "INPUT.COLOR_AUG_SSD", "False"]


def _run(own: Any, folder: Path, *opts: Any, config: Any = TINY) -> list[Any]:
    train, val = own("train"), own("val", seed=1)
    options = ["--config-file", config, "--train-json", train.json, "--train-images", train.images]
    options += ["--val-json", val.json, "--val-images", val.images, "--name", uuid.uuid4().hex]
    return [*options, "OUTPUT_DIR", folder, "SOLVER.MAX_ITER", 2, "DATALOADER.NUM_WORKERS", 0, *opts]


def test_grey_images_in_training_evaluation_and_pictures(own, tool, tmp_path):
    code, text = tool("train_net", *_run(own, tmp_path / "run", *GREY))
    assert code == 0, text
    config, image = tmp_path / "run" / "config.yaml", own("val", seed=1).images / "00000.png"
    weights = tmp_path / "run" / "model_final.pth"
    for tiles in ("False", "True"):
        evaluated = ["MODEL.WEIGHTS", weights, "TEST.TILES.ENABLED", tiles, "OUTPUT_DIR", tmp_path / "tiles"]
        code, text = tool("train_net", "--config-file", config, "--eval-only", *evaluated)
        assert code == 0 and "AP50" in text, text
    shown = ["--output", tmp_path / "fed.png", "--batches", 1]
    assert tool("visualize_data", "--config-file", config, *shown)[0] == 0
    assert Image.open(tmp_path / "fed.png").mode == "RGB"
    code, text = tool("demo", "--config-file", config, "--input", image, "--output", tmp_path / "drawn")
    assert code == 0 and (tmp_path / "drawn" / "00000.png").is_file(), text


FORMATS = {
    "YUV": (["INPUT.FORMAT", "YUV-BT.601"], "INPUT.FORMAT 'YUV-BT.601' is not supported"),
    "unknown": (["INPUT.FORMAT", "RBG"], "INPUT.FORMAT 'RBG' is not supported"),
    "grey with three means": (["INPUT.FORMAT", "L", "INPUT.COLOR_AUG_SSD", "False"], "MODEL.PIXEL_MEAN has 3 value"),
    "five means": (["MODEL.PIXEL_MEAN", "[1.0, 2.0, 3.0, 4.0, 5.0]"], "MODEL.PIXEL_MEAN has 5 value"),
    "one deviation": (["MODEL.PIXEL_STD", "[1.0]"], "MODEL.PIXEL_STD has 1 value"),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("program", ["train_net", "visualize_data", "demo"])
def test_other_formats_are_refused_at_the_start(own, tool, tmp_path, name, program):
    opts, said = FORMATS[name]
    if program == "demo":
        shown = ["--input", own("val").images, "--output", tmp_path / "out", "--opts", *opts]
        code, text = tool("demo", "--config-file", TINY, *shown)
    else:
        code, text = tool(program, *_run(own, tmp_path / "run", *opts))
    assert code == 1 and f"error: {said}" in text and "Traceback" not in text, text


def test_an_image_beyond_pillows_limit_has_a_key(own, tool, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    code, text = tool("train_net", *_run(own, tmp_path / "run"))
    assert code == 1 and "INPUT.MAX_PIXELS" in text and "TEST.TILES" in text and "Replace the file" not in text
    code, text = tool("train_net", *_run(own, tmp_path / "run", "INPUT.MAX_PIXELS", 64 * 64))
    assert code == 0, text


# ---------------------------------------------------------------------------------- limits, files, missing parts


def test_more_objects_than_coco_counts(own, caplog):
    test = own("test", images=1)
    first = test.data["annotations"][0]
    boxes = [[x, y, 4, 4] for x in range(0, 60, 5) for y in range(0, 60, 5)]
    square = [[x, y, x + w, y, x + w, y + h, x, y + h] for x, y, w, h in boxes]
    test.change(lambda d: d.update(annotations=[
        {**first, "id": i, "bbox": b, "area": 16, "segmentation": [s]}
        for i, (b, s) in enumerate(zip(boxes, square, strict=True))]))  # fmt: skip
    cfg = _config(own("train"), test)
    cfg.TEST.DETECTIONS_PER_IMAGE = 300
    check_datasets(cfg)
    assert "1 image(s) have more than 100 objects of a class (up to 144)" in caplog.text
    assert _perfect(cfg, cfg.DATASETS.TEST[0], test.data)["segm"]["AP"] < 75
    caplog.clear()
    cfg.TEST.MAX_DETECTIONS = 144
    check_datasets(cfg)
    assert "more than" not in caplog.text
    for figures in _perfect(cfg, cfg.DATASETS.TEST[0], test.data).values():
        assert figures["AP"] == figures["AP50"] == pytest.approx(100)


@pytest.mark.parametrize("how", ["above", "absolute", "link", "linked folder"])
def test_files_outside_the_folder_are_not_read(own, tool, tmp_path, how):
    made = own("val", images=2)
    secret = tmp_path / "secret"
    secret.mkdir()
    Image.new("RGB", (64, 64), (250, 0, 0)).save(secret / "secret.png")
    names = {"above": "../../secret/secret.png", "absolute": str(secret / "secret.png"), "link": "link.png",
             "linked folder": "link/secret.png"}  # fmt: skip
    (made.images / "link.png").symlink_to(secret / "secret.png")
    (made.images / "link").symlink_to(secret)
    made.change(lambda d: d["images"][0].update(file_name=names[how]))
    evaluated = ["--config-file", TINY, "--eval-only", "--val-json", made.json, "--val-images", made.images]
    evaluated += ["--name", uuid.uuid4().hex]
    for check in ("True", "False"):
        code, text = tool("train_net", *evaluated, "OUTPUT_DIR", tmp_path / "run", "DATASETS.CHECK", check)
        assert code == 1 and "ALLOW_FILES_OUTSIDE" in text and "Traceback" not in text, text
    allowed = ["OUTPUT_DIR", tmp_path / "run", "DATASETS.ALLOW_FILES_OUTSIDE", "True"]
    assert tool("train_net", *evaluated, *allowed)[0] == 0
    code, text = tool("tile_dataset", "--json", made.json, "--images", made.images, "--output", tmp_path / "tiles")
    assert code == 1 and "lies outside" in text and "Traceback" not in text


@pytest.mark.parametrize("annotations", [None, []], ids=["no list", "an empty list"])
def test_a_test_set_without_annotations_gets_results_and_no_figures(own, tool, tmp_path, annotations):
    made = own("val", images=2).change(lambda d: d.pop("annotations"))
    if annotations is not None:
        made.change(lambda d: d.update(annotations=annotations))
    name = uuid.uuid4().hex
    evaluated = ["--config-file", TINY, "--eval-only", "--val-json", made.json, "--val-images", made.images]
    code, text = tool("train_net", *evaluated, "--name", name, "OUTPUT_DIR", tmp_path)
    assert code == 0 and "nothing is evaluated" in text, text
    results = json.loads((tmp_path / "inference" / f"{name}_val" / "coco_instances_results.json").read_text())
    assert {r["image_id"] for r in results} == {1, 2}


def test_a_training_set_needs_annotations(own, tool, tmp_path):
    made = own("train").change(lambda d: d.pop("annotations"))
    options = ["--config-file", TINY, "--train-json", made.json, "--train-images", made.images]
    code, text = tool("train_net", *options, "--name", uuid.uuid4().hex, "OUTPUT_DIR", tmp_path)
    assert code == 1 and "annotations: is missing" in text


RCNN = [
    "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.DEPTH", 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "INPUT.MIN_SIZE_TEST", 64, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 1e-6, "TEST.DETECTIONS_PER_IMAGE", 20,
    "SEED", 1,
]  # fmt: skip
SMALL = ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)"]
FASTER = model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
MASK = model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
KEYPOINT = model_zoo.get_config_file("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml")


def _boxes_only(own, tmp_path):
    options = _run(own, tmp_path / "run", *RCNN, config=FASTER)
    for name in ("train", "val"):
        Own(tmp_path / name, seed=name == "val").change(_each(lambda a: a.update(segmentation=[])))
    return options


def test_empty_segmentations_train_a_box_detector(own, tool, tmp_path):
    options = _boxes_only(own, tmp_path)
    code, text = tool("train_net", *options)
    assert code == 0 and "bbox" in text and "segm" not in text.split("Evaluation results")[-1], text


@pytest.mark.parametrize("config", [TINY, MASK], ids=["Mask2Former", "Mask R-CNN"])
def test_boxes_alone_do_not_train_masks(own, tool, tmp_path, config):
    options = _boxes_only(own, tmp_path)
    options[1] = config
    code, text = tool("train_net", *(options[:14] if config == TINY else options))
    assert code == 1 and "trained on masks" in text and "Traceback" not in text, text


def test_backslashes_in_file_names_are_named(own):
    made = own("set", images=2).change(lambda d: d["images"][0].update(file_name="images\\00000.png"))
    [problem] = check_coco(made.json, made.images)
    assert problem.level == "error" and "backslashes" in problem.what and "/" in problem.remedy


OTHER_SPELLINGS = {  # on the disk, in the json
    "accents apart": ("u\u0308.png", "\u00fc.png"),
    "escaped": ("a b.png", "a%20b.png"),
    "another ending": ("a.png", "a.jpg"),
    "no ending": ("a.png", "a"),
}


@pytest.mark.parametrize("name", OTHER_SPELLINGS)
def test_files_that_are_there_under_another_spelling_are_named(own, name):
    there, listed = OTHER_SPELLINGS[name]
    made = own("set", images=1)
    (made.images / made.data["images"][0]["file_name"]).rename(made.images / there)
    [problem] = check_coco(made.json, made.change(lambda d: d["images"][0].update(file_name=listed)).images)
    assert problem.what == f"{made.images / listed} is no file, but {made.images / there} is"


def test_a_folder_in_an_images_place_is_no_other_spelling_of_it(own):
    made = own("set", images=1)
    path = made.images / made.data["images"][0]["file_name"]
    path.unlink()
    path.mkdir()
    [problem] = check_coco(made.json, made.images)
    assert problem.what == f"{path} is no file"


JUNK = {
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "a web page": b"<!DOCTYPE html>\n<html>",
    "empty": b"",
}


@pytest.mark.parametrize("said", JUNK)
def test_what_lies_in_place_of_images_and_jsons_is_called_what_it_is(own, tool, tmp_path, said):
    made = own("set", images=1)
    path = made.images / made.data["images"][0]["file_name"]
    path.write_bytes(JUNK[said])
    assert f"cannot be opened as an image (it is {said}" in read_header(path)[1]
    made.json.write_bytes(JUNK[said])
    [problem] = check_coco(made.json, made.images)
    assert problem.what.startswith(f"is {said}")
    code, text = tool("train_net", *_run(lambda *a, **k: made, tmp_path / "run"))
    assert code == 1 and f"{made.json} is {said}" in text and "Traceback" not in text


def _with_keypoints(made: Own, names: list[str]) -> None:
    for category in made.data["categories"]:
        category["keypoints"] = names
    for a in made.data["annotations"]:
        x, y, w, h = map(int, a["bbox"])
        a["keypoints"], a["num_keypoints"] = [x, y, 2, x + w // 2, y + h // 2, 2, x + w // 3, y, 2], 3
    made.write()


KEYPOINTS = {
    "left and right": (["left_ear", "right_ear", "nose"], ["TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]"], ""),
    "no sigmas": (["left_ear", "right_ear", "nose"], [], "there are 17 TEST.KEYPOINT_OKS_SIGMAS"),
    "no names": ([], ["TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]"], "do not name their keypoints"),
    "another number": (["a", "b"], ["TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]"], "has 2 keypoints"),
    "no left and right": (["a", "b", "c"], ["TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]"], "RANDOM_FLIP"),
}


@pytest.mark.parametrize("name", KEYPOINTS)
def test_keypoints_train_as_in_detectron2_or_are_refused(own, tool, tmp_path, name):
    names, opts, said = KEYPOINTS[name]
    options = _run(own, tmp_path / "run", *RCNN, *SMALL, *opts, config=KEYPOINT)
    for split in ("train", "val"):
        _with_keypoints(Own(tmp_path / split, seed=split == "val"), names)
    code, text = tool("train_net", *options)
    assert (code, "Traceback" in text) == (bool(said), False) and said in text, text
    assert ("Evaluation results for keypoints" in text) is (not said)


def test_no_advice_is_given_twice(own, tool):
    made = own("set", images=2)
    (made.images / "00000.png").write_bytes(b"no image")
    code, text = tool("check_dataset", "--json", made.json, "--images", made.images)
    [line] = [line for line in text.splitlines() if "cannot be opened" in line]
    assert code == 1 and ".." not in line and line.count(". ") == 1 and line.endswith("Replace the file.")


CITYSCAPES = {  # what is done to the set -> what is said
    "an image": (lambda root: (root / "truth/b/b_0_0_gtFine_labelIds.png").unlink(), "'b/b_0_0'"),
    "a label image": (lambda root: (root / "image/b/b_0_0_leftImg8bit.png").unlink(), "'b/b_0_0'"),
    "polygons": (lambda root: (root / "truth/b/b_0_0_gtFine_polygons.json").unlink(), "'b/b_0_0'"),
    "labels to train on": (
        lambda root: [path.unlink() for path in root.glob("truth/*/*TrainIds.png")],
        "has no <city>/.*_gtFine_labelTrainIds.png. tools/prepare_cityscapes.py writes them",
    ),
    "a folder's view": (lambda root: (root / "image/.DS_Store").write_bytes(b""), "DS_Store is no image of Cityscapes"),
    "a hidden copy": (lambda root: (root / "image/b/._x.png").write_bytes(b""), "_x.png is no image of Cityscapes"),
}


@pytest.mark.parametrize("case", CITYSCAPES)
@pytest.mark.parametrize("kind", ["sem_seg", "instance", "panoptic_seg"])
def test_cityscapes_without_some_files_is_refused(tmp_path, kind, case):
    pytest.importorskip("cityscapesscripts")
    pytest.importorskip("shapely")
    endings = ("instanceIds.png", "labelIds.png", "labelTrainIds.png", "polygons.json")
    for city in ("a", "b"):
        for part in ("image", "truth"):
            (tmp_path / part / city).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "image" / city / f"{city}_0_0_leftImg8bit.png")
        for ending in endings:
            (tmp_path / "truth" / city / f"{city}_0_0_gtFine_{ending}").write_bytes(b"")
    name = f"cityscapes_{uuid.uuid4().hex}"
    DatasetCatalog.register(name, list)
    folder = "image_root" if kind == "panoptic_seg" else "image_dir"  # as Detectron2 has it
    paths = {folder: str(tmp_path / "image"), "gt_dir": str(tmp_path / "truth")}
    MetadataCatalog.get(name).set(evaluator_type=f"cityscapes_{kind}", **paths)
    cfg = _config(None)
    cfg.DATASETS.REGISTER, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [], (), (name,)
    check_datasets(cfg)
    change, said = CITYSCAPES[case]
    change(tmp_path)
    needless = {("instance", "labels to train on"), ("panoptic_seg", "polygons")}
    with contextlib.nullcontext() if (kind, case) in needless else pytest.raises(DatasetError, match=said):
        check_datasets(cfg)


# ---------------------------------------------------------------------------------- LVIS, panoptic sets


def _as_lvis(made: Own) -> None:
    (made.images / "val2017").mkdir()
    for image in made.data["images"]:
        name = image.pop("file_name")
        (made.images / name).rename(made.images / "val2017" / name)
        image |= {"coco_url": f"http://x/val2017/{name}", "neg_category_ids": [], "not_exhaustive_category_ids": []}
    for category in made.data["categories"]:
        category["frequency"] = "r"


def _numbered(data: dict[str, Any], change: Any) -> None:
    for category in data["categories"]:
        category["id"] = change(category["id"])
    for annotation in data["annotations"]:
        annotation["category_id"] = change(annotation["category_id"])


LVIS = {
    "as published": (lambda d: None, ""),
    "names of files": (
        lambda d: d["images"][0].update(file_name=d["images"][0].pop("coco_url")),
        "lacks a usable coco",
    ),
    "another folder": (lambda d: d["images"][0].update(coco_url="http://x/train2017/00000.png"), "is no file"),
    "classes from 0": (lambda d: _numbered(d, lambda i: i - 1), "from 0 on, are not 1 to 3"),
    "classes with gaps": (lambda d: _numbered(d, lambda i: 2 * i), "from 2 on, are not 1 to 3"),
    "no frequency": (lambda d: d["categories"][0].pop("frequency"), "1 of 3 have no frequency"),
    "an unknown image": (lambda d: d["annotations"][0].update(image_id=99), "image_id 99 is not listed"),
    "an unknown class": (lambda d: d["annotations"][0].update(category_id=99), "category_id 99 is not listed"),
    "no mask": (lambda d: d["annotations"][0].pop("segmentation"), "lacks a usable segmentation"),
    "nothing negative": (lambda d: d["images"][0].pop("neg_category_ids"), "warning.*1 of 2 have no neg_category_ids"),
}


@pytest.mark.parametrize("name", LVIS)
def test_lvis_is_checked_before_training(own, name, tool):
    change, said = LVIS[name]
    made = own("set", images=2)
    _as_lvis(made)
    made.change(change)
    data_set = f"lvis_{uuid.uuid4().hex}"
    DatasetCatalog.register(data_set, list)
    MetadataCatalog.get(data_set).set(evaluator_type="lvis", json_file=str(made.json), image_root=str(made.images))
    found = check_coco(made.json, made.images, Rules(test=True, counted=0, lvis=True))
    assert [str(p) for p in found if "empty class" not in p.kind] == [str(p) for p in found if re.search(said, str(p))]
    assert bool(found) == bool(said)
    cfg = _config(None)
    cfg.DATASETS.REGISTER, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [], (), (data_set,)
    refused = any(problem.level == "error" for problem in found)
    code, text = tool("check_dataset", "--name", data_set, "--test")
    assert code == refused and re.search(said, text) and str(sum(p.level == "error" for p in found)) + " error" in text
    with pytest.raises(DatasetError, match=said) if refused else contextlib.nullcontext():
        check_datasets(cfg)


def _panoptic(folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """A json of one image with two things and stuff, and the ids of its pixels."""
    ids = np.full((64, 64), 70000)
    ids[:20, :20], ids[30:, 30:] = 5, 300
    categories = [{"id": 1, "name": "a", "isthing": 1}, {"id": 9, "name": "b", "isthing": 0}]
    segments = [{"id": number, "category_id": 1 if number < 9999 else 9} for number in (5, 300, 70000)]
    Image.new("RGB", (64, 64)).save(folder / "a.jpg")
    annotation = {"image_id": 1, "file_name": "a.png", "segments_info": segments}
    return {"annotations": [annotation], "categories": categories}, ids


def _segments(data: dict[str, Any]) -> list[dict[str, Any]]:
    return data["annotations"][0]["segments_info"]


def _first(data: dict[str, Any]) -> dict[str, Any]:
    return _segments(data)[0]


PANOPTIC = {
    "as it should be": (lambda d, ids: None, ""),
    "other ids": (
        lambda d, ids: np.add(ids, 7, out=ids),
        r"its colours \(12, 307, 70007; PNG, RGB\) are none of the ids",
    ),
    "an id twice": (
        lambda d, ids: d["annotations"][0]["segments_info"].append(dict(_first(d))),
        "id 5 is listed 2 times",
    ),
    "a segment without pixels": (lambda d, ids: np.copyto(ids, 300, where=ids == 5), "warning.* 1 segment.* no pixel"),
    "pixels without a segment": (
        lambda d, ids: d["annotations"][0]["segments_info"].pop(),
        "warning.* 1 colour.* in no segments_info",
    ),
    "an unknown class": (lambda d, ids: _first(d).update(category_id=7), "category_id 7 is not listed"),
    "a class of another set": (
        lambda d, ids: (d["categories"].append({"id": 7, "name": "c", "isthing": 0}), _first(d).update(category_id=7)),
        "category_id 7 is not a class of the set",
    ),
    "stuff as things": (
        lambda d, ids: d["categories"][1].update(isthing=1),
        "1 of 2 categories are things in the json",
    ),
    "no kinds": (lambda d, ids: d["categories"][1].pop("isthing"), "does not say whether it is a thing"),
    "an image twice": (lambda d, ids: d["annotations"].append(d["annotations"][0]), "is there 2 times"),
    "single objects": (lambda d, ids: d["annotations"][0].pop("segments_info"), "is no panoptic json"),
    "crowds alone": (
        lambda d, ids: [s.update(iscrowd=1) for s in d["annotations"][0]["segments_info"]],
        "all 3 are crowds, of which nothing is learnt",
    ),
    "an id as text": (lambda d, ids: d["annotations"][0].update(image_id="0001"), ""),
    "ids of another source": (
        lambda d, ids: d["annotations"][0].update(image_id="a"),
        r"image_id 1 is not in the panoptic json \(1 such\)",
    ),
}


@pytest.mark.parametrize("name", PANOPTIC)
def test_panoptic_sets_are_checked_before_training(tmp_path, name, caplog, tool):
    change, said = PANOPTIC[name]
    data, ids = _panoptic(tmp_path)
    change(data, ids)
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps(data))
    data_set = f"panoptic_{uuid.uuid4().hex}"

    def records() -> list[dict[str, Any]]:
        files = {"file_name": str(tmp_path / "a.jpg"), "pan_seg_file_name": str(tmp_path / "a.png")}
        return [{**files, "image_id": 1, "segments_info": a["segments_info"]} for a in data["annotations"]]

    DatasetCatalog.register(data_set, records)
    MetadataCatalog.get(data_set).set(
        evaluator_type="coco_panoptic_seg", panoptic_json=str(tmp_path / "a.json"), panoptic_root=str(tmp_path),
        image_root=str(tmp_path), thing_dataset_id_to_contiguous_id={1: 0}, stuff_dataset_id_to_contiguous_id={9: 1},
    )  # fmt: skip
    cfg = _config(None)
    cfg.DATASETS.REGISTER, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [], (data_set,), ()
    with pytest.raises(DatasetError, match=said) if said and "warning" not in said else contextlib.nullcontext():
        check_datasets(cfg)
    warnings = [record.message for record in caplog.records if "warning:" in record.message]
    assert len(warnings) == ("warning" in said) and (not warnings or re.search(said, warnings[0]))
    code, text = tool("check_dataset", "--name", data_set)
    refused = said and "warning" not in said
    assert code == bool(refused) and re.search(said, text) and f"{int(bool(refused))} error(s)" in text
    if name == "an id as text":
        found = [{"id": s["id"], "category_id": 0, "isthing": True} for s in _segments(data)]
        found[2] = {"id": 70000, "category_id": 1, "isthing": False}
        evaluator = PanopticQualityEvaluator(data_set)
        evaluator.process(records(), [{"panoptic_seg": (torch.from_numpy(ids), found)}])
        assert evaluator.evaluate()["panoptic_seg"]["PQ"] == 100


def test_classes_of_an_adapter_whose_training_set_is_elsewhere(own, tmp_path):
    """The adapter says what its indices stand for; the test set of whoever got it has them in another order."""
    test = own("test", seed=1).change(PAIRED["another order"])
    cfg = _config(None, test)
    model = build_model(cfg)
    peft_d2.inject(model, train=["class_embed"])
    peft_d2.save_adapter(model, tmp_path / "adapter", classes=TRAINED)
    assert _perfect(cfg, cfg.DATASETS.TEST[0], test.data)["segm"]["AP"] < 50
    cfg.MODEL.PEFT.WEIGHTS = str(tmp_path / "adapter")
    assert _perfect(cfg, cfg.DATASETS.TEST[0], test.data)["segm"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("name", ["registered by Detectron2", "registered by us"])
def test_an_adapter_of_a_config_knows_its_classes(own, tmp_path, name):
    train = own("train")
    cfg = _config(train)
    if name == "registered by Detectron2":  # which reads the names when it reads the images
        cfg.DATASETS.TRAIN = (f"foreign {cfg.DATASETS.TRAIN[0]}",)
        register_coco_instances(cfg.DATASETS.TRAIN[0], {}, str(train.json), str(train.images))
    cfg.MODEL.PEFT.META_ARCHITECTURE, cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE, "PEFTModel"
    cfg.MODEL.PEFT.TRAIN = ["class_embed"]
    model = build_model(cfg)
    peft_d2.save_adapter(model, tmp_path / "adapter")
    assert classes_of(tmp_path / "adapter") == list(TRAINED)
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    peft_d2.take_adapter(cfg, tmp_path / "model_final.pth", tmp_path / "taken")
    assert classes_of(tmp_path / "taken") == list(TRAINED)


def test_a_json_that_was_edited_in_a_notebook(own):
    """Detectron2's catalogs kept the classes of the first time: objects of one class counted as another."""
    made, name = own("set"), f"field_{uuid.uuid4().hex}"
    register_coco(name, made.json, made.images)
    before = [record["annotations"] for record in DatasetCatalog.get(name)]
    made.change(lambda data: _give_ids(data, triangle=1, square=2, circle=30))
    register_coco(name, made.json, made.images)
    assert MetadataCatalog.get(name).thing_classes == ["triangle", "square", "circle"]
    after = [record["annotations"] for record in DatasetCatalog.get(name)]
    for one, other in zip(sum(before, []), sum(after, []), strict=True):
        assert other["category_id"] == 2 - one["category_id"]


def test_images_that_are_trained_and_tested_on_are_named(own, caplog):
    train, test = own("train"), own("test", seed=1)
    cfg = _config(train, test)
    check_datasets(cfg)
    assert "figures of what was trained on" not in caplog.text
    some = own("some").change(lambda data: data.update(images=data["images"][:2], annotations=[]))
    some.images = train.images
    cfg = _config(train, train, some)
    check_datasets(cfg)
    said = [r.getMessage() for r in caplog.records if "figures of what was trained on" in r.getMessage()]
    assert [re.search(r"(\d) of its (\d) images", line)[0] for line in said] == [
        "4 of its 4 images",
        "2 of its 2 images",
    ]
    assert str(train.images) in said[0]
