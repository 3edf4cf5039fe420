"""From another trainer's ``model_final.pth`` to an adapter, and back into that codebase without this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2")

import take_adapter
import torch

import peft_d2
from peft_d2 import peft
from peft_d2.engine.factory import PEFTModel

THEIRS = """
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

def add_theirs_config(cfg):
    cfg.MODEL.THEIRS = type(cfg)()
    cfg.MODEL.THEIRS.WIDTH = 8

@META_ARCH_REGISTRY.register()
class TheirModel(nn.Module):
    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version", 1) < 2:  # renames what an older version saved, as Mask2Former's head does
            for key in [key for key in state_dict if key.startswith(prefix + "fc.")]:
                state_dict[prefix + "renamed." + key] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __init__(self, cfg):
        super().__init__()
        self.fc = nn.Linear(4, cfg.MODEL.THEIRS.WIDTH)
        self.head = nn.Linear(cfg.MODEL.THEIRS.WIDTH, 3)

    def forward(self, x):
        return self.head(self.fc(x).relu())
"""
PLAIN = """
import sys, torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from field_theirs import add_theirs_config
cfg = get_cfg()
add_theirs_config(cfg)
cfg.merge_from_file(sys.argv[1])
model = build_model(cfg)
state = torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"]
model.load_state_dict(state, strict=True)
torch.save(model(torch.ones(2, 4)), sys.argv[2])
assert "peft_d2" not in sys.modules
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A finished run of a codebase that this package knows nothing of, and the model as it was trained."""
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("field_theirs", None)
    (tmp_path / "field_theirs.py").write_text(THEIRS)
    (tmp_path / "config.yaml").write_text(
        "VERSION: 2\nMODEL:\n  META_ARCHITECTURE: PEFTModel\n  WEIGHTS: base.pth\n  DEVICE: cpu\n  THEIRS: {WIDTH: 6}\n"
        "  PEFT:\n    META_ARCHITECTURE: TheirModel\n    METHODS: [{NAME: lora, TARGETS: [fc], RANK: 2}]\n"
        "    TRAIN: [head]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from detectron2.modeling import META_ARCH_REGISTRY

    META_ARCH_REGISTRY._obj_map.pop("TheirModel", None)
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 6), "head": torch.nn.Linear(6, 3)})
    torch.save({"model": base.state_dict()}, "base.pth")
    model = PEFTModel(take_adapter.their_config(arguments()))
    with torch.no_grad():
        for item in peft.trained_parameters(model):
            item.param.add_(torch.randn(item.param.shape))
    torch.save({"model": model.state_dict(), "iteration": 9}, "model_final.pth")
    yield model
    META_ARCH_REGISTRY._obj_map.pop("TheirModel", None)


def config_of_theirs() -> Any:
    """As AdelaiDet has it: a config of their own instead of a function that adds keys."""
    from detectron2.config import get_cfg

    cfg = get_cfg()
    sys.modules["field_theirs"].add_theirs_config(cfg)
    return cfg


def arguments(*more: str) -> Any:
    adders = ["--import", "field_theirs:add_theirs_config"]
    return take_adapter.take_parser().parse_args(
        ["--config-file", "config.yaml", "--checkpoint", "model_final.pth", *adders, *more]
    )


@torch.no_grad()
def test_an_adapter_and_a_checkpoint_for_the_plain_codebase(run: torch.nn.Module, tmp_path: Path) -> None:
    x = torch.ones(2, 4)
    assert take_adapter.take_adapter(arguments("--adapter", "adapter", "--merged", "merged.pth")) == [
        *("adapter", "merged.pth", "merged.yaml")
    ]
    from detectron2.modeling import META_ARCH_REGISTRY

    cfg = take_adapter.their_config(arguments())
    model = META_ARCH_REGISTRY.get("TheirModel")(cfg)
    peft_d2.load_base(model, "base.pth")
    peft_d2.load_adapter(model, "adapter")
    assert torch.equal(model(x), run(x))
    (tmp_path / "plain.py").write_text(PLAIN)
    done = subprocess.run(
        [sys.executable, "plain.py", "merged.yaml", "out.pt"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load("out.pt"), run(x), rtol=0, atol=1e-5)


def test_a_checkpoint_of_parallel_training(run: torch.nn.Module) -> None:
    torch.save({f"module.{key}": value for key, value in run.state_dict().items()}, "model_final.pth")
    take_adapter.take_adapter(arguments("--adapter", "adapter"))
    model = PEFTModel(take_adapter.their_config(arguments("MODEL.PEFT.WEIGHTS", "adapter")))
    assert torch.equal(model(torch.ones(2, 4)), run(torch.ones(2, 4)))


def test_a_function_that_makes_the_config(run: torch.nn.Module) -> None:
    own = take_adapter.take_parser().parse_args(
        ["--config-file", "config.yaml", "--checkpoint", "", "--import", f"{__name__}:config_of_theirs"]
    )
    assert take_adapter.their_config(own) == take_adapter.their_config(arguments())


def test_the_device_of_the_run_stays(run: torch.nn.Module, tmp_path: Path) -> None:
    take_adapter.take_adapter(arguments("--merged", "merged.pth", "MODEL.DEVICE", "cuda"))
    assert "DEVICE: cuda\n" in (tmp_path / "merged.yaml").read_text()


def test_refusals(run: torch.nn.Module) -> None:
    with pytest.raises(take_adapter.ConfigError, match="nothing to write"):
        take_adapter.take_adapter(arguments())
    with pytest.raises(take_adapter.ConfigError, match="--import nothing:there: No module named 'nothing'"):
        take_adapter.their_config(arguments("--import", "nothing:there"))
    with pytest.raises(take_adapter.ConfigError, match="not in its config"):
        take_adapter.their_config(arguments("MODEL.META_ARCHITECTURE", "TheirModel"))
    torch.save({"model": {"fc.weight": torch.ones(6, 4)}}, "model_final.pth")
    before = {key: value.clone() for key, value in run.state_dict().items()}
    with pytest.raises(ValueError, match="was not written of this model with this adapter: 7 of 8 tensors"):
        peft_d2.load_trained(run, "model_final.pth")
    assert all(torch.equal(value, before[key]) for key, value in run.state_dict().items())
    with pytest.raises(peft.InjectionError, match="inject the model as it was trained"):
        peft_d2.load_trained(torch.nn.Linear(2, 2), "model_final.pth")


def test_the_lean_config_holds_one_node_of_ours() -> None:
    from detectron2.config import get_cfg

    cfg, plain = get_cfg(), get_cfg()
    peft_d2.add_config(cfg, models=False)
    del cfg.MODEL["PEFT"]
    assert cfg == plain
