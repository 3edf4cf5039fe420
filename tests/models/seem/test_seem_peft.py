"""PEFT on SEEM: the published comparison's parameter counts, and every method by config alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from inspect_targets import describe, inspect_parser

import peft_d2
from peft_d2 import peft
from peft_d2.engine.config import load_config
from peft_d2.engine.factory import build_without_weights
from peft_d2.models import register

from ..conftest import ROOT
from ..test_training import sample, step
from .test_seem import FOCAL_L, FOCAL_T, SMALL, small_seem  # noqa: F401  small_seem is a fixture

# Of Abou Baker et al., MAKE 6(4), 2024: file of configs/peft, reduction, count, % of Focal-T and of Focal-L.
TABLE = [
    ("adapters1", 4, 4_211_200, 2.52, 1.23),
    ("adapters2", 4, 7_372_288, 4.33, 2.13),
    ("adapters3", 4, 10_533_376, 6.08, 3.01),
    ("adapters1", 16, 1_849_600, 1.12, 0.54),
    ("adapters2", 16, 2_649_088, 1.60, 0.77),
    ("adapters3", 16, 3_448_576, 2.07, 1.01),
    ("lora", None, 1_443_328, 0.88, 0.42),
    ("heads", None, 1_050_112, 0.64, 0.31),
]


@pytest.mark.parametrize("config", [FOCAL_T, FOCAL_L])
def test_the_papers_parameters(config: str) -> None:
    """Of the config files as they are, with the other reduction, and of conventional fine-tuning."""
    register()
    path = str(ROOT / "configs" / config)
    base = build_without_weights(load_config(path).cfg)
    large = config == FOCAL_L

    def report(file: str, reduction: int | None = None, train: tuple[str, ...] = ()) -> tuple[int, float]:
        node = load_config(path, str(ROOT / "configs" / "peft" / "seem" / f"{file}.yaml")).cfg.MODEL.PEFT
        methods = [{**method, **({"REDUCTION": reduction} if reduction else {})} for method in node.METHODS]
        found = peft.inject(copy.deepcopy(base), methods, train or tuple(node.TRAIN))
        return found.trainable, float(f"{found.percent:.2f}")

    for file, reduction, count, *percent in TABLE[::3] if large else TABLE:
        assert report(file, reduction) == (count, percent[large]), (file, reduction)
    assert report("conventional") == ((71_185_920, 20.91) if large else (70_448_640, 43.01))
    with_text = report("heads", train=("sem_seg_head",))
    assert with_text == ((134_614_017, 39.55) if large else (133_876_737, 81.73))


def test_the_printed_line() -> None:
    arguments = ["--config-file", str(ROOT / "configs" / FOCAL_T)]
    arguments += ["--peft-config", str(ROOT / "configs" / "peft" / "seem" / "adapters1.yaml")]
    text = describe(inspect_parser().parse_args(arguments))
    assert text.splitlines()[-1] == "4,211,200 of 166,960,113 parameters are trained: 2.52 %."
    assert "adapter on 24 MultiheadAttention" in text


PLACES = [
    "pixel_decoder.transformer.encoder.layers.*.self_attn",
    "transformer_self_attention_layers.*.self_attn",
    "transformer_cross_attention_layers.*.multihead_attn",
]
FFN = ["transformer_ffn_layers.*.{linear1,linear2}", "backbone.layers.*.blocks.*.mlp.fc1"]
SEEN = ["backbone", "sem_seg_head.pixel_decoder", "sem_seg_head.predictor.transformer_*_layers"]
METHODS: dict[str, list[dict[str, Any]]] = {
    "lora": [{"NAME": "lora", "TARGETS": PLACES, "PARTS": ["q", "k", "v", "out"], "RANK": 4}],
    "lora q v": [{"NAME": "lora", "TARGETS": PLACES, "PARTS": ["q", "v"]}],
    "dora": [{"NAME": "lora", "TARGETS": FFN, "DORA": True, "RANK": 2}],
    "cobot": [{"NAME": "lora", "TARGETS": PLACES, "PARTS": ["q", "v"], "RANK": 4, "COBOT": True}],
    "conv lora": [{"NAME": "lora", "TARGETS": ["backbone.layers.*.downsample.proj"], "RANK": 2}],
    "adapter": [{"NAME": "adapter", "TARGETS": PLACES, "NUM": 3, "REDUCTION": 4}],
    "adaptformer": [{"NAME": "adaptformer", "TARGETS": ["transformer_ffn_layers.*"], "BOTTLENECK": 4, "DIM": 32}],
    "mona": [{"NAME": "mona", "TARGETS": ["backbone.layers.*.blocks.*.modulation"], "BOTTLENECK": 8}],
    "bitfit": [{"NAME": "bitfit", "TARGETS": SEEN}],
    "norm": [{"NAME": "norm", "TARGETS": SEEN}],
    "last_blocks": [{"NAME": "last_blocks", "TARGETS": ["backbone.layers.*.blocks.*"], "NUM": 2}],
    "hf": [{"NAME": "hf", "TUNER": "ia3", "TARGETS": FFN[:1]}],
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_by_config_alone(small_seem: Any, tmp_path: Path, name: str) -> None:  # noqa: F811
    """Step 0 gives the results of the base; every trained parameter gets a gradient; the adapter learns."""
    if name == "hf":
        pytest.importorskip("peft")
    peft_d2.register()
    base = small_seem().requires_grad_(False)  # torch convolves with other kernels where a weight is trained
    methods = {"MODEL.PEFT.METHODS": copy.deepcopy(METHODS[name]), "MODEL.PEFT.META_ARCHITECTURE": "PD2SEEM"}
    cfg = with_peft(methods, tmp_path)
    torch.manual_seed(1)
    model = build_model(cfg)
    assert not model.load_state_dict(base.state_dict(), strict=False).unexpected_keys
    inputs = [sample("tensor", 2)]
    with torch.no_grad():
        expected, found = (m.eval()(inputs)[0]["instances"] for m in (base, model))
    exact = name not in ("dora", "bitfit", "norm", "last_blocks")
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0 if exact else 1e-6)
    assert torch.equal(found.pred_masks, expected.pred_masks)
    trained = [t.param for t in peft.trained_parameters(model)]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        step(model, inputs)
        assert all(p.grad is not None for p in trained)
        optimizer.step()
    with torch.no_grad():
        assert not torch.equal(model.eval()(inputs)[0]["instances"].scores, expected.scores)


def with_peft(overrides: dict[str, Any], folder: Path) -> CfgNode:
    pairs = {**SMALL, "MODEL.SEEM.CLASS_VECTORS": str(folder / "vectors.safetensors"), "MODEL.DEVICE": "cpu"}
    pairs |= {"MODEL.META_ARCHITECTURE": "PEFTModel", **overrides}
    return load_config(str(ROOT / "configs" / FOCAL_T), opts=[str(part) for item in pairs.items() for part in item]).cfg
