"""The registry entry: errors, other people's loops, and adapters that outlive the loading of base weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import META_ARCH_REGISTRY, build_model

import peft_d2
from peft_d2 import peft
from peft_d2.engine.checkpointer import Checkpointer
from peft_d2.engine.errors import ConfigError
from peft_d2.storage import AdapterFileError, CheckpointError


@pytest.fixture
def adapter(make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path) -> Path:
    """An adapter on the base, with values that no initialisation gives."""
    model = build_model(make_cfg(peft=True))
    Checkpointer(model).load(str(base_weights))
    with torch.no_grad():
        for item in peft.trained_parameters(model):
            item.param.add_(torch.randn_like(item.param), alpha=0.2)
    peft_d2.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def predict(model: torch.nn.Module) -> torch.Tensor:
    image = torch.arange(3 * 64 * 64).reshape(3, 64, 64).float() % 251
    with torch.no_grad():
        return model.eval()([{"image": image, "height": 64, "width": 64}])[0]["instances"].scores


def test_registered_once() -> None:
    peft_d2.register()
    peft_d2.register(upstream_names=True)
    assert META_ARCH_REGISTRY.get("PEFTModel").__name__ == "PEFTModel"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("", "MODEL.PEFT.META_ARCHITECTURE is ''. It must name the model"),
        ("PEFTModel", "MODEL.PEFT.META_ARCHITECTURE is 'PEFTModel'"),
        ("PD2MaskFromer", "'PD2MaskFromer' is not registered; the nearest names are .*PD2MaskFormer"),
    ],
)
def test_base_architecture(make_cfg: Callable[..., Any], base: str, message: str) -> None:
    cfg = make_cfg(peft=True)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PEFT.META_ARCHITECTURE = "PEFTModel", base
    with pytest.raises(ConfigError, match=message):
        build_model(cfg)


def test_nothing_to_inject(make_cfg: Callable[..., Any]) -> None:
    cfg = make_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PEFT.META_ARCHITECTURE = "PEFTModel", "PD2MaskFormer"
    with pytest.raises(ConfigError, match="are all empty"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("{'NAME': 'lora', 'TARGETS': ['qvk']}", "'qvk' matches no .*qkv"),
        ("{'NAME': 'lora', 'TARGETS': ['qkv'], 'RANKS': 3}", "RANKS.*RANK"),
        ("{'NAME': 'lorra', 'TARGETS': ['qkv']}", "lorra.*lora"),
    ],
)
def test_bad_methods(make_cfg: Callable[..., Any], method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(make_cfg("MODEL.PEFT.METHODS", f"[{method}]"))


def test_it_is_the_base_model_itself(make_cfg: Callable[..., Any], base_weights: Path) -> None:
    plain, adapted = build_model(make_cfg()), build_model(make_cfg(peft=True))
    assert isinstance(adapted, type(plain))
    assert set(plain.state_dict()) < set(adapted.state_dict())
    for model in (plain, adapted):
        Checkpointer(model).load(str(base_weights))
    heads = {n: v for n, v in plain.state_dict().items() if "class_embed" in n}  # random, for other classes
    adapted.load_state_dict(heads, strict=False)
    assert torch.equal(predict(plain), predict(adapted))


@pytest.mark.parametrize("methods", [True, False], ids=["named", "from the file"])
def test_other_peoples_loaders_end_with_base_and_adapter(
    make_cfg: Callable[..., Any], base_weights: Path, adapter: Path, methods: bool
) -> None:
    """DetectionCheckpointer and DefaultPredictor load the base after the model was built with its adapter."""
    reference = build_model(make_cfg(peft=True))
    Checkpointer(reference).load(str(base_weights))
    peft_d2.load_adapter(reference, adapter)
    expected = predict(reference)

    cfg = make_cfg("MODEL.PEFT.WEIGHTS", adapter, "MODEL.WEIGHTS", base_weights, peft=methods)
    cfg.DATASETS.TEST = ()
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(base_weights))
    assert torch.equal(predict(model), expected)
    assert torch.equal(predict(DefaultPredictor(cfg).model), expected)
    ours = build_model(cfg)
    Checkpointer(ours).load(str(base_weights))
    assert torch.equal(predict(ours), expected)
    with peft_d2.disabled(ours):
        assert not torch.equal(predict(ours), expected)


def test_another_base_is_refused(
    make_cfg: Callable[..., Any], base_weights: Path, adapter: Path, tmp_path: Path
) -> None:
    state = torch.load(base_weights, weights_only=True)["model"]
    state["backbone.patch_embed.proj.weight"][0] += 1e-3
    other = tmp_path / "other.pth"
    torch.save({"model": state}, other)
    opts = ("MODEL.PEFT.WEIGHTS", adapter, "MODEL.WEIGHTS", other)
    with pytest.raises(AdapterFileError, match="made for another base.*backbone.patch_embed.proj.weight"):
        build_model(make_cfg(*opts))
    allowed = build_model(make_cfg(*opts, "MODEL.PEFT.ALLOW_OTHER_BASE", True))
    Checkpointer(allowed).load(str(other))
    predict(allowed)


def test_another_base_is_not_loaded_into_a_model_that_has_one(
    make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path
) -> None:
    """Also before anything is trained: MODEL.WEIGHTS said which base it is."""
    state = torch.load(base_weights, weights_only=True)["model"]
    state["backbone.patch_embed.proj.weight"][0] += 1e-3
    torch.save({"model": state}, tmp_path / "other.pth")
    model = build_model(make_cfg("MODEL.WEIGHTS", base_weights, peft=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for load in (DetectionCheckpointer(model).load, Checkpointer(model).load):
        with pytest.raises(peft.InjectionError, match="another base.*patch_embed.proj.weight.*load_base"):
            load(str(tmp_path / "other.pth"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_base_at_all_is_refused(make_cfg: Callable[..., Any], adapter: Path) -> None:
    with pytest.raises(AdapterFileError, match="made for another base.*load_base"):
        build_model(make_cfg("MODEL.PEFT.WEIGHTS", adapter))


def test_a_random_base_is_said(make_cfg: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    build_model(make_cfg("SEED", -1, peft=True))
    assert "the base is random and no SEED fixes it" in caplog.text


def test_truncated_adapter(make_cfg: Callable[..., Any], adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(AdapterFileError, match="adapter_model.safetensors"):
        build_model(make_cfg("MODEL.PEFT.WEIGHTS", adapter))


@pytest.mark.parametrize(
    ("weights", "message"),
    [("nowhere.pth", "'nowhere.pth' do not exist"), (".", "is a folder.*MODEL.PEFT.WEIGHTS")],
)
def test_missing_weights(make_cfg: Callable[..., Any], weights: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpointer(build_model(make_cfg(peft=True))).load(weights)


def test_a_random_head_that_is_not_trained_is_refused(make_cfg: Callable[..., Any], base_weights: Path) -> None:
    cfg = make_cfg("MODEL.PEFT.METHODS", "[{'NAME': 'lora', 'TARGETS': ['qkv']}]")
    with pytest.raises(CheckpointError, match="class_embed.*Add .*MODEL.PEFT.TRAIN"):
        Checkpointer(build_model(cfg)).load(str(base_weights))
