"""The examples run as they are, made small by the options that they take."""

from __future__ import annotations

import runpy
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from peft_d2 import peft

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.ROI_HEADS.NUM_CLASSES": "3",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "8",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "32",
    "MODEL.RESNETS.DEPTH": "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "64",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "DATALOADER.NUM_WORKERS": "0",
    "SOLVER.IMS_PER_BATCH": "2",
    "SOLVER.MAX_ITER": "2",
    "SOLVER.BASE_LR": "1e-6",  # random weights under frozen norms give huge features
    "SEED": "1",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> toy.ToySet:
    return toy.generate(tmp_path_factory.mktemp("data"), sorted(toy.DOMAINS)[0], images=4, seed=0, size=64)


def main_of(name: str) -> Callable[..., Any]:
    return runpy.run_path(str(EXAMPLES / name))["main"]


def zoo_model(opts: list[str]) -> torch.nn.Module:
    from detectron2 import model_zoo
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    cfg.merge_from_list(opts)
    return build_model(cfg)


def kinds(model: torch.nn.Module) -> set[str]:
    return {item.kind for item in peft.trained_parameters(model)}


def moved(model: torch.nn.Module) -> bool:
    """Whether an injected part has left its start, at which every second factor is 0."""
    return any(bool(t.param.any()) for t in peft.trained_parameters(model) if t.name.endswith(("lora_b", "up.weight")))


def test_plain_script(data: toy.ToySet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("detectron2")
    weights = tmp_path / "base.pth"
    opts = [item for pair in {**SMALL, "MODEL.WEIGHTS": str(weights)}.items() for item in pair]
    torch.save({"model": zoo_model(opts).state_dict()}, weights)
    model = main_of("plain_script.py")(str(data.json), str(data.images), str(tmp_path / "new" / "run"), *opts)
    assert "lora on" in capsys.readouterr().out
    assert kinds(model) == {"injected", "full"} and moved(model)
    stored = torch.load(tmp_path / "new" / "run" / "model_final.pth", weights_only=True)["model"]
    found = model.state_dict()
    assert found.keys() == stored.keys()
    assert [name for name, value in found.items() if not torch.equal(value, stored[name])] == []


def test_registry_config(data: toy.ToySet, tmp_path: Path) -> None:
    pytest.importorskip("detectron2")
    opts = [item for pair in SMALL.items() for item in pair]
    model = main_of("registry_config.py")(str(data.json), str(data.images), str(tmp_path / "new" / "run"), *opts)
    assert type(model).__name__ == "GeneralizedRCNN"
    assert kinds(model) == {"injected", "full"} and moved(model)


VITDET = """
    import torch
    from detectron2 import model_zoo
    from detectron2.config import LazyCall as L
    from detectron2.solver.build import get_default_optimizer_params
    from analyze_peft import random_sample

    torch.manual_seed(0)
    model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    model.backbone.net.update(img_size=64, embed_dim=32, depth=2, num_heads=2, window_size=2, window_block_indexes=[0])
    model.backbone.update(out_channels=32, square_pad=64)
    model.proposal_generator.head.in_channels = 32
    for part in (model.roi_heads.box_head, model.roi_heads.mask_head):
        part.conv_dims, part.input_shape.channels = [32, 32], 32
    model.roi_heads.box_head.fc_dims = [32]
    model.roi_heads.box_predictor.input_shape.channels = 32
    model.roi_heads.update(num_classes=3, batch_size_per_image=8)
    train = dict(device="cpu", init_checkpoint="", max_iter=2)
    optimizer = L(torch.optim.AdamW)(params=L(get_default_optimizer_params)(base_lr=1e-2), lr=1e-2)
    dataloader = dict(train=[[random_sample(64, 3)]] * 3)
"""


def test_lazy_config(tmp_path: Path) -> None:
    config = pytest.importorskip("detectron2.config")
    if not hasattr(config, "LazyConfig"):
        pytest.skip("this Detectron2 is older than LazyConfig and ViTDet, which came after 0.5")
    if not hasattr(pytest.importorskip("detectron2.modeling"), "SimpleFeaturePyramid"):
        pytest.skip("this Detectron2 has no ViTDet, which came after 0.6")
    pytest.importorskip("timm", reason="Detectron2's ViT takes its MLP from timm")
    (tmp_path / "vitdet.py").write_text(textwrap.dedent(VITDET))
    model = main_of("lazy_config.py")(str(tmp_path / "vitdet.py"), str(tmp_path), "train.max_iter=1")
    assert kinds(model) == {"injected", "full"} and moved(model)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_any_model(tmp_path: Path) -> None:
    model, fresh = main_of("any_model.py")(str(tmp_path))
    images = torch.rand(2, 3, 32, 32)
    assert moved(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), fresh.eval()(images))


def test_a_method_of_ones_own() -> None:
    from peft_d2.peft.methods import METHODS

    try:
        model = main_of("extending/my_method.py")()
        [name] = peft.adapter_state_dict(model)
        assert name == "0.gain" and peft.adapter_state_dict(model)[name].abs().max() > 0
        with peft.disabled(model):
            plain = model(torch.ones(1, 4))
        assert not torch.equal(plain, model(torch.ones(1, 4)))
    finally:
        METHODS.pop("gain")


def test_a_backbone_of_ones_own() -> None:
    config = EXAMPLES.parent / "configs" / "coco" / "instance" / "mask2former_r50.yaml"
    model = main_of("extending/my_backbone.py")(str(config))
    assert sum("lora" in name for name in peft.adapter_state_dict(model)) == 8  # A and B of four stages
    with torch.no_grad():
        [result] = model.eval()([{"image": torch.zeros(3, 64, 64), "height": 64, "width": 64}])
    assert result["instances"].image_size == (64, 64)


def test_a_data_set_of_ones_own(tmp_path: Path) -> None:
    import numpy as np
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from PIL import Image

    labels = np.zeros((20, 30), dtype=np.uint8)
    labels[2:8, 3:9], labels[10:15, 12:25] = 1, 2
    Image.fromarray(labels).save(tmp_path / "a_mask.png")
    Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    example = runpy.run_path(str(EXAMPLES / "extending" / "my_dataset.py"))
    example["register"]("of_ones_own", str(tmp_path))
    try:
        [record] = DatasetCatalog.get("of_ones_own")
        assert [entry["bbox"] for entry in record["annotations"]] == [[3, 2, 9, 8], [12, 10, 25, 15]]
        assert Path(record["file_name"]).name == "a.png" and (record["height"], record["width"]) == (20, 30)
    finally:
        DatasetCatalog.remove("of_ones_own")
        MetadataCatalog.remove("of_ones_own")
