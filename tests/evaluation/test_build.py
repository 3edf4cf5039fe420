"""Which evaluators a data set gets."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("detectron2", reason="needs Detectron2")

import toy  # noqa: E402
from detectron2.config import CfgNode, get_cfg  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402

from peft_d2.data.config import add_data_config  # noqa: E402
from peft_d2.evaluation.build import build_evaluator  # noqa: E402


def _cfg(architecture, **outputs):
    cfg = get_cfg()
    add_data_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "PEFTModel"
    cfg.MODEL.PEFT = CfgNode({"META_ARCHITECTURE": architecture})
    if outputs:
        cfg.MODEL[{"MaskDINO": "MaskDINO"}.get(architecture, "MASK_FORMER")] = CfgNode({"TEST": outputs})
    return cfg


def _names(evaluator):
    return [type(e).__name__ for e in getattr(evaluator, "_evaluators", [evaluator])]


@pytest.fixture
def name(tmp_path, request):
    """A set that has what every kind needs."""
    made = toy.generate(tmp_path / "set", "day", 2, 0, size=32)
    data = json.loads(made.json.read_text())
    data["annotations"] = [{"image_id": 1, "file_name": "x.png", "segments_info": []}]
    data["categories"] = [{**c, "isthing": 1} for c in data["categories"]]
    (tmp_path / "panoptic.json").write_text(json.dumps(data))
    name = request.node.name
    DatasetCatalog.register(name, lambda: [{"file_name": "a.png", "sem_seg_file_name": "b.png", "image_id": 1}])
    MetadataCatalog.get(name).set(
        json_file=str(made.json), image_root=str(made.images), thing_classes=["a", "b", "c"], ignore_label=255,
        stuff_classes=["a", "b", "c"], thing_dataset_id_to_contiguous_id={1: 0, 2: 1, 3: 2},
        stuff_dataset_id_to_contiguous_id={1: 0, 2: 1, 3: 2}, panoptic_json=str(tmp_path / "panoptic.json"),
        panoptic_root=str(tmp_path),
    )  # fmt: skip
    return name


ALL = {"INSTANCE_ON": True, "SEMANTIC_ON": True, "PANOPTIC_ON": True}


@pytest.mark.parametrize(
    ("kind", "architecture", "outputs", "expected"),
    [
        ("coco", "MaskFormer", ALL, ["FastCOCOEvaluator"]),
        ("coco", "GeneralizedRCNN", {}, ["FastCOCOEvaluator"]),
        ("coco_panoptic_seg", "MaskFormer", ALL, ["SemSegEvaluator", "FastCOCOEvaluator", "PanopticQualityEvaluator"]),
        ("coco_panoptic_seg", "MaskFormer", {**ALL, "SEMANTIC_ON": False},
         ["FastCOCOEvaluator", "PanopticQualityEvaluator"]),
        ("coco_panoptic_seg", "MaskDINO", {**ALL, "SEMANTIC_ON": False},
         ["FastCOCOEvaluator", "PanopticQualityEvaluator"]),
        ("coco_panoptic_seg", "PanopticFPN", {}, ["SemSegEvaluator", "FastCOCOEvaluator", "PanopticQualityEvaluator"]),
        ("coco_panoptic_seg", "GeneralizedRCNN", {}, ["FastCOCOEvaluator"]),
        ("coco_panoptic_seg", "SemanticSegmentor", {}, ["SemSegEvaluator"]),
        ("coco_panoptic_seg", "SomeoneElses", {}, ["SemSegEvaluator", "FastCOCOEvaluator", "PanopticQualityEvaluator"]),
        ("ade20k_panoptic_seg", "MaskFormer", {**ALL, "PANOPTIC_ON": False}, ["SemSegEvaluator", "FastCOCOEvaluator"]),
        ("sem_seg", "MaskFormer", ALL, ["SemSegEvaluator"]),
        ("lvis", "MaskFormer", ALL, ["FastLVISEvaluator"]),
        ("cityscapes_instance", "MaskFormer", ALL, ["CityscapesInstanceEvaluator"]),
        ("cityscapes_panoptic_seg", "MaskFormer", {**ALL, "PANOPTIC_ON": False},
         ["CityscapesInstanceEvaluator", "CityscapesSemSegEvaluator"]),
    ],
)  # fmt: skip
def test_by_metadata_and_outputs(name, tmp_path, kind, architecture, outputs, expected):
    MetadataCatalog.get(name).set(evaluator_type=kind)
    assert _names(build_evaluator(_cfg(architecture, **outputs), name, str(tmp_path / "out"))) == expected


def test_unknown_kind_is_an_error_with_its_remedy(request):
    DatasetCatalog.register(request.node.name, list)
    with pytest.raises(ValueError, match="evaluator_type=.*'coco'"):
        build_evaluator(_cfg("MaskFormer", **ALL), request.node.name, None)
