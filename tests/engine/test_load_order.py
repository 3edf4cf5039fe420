"""A run's adapter gives the run's model, for every kind of PEFT config and every way in which people load it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from torch import Tensor, nn

import peft_d2
from peft_d2 import peft
from peft_d2.engine import launch
from peft_d2.engine.trainer import Trainer

HEADS = "['class_embed']"  # of another class count than the base's
KINDS = {
    "everything": ("[]", "['*']"),
    "heads": ("[]", "['sem_seg_head.predictor']"),
    "a bias": ("[{'NAME': 'bitfit', 'TARGETS': ['backbone']}]", HEADS),
    "norms": ("[{'NAME': 'norm'}]", HEADS),
    "last blocks": ("[{'NAME': 'last_blocks', 'TARGETS': ['backbone.layers.*.blocks.*'], 'NUM': 2}]", HEADS),
    "lora": ("[{'NAME': 'lora', 'RANK': 2, 'TARGETS': ['qkv', 'predictor.*.self_attn']}]", HEADS),
    "pissa": ("[{'NAME': 'lora', 'RANK': 2, 'TARGETS': ['qkv'], 'INIT': 'pissa'}]", HEADS),
    "dora": ("[{'NAME': 'lora', 'RANK': 2, 'TARGETS': ['qkv'], 'DORA': True}]", HEADS),
    "cobot": ("[{'NAME': 'lora', 'RANK': 4, 'TARGETS': ['qkv'], 'PARTS': ['q', 'v'], 'COBOT': True}]", HEADS),
    "adapters": (
        "[{'NAME': 'adapter', 'TARGETS': ['attn']}, {'NAME': 'adaptformer', 'TARGETS': ['mlp'], 'BOTTLENECK': 4},"
        " {'NAME': 'mona', 'TARGETS': ['backbone.layers.1.blocks.*.attn'], 'BOTTLENECK': 4, 'GRID': 'square'}]",
        HEADS,
    ),
    "a tuner of peft": ("[{'NAME': 'hf', 'TUNER': 'ia3', 'TARGETS': ['qkv']}]", HEADS),
}


@pytest.fixture(params=list(KINDS), ids=lambda kind: kind.replace(" ", "-"))
def run(request: pytest.FixtureRequest, make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path) -> Any:
    """The config of a finished run, and its model with values that no initialisation gives."""
    pytest.importorskip("peft")
    methods, train = KINDS[request.param]
    cfg = make_cfg(
        *("MODEL.PEFT.METHODS", methods, "MODEL.PEFT.TRAIN", train, "MODEL.WEIGHTS", base_weights), output=tmp_path
    )
    model = build_model(cfg).eval()
    with torch.no_grad():
        for item in peft.trained_parameters(model):
            item.param.add_(torch.randn_like(item.param), alpha=0.1)
    peft_d2.save_adapter(model, tmp_path / "adapter_final")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    return cfg, model


def predict(model: nn.Module) -> Tensor:
    image = torch.arange(3 * 64 * 64).reshape(3, 64, 64).float() % 251
    with torch.no_grad():
        return model.eval()([{"image": image, "height": 64, "width": 64}])[0]["instances"].scores


def test_the_same_model_in_every_way(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import demo

    cfg, trained = run
    folder = tmp_path / "adapter_final"
    found: dict[str, nn.Module] = {}

    def keep(name: str) -> Any:
        def test_all(config: Any, model: nn.Module) -> dict[str, Any]:
            found[name] = model
            return {}

        return test_all

    loaded = cfg.clone()
    loaded.defrost()
    loaded.MODEL.PEFT.WEIGHTS, loaded.DATASETS.TEST = str(folder), ()
    caplog.set_level(logging.INFO)
    found["build_model"] = build_model(loaded)
    count = len(peft.adapter_state_dict(trained))
    assert f"Adapter {folder}: {count} tensors in effect as 'default'" in caplog.text
    found["DefaultPredictor"] = DefaultPredictor(loaded).model
    found["demo.py"] = demo.Predictor(loaded).model
    found["load_adapter"] = build_model(cfg)
    peft_d2.load_adapter(found["load_adapter"], folder)
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.META_ARCHITECTURE = cfg.MODEL.PEFT.META_ARCHITECTURE
    found["load_base"] = build_model(plain)
    peft_d2.load_base(found["load_base"], cfg.MODEL.WEIGHTS)
    peft_d2.load_adapter(found["load_base"], folder)
    found["DetectionCheckpointer"] = build_model(loaded)
    caplog.clear()
    DetectionCheckpointer(found["DetectionCheckpointer"]).load(cfg.MODEL.WEIGHTS)
    missing = "".join(record.message for record in caplog.records if "not found in the checkpoint" in record.message)
    assert "peft" not in missing and "class_embed" not in missing
    monkeypatch.setattr(Trainer, "test_all", staticmethod(keep("train_net.py --eval-only")))
    opts = ["MODEL.PEFT.WEIGHTS", str(folder), "OUTPUT_DIR", str(tmp_path / "eval")]
    launch.main(["--config-file", str(tmp_path / "config.yaml"), "--eval-only", *opts])

    own, expected = trained.state_dict(), predict(trained)
    for way, model in found.items():
        state = model.state_dict()
        assert state.keys() == own.keys(), way
        random = "peft_base.sem_seg_head.predictor.class_embed"  # the base's head of another class count
        differ = [name for name, value in own.items() if not torch.equal(state[name], value) and random not in name]
        assert not differ, (way, differ[:5])
        assert torch.equal(predict(model), expected), way


def test_detectron2s_trainer_saves_and_resumes(run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its ``model_final.pth`` holds the whole injected model, and is loaded whole."""
    cfg, trained = run
    DetectionCheckpointer(trained, str(tmp_path)).save("model_final")
    fresh = build_model(cfg)
    checkpointer = DetectionCheckpointer(fresh, str(tmp_path))
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=True)
    own = trained.state_dict()
    assert not [name for name, value in fresh.state_dict().items() if not torch.equal(own[name], value)]
    assert "not found in the checkpoint" not in caplog.text and "not used by the model" not in caplog.text
