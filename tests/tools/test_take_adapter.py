"""From another trainer's ``model_final.pth`` to an adapter, and back into that codebase without this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2")

import merge_adapter
import take_adapter
import torch

import peft_d2
from peft_d2 import peft
from peft_d2.engine.errors import ConfigError
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
    model = PEFTModel(config())
    with torch.no_grad():
        for item in peft.trained_parameters(model):
            item.param.add_(torch.randn(item.param.shape))
    torch.save({"model": model.state_dict(), "iteration": 9}, "model_final.pth")
    yield model
    META_ARCH_REGISTRY._obj_map.pop("TheirModel", None)


ADDERS = ["field_theirs:add_theirs_config"]


def config(*opts: str, adders: list[str] = ADDERS) -> Any:
    return take_adapter.their_config("config.yaml", adders, opts)


def config_of_theirs() -> Any:
    """As AdelaiDet has it: a config of their own instead of a function that adds keys."""
    from detectron2.config import get_cfg

    cfg = get_cfg()
    sys.modules["field_theirs"].add_theirs_config(cfg)
    return cfg


def plain_outputs(file: str) -> torch.Tensor:
    """What their code computes, without this package, of a config and the checkpoint that it names."""
    Path("plain.py").write_text(PLAIN)
    done = subprocess.run([sys.executable, "plain.py", file, "out.pt"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load("out.pt")


@torch.no_grad()
def test_an_adapter_and_a_checkpoint_for_the_plain_codebase(run: torch.nn.Module, capsys: Any) -> None:
    x = torch.ones(2, 4)
    arguments = ["--config-file", "config.yaml", "--checkpoint", "model_final.pth", "--import", *ADDERS]
    take_adapter.main([*arguments, "--adapter", "adapter", "--merged", "merged.pth"])
    assert capsys.readouterr().out.split() == ["adapter", "merged.pth", "merged.yaml"]
    from detectron2.modeling import META_ARCH_REGISTRY

    model = META_ARCH_REGISTRY.get("TheirModel")(config())
    peft_d2.load_base(model, "base.pth")
    peft_d2.load_adapter(model, "adapter")
    assert torch.equal(model(x), run(x))
    torch.testing.assert_close(plain_outputs("merged.yaml"), run(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_base_and_adapter_are_merged_for_the_plain_codebase(run: torch.nn.Module, capsys: Any) -> None:
    """From the base's config, which knows no adapter, and from the run's."""
    x = torch.ones(2, 4)
    peft_d2.take_adapter(config(), "model_final.pth", "adapter")
    Path("base.yaml").write_text(
        "VERSION: 2\nMODEL: {META_ARCHITECTURE: TheirModel, WEIGHTS: base.pth, DEVICE: cpu, THEIRS: {WIDTH: 6}}\n"
    )
    for file in ("base.yaml", "config.yaml"):
        arguments = ["--config-file", file, "--import", *ADDERS, "--adapter", "adapter", "--output", "whole.pth"]
        print(merge_adapter.merge_adapter(merge_adapter.merge_parser().parse_args(arguments)))
        assert "whole.pth and whole.yaml: base.pth with adapter merged in" in capsys.readouterr().out
        torch.testing.assert_close(plain_outputs("whole.yaml"), run(x), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_checkpoint_of_parallel_or_compiled_training(run: torch.nn.Module, prefix: str) -> None:
    """The base's file is gone by then: all that is needed is in the checkpoint."""
    torch.save({prefix + key: value for key, value in run.state_dict().items()}, "model_final.pth")
    Path("base.pth").rename("kept.pth")
    assert peft_d2.take_adapter(config(), Path("model_final.pth"), Path("adapter")) == ["adapter"]
    model = PEFTModel(config("MODEL.WEIGHTS", "kept.pth", "MODEL.PEFT.WEIGHTS", "adapter"))
    assert torch.equal(model(torch.ones(2, 4)), run(torch.ones(2, 4)))


