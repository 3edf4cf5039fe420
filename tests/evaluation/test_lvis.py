"""LVIS figures. One oracle is the official package; the other pycocotools on a set rewritten so that COCO's rules
become LVIS's.

A class that an image says nothing about: its predictions there are removed, as are empty ones. A class that is not
exhaustively annotated in an image: a crowd over the whole image takes up what matches nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="needs Detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402

from peft_d2.evaluation.lvis import FastLVISEvaluator, figures, lvis_evaluation  # noqa: E402

from .worlds import encoded, random_world  # noqa: E402

SIZE = 120


def evaluate_lvis(data, results, task):
    return figures(lvis_evaluation(data, results, task))


def _federated(seed, images=8, detections=60):
    """A random world with LVIS's extra fields."""
    data, results = random_world(images, detections, size=SIZE, seed=seed, classes=5)
    rng = np.random.default_rng(seed + 100)
    for annotation in data["annotations"]:
        annotation["iscrowd"] = 0
    for index, category in enumerate(data["categories"]):
        category["frequency"] = "rcf"[index % 3]
    ids = [c["id"] for c in data["categories"]]
    for image in data["images"]:
        present = {a["category_id"] for a in data["annotations"] if a["image_id"] == image["id"]}
        absent = [c for c in ids if c not in present]
        image["neg_category_ids"] = [c for c in absent if rng.random() < 0.5]
        image["not_exhaustive_category_ids"] = [c for c in sorted(present) if rng.random() < 0.3]
    return data, results


def _oracle(data, results, task):
    data = copy.deepcopy(data)
    present = {(a["image_id"], a["category_id"]) for a in data["annotations"]}
    judged = present | {(i["id"], c) for i in data["images"] for c in i["neg_category_ids"]}
    everywhere = encoded(np.ones((SIZE, SIZE), dtype=bool))
    for image in data["images"]:
        for category in image["not_exhaustive_category_ids"]:
            data["annotations"].append({
                "id": len(data["annotations"]) + 1, "image_id": image["id"], "category_id": category, "iscrowd": 1,
                "area": SIZE * SIZE, "bbox": [-SIZE, -SIZE, 3 * SIZE, 3 * SIZE], "segmentation": everywhere,
            })  # fmt: skip
    drop = "bbox" if task == "segm" else "segmentation"
    kept = [r for r in results if (r["image_id"], r["category_id"]) in judged and r["bbox"][2] * r["bbox"][3] > 0]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = data
        truth.createIndex()
        found = truth.loadRes([{k: copy.deepcopy(v) for k, v in r.items() if k != drop} for r in kept])
        evaluation = COCOeval(truth, found, task)
        evaluation.params.maxDets = [300]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0]
    kinds = np.array([c["frequency"] for c in data["categories"]])

    def mean(part):
        return 100 * (part[part > -1].mean() if (part > -1).any() else -1)

    overall = precision[..., 0]
    figures = {"AP": overall, "AP50": overall[:1], "AP75": overall[5:6]}
    figures |= {f"AP{k[0]}": precision[..., i] for i, k in enumerate(("small", "medium", "large"), 1)}
    figures |= {f"AP{k}": overall[:, :, kinds == k] for k in "rcf"}
    return {name: mean(part) for name, part in figures.items()}


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_figures(task, seed):
    data, results = _federated(seed)
    ours, expected = evaluate_lvis(copy.deepcopy(data), results, task), _oracle(data, results, task)
    assert ours.keys() == expected.keys()
    assert list(ours.values()) == pytest.approx(list(expected.values()), abs=1e-9)
    assert 5 < ours["AP"] < 95


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_figures_of_the_official_package(task, seed, tmp_path, monkeypatch):
    """On rare, common and frequent classes, negative and not exhaustively annotated ones."""
    lvis = pytest.importorskip("lvis", reason="needs the package lvis: pip install --no-deps lvis")
    monkeypatch.setattr(np, "float", float, raising=False)  # NumPy 1.24 removed the alias
    data, results = _federated(seed, images=12, detections=80)
    assert all(
        any(image[key] for image in data["images"]) for key in ("neg_category_ids", "not_exhaustive_category_ids")
    )
    (tmp_path / "lvis.json").write_text(json.dumps(data))
    drop = "bbox" if task == "segm" else "segmentation"
    truth = lvis.LVIS(str(tmp_path / "lvis.json"))
    found = lvis.LVISResults(truth, [{k: v for k, v in r.items() if k != drop} for r in copy.deepcopy(results)])
    evaluation = lvis.LVISEval(truth, found, task)
    evaluation.run()
    ours = evaluate_lvis(copy.deepcopy(data), results, task)
    assert ours == pytest.approx({name: 100 * evaluation.results[name] for name in ours}, abs=1e-6)
    assert len(set(ours.values())) >= 8 and 5 < ours["AP"] < 95


def test_federation_matters():
    """Otherwise the test above could not tell LVIS's rules from COCO's."""
    data, results = _federated(0)
    plain = copy.deepcopy(data)
    ids = [c["id"] for c in plain["categories"]]
    for image in plain["images"]:
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = ids, []
    assert evaluate_lvis(plain, results, "segm")["AP"] < evaluate_lvis(data, results, "segm")["AP"] - 1


def test_only_the_best_300_of_an_image_count():
    data, results = _federated(1, images=1, detections=400)
    best = sorted(results, key=lambda r: -r["score"])[:300]
    assert evaluate_lvis(copy.deepcopy(data), results, "bbox") == evaluate_lvis(copy.deepcopy(data), best, "bbox")


def test_evaluator(tmp_path, request):
    data, _ = _federated(2)
    path = tmp_path / "lvis.json"
    (tmp_path / "val2017").mkdir()
    for image in data["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image['id']}.png"
        image.pop("file_name", None)
        Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "val2017" / f"{image['id']}.png")
    path.write_text(json.dumps(data))
    name = request.node.name
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(json_file=str(path), evaluator_type="lvis", image_root=str(tmp_path))
    evaluator = FastLVISEvaluator(name, output_dir=str(tmp_path / "out"), report=True)
    evaluator.reset()
    ids = sorted(c["id"] for c in data["categories"])
    for image in data["images"]:
        objects = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        instances = Instances((SIZE, SIZE))
        boxes = np.array([a["bbox"] for a in objects], dtype=np.float32)
        instances.pred_boxes = Boxes(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1))
        instances.scores = Boxes(boxes).tensor.new_full((len(objects),), 0.5)
        instances.pred_classes = Boxes(boxes).tensor.new_tensor([ids.index(a["category_id"]) for a in objects]).long()
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    results = evaluator.evaluate()
    assert list(results) == ["bbox"]
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert {"APr", "APc", "APf"} < set(results["bbox"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "-100" not in page  # there are no large objects
    assert "<th>APr</th>" in page and page.count("<figcaption>val2017/") == 12  # the best 6 and the worst 6 of 8 images