def test_a_function_that_makes_the_config(run: torch.nn.Module) -> None:
    assert config(adders=[f"{__name__}:config_of_theirs"]) == config()


def test_the_device_of_the_run_stays(run: torch.nn.Module, tmp_path: Path) -> None:
    peft_d2.take_adapter(config("MODEL.DEVICE", "cuda"), "model_final.pth", merged="merged.pth")
    assert "DEVICE: cuda\n" in (tmp_path / "merged.yaml").read_text()


def bottleneck(cfg: Any) -> None:
    cfg.MODEL.PEFT.METHODS = [{"NAME": "adapter", "TARGETS": ["fc"], "REDUCTION": 2}]
    torch.save(PEFTModel(cfg).state_dict(), "model_final.pth")


@pytest.mark.parametrize(
    ("change", "checkpoint", "adapter", "merged", "message"),
    [
        (None, "model_final.pth", "", "", "nothing to write"),
        (
            lambda cfg: cfg.MODEL.update(META_ARCHITECTURE="TheirModel"),
            *("model_final.pth", "a", ""),
            "not in its config",
        ),
        (None, "base.pth", "a", "", "base.pth holds a base alone: 4 of 8 tensors"),
        (None, "nothing.pth", "a", "", "'nothing.pth' do not exist"),
        (None, ".", "a", "", "is a folder"),
        (
            lambda cfg: cfg.MODEL.THEIRS.update(WIDTH=5),
            *("model_final.pth", "a", ""),
            r"fc.weight \(6, 4\) -> \(5, 4\)",
        ),
        (
            lambda cfg: cfg.MODEL.PEFT.METHODS[0].update(RANK=3),
            *("model_final.pth", "a", ""),
            r"other adapters: fc.peft.default.lora.lora_a \(2, 4\), .*\(3, 4\)",
        ),
        (lambda cfg: cfg.MODEL.PEFT.update(TRAIN=[]), *("model_final.pth", "a", ""), "other adapters.*peft_base.head"),
        (bottleneck, "model_final.pth", "a", "m.pth", "no weight can hold"),
        (None, "model_final.pth", "a", "model_final.pth", "is what is read"),
        (None, "model_final.pth", "a", "m.pkl", "Call it .pth"),
        (None, "model_final.pth", "a", "config.pth", "config.yaml is of something else"),
        (None, "model_final.pth", ".", "", "holds '.*', which was not written here"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_leave_everything_as_it_was(
    run: torch.nn.Module, change: Any, checkpoint: str, adapter: str, merged: str, message: str
) -> None:
    cfg = config()
    if change is not None:
        change(cfg)
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.suffix != ".pyc"}
    with pytest.raises(Exception, match=message) as error:
        peft_d2.take_adapter(cfg, checkpoint, adapter, merged)
    assert take_adapter.one_line_errors.__globals__["is_expected"](error.value)
    after = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert before == after


def test_a_config_that_cannot_be_read_is_refused(run: torch.nn.Module) -> None:
    for adders, message in (
        (["nothing:there"], "--import nothing:there: No module named 'nothing'"),
        (["field_theirs"], "--import field_theirs: .*Expected PKG.MOD:FN"),
        ([], "config.yaml: Non-existent config key: MODEL.THEIRS. Name the functions"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(adders=adders)
    with pytest.raises(ConfigError, match="KEY VALUE pairs: Non-existent key: MODEL.THEIR.WIDTH"):
        config("MODEL.THEIR.WIDTH", "5")
    with pytest.raises(ConfigError, match="nothing.yaml"):
        take_adapter.their_config("nothing.yaml", ADDERS)


def test_what_was_trained_is_loaded_whole_or_not_at_all(run: torch.nn.Module) -> None:
    torch.save({"model": {"fc.weight": torch.ones(6, 4)}}, "model_final.pth")
    before = {key: value.clone() for key, value in run.state_dict().items()}
    with pytest.raises(ValueError, match="holds a base alone: 7 of 8 tensors"):
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
