"""What a forward pass shows of outputs whose width or layout modules do not tell, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peft_d2
from peft_d2 import peft
from peft_d2.peft.outputs import read_output
from peft_d2.peft.probe import watch
from peft_d2.peft.targets import ModelIndex

# A small model of each kind that timm has
TIMM: dict[str, dict[str, Any]] = {
    "tf_efficientnet_lite0": {},
    "convnext_atto": {},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "embed_dim": 48},
    "hiera_tiny_224": {"stages": (1, 1, 1, 1)},
    "maxvit_rmlp_pico_rw_256": {"depths": (1, 1, 1, 1)},
    "resnet18": {},
    "resnet26t": {},
    "vit_tiny_patch16_224": {"depth": 1},
    "vit_small_patch16_dinov3": {"depth": 1},
    "swinv2_cr_tiny_224": {"depths": (1, 1, 1, 1), "embed_dim": 48},
    "fastvit_t8": {"layers": (1, 1, 1, 1)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "edgenext_xx_small": {"depths": (1, 1, 1, 1)},
}


class Somebodys(nn.Module):
    """Tells nothing of itself: a width that depends on its input, tensors that change their layout, counters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4, stride=4)
        self.mixer = Mixer()
        self.gate = nn.SiLU()
        self.head = nn.Linear(24, 5)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        self.last = image
        self.seen += random.random() + np.random.rand() + float(torch.rand(()))
        return self.head(self.gate(self.mixer(self.stem(image))).mean((1, 2)))


class Mixer(nn.Module):
    """(N, C, H, W) -> (N, H, W, 2 C)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,oc->nhwo", x, self.weight)


@pytest.mark.parametrize("name", TIMM)
def test_what_modules_are_sure_of_is_what_a_pass_shows(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, **TIMM[name])
    targets = [t for t in ModelIndex.of(model).targets.values() if t.name and not isinstance(t.module, nn.ModuleList)]
    seen = watch(model, {target.name: target.module for target in targets})
    reads = {target.name: read_output(target) for target in targets}
    shown = {name: seen.channels(name, read.widths, read.first) for name, read in reads.items()}
    wrong = {
        name: (read.widths, read.first, shown[name])
        for name, read in reads.items()
        if read.is_sure and shown[name] and {shown[name][0]} != read.widths  # type: ignore[index]
    }
    assert not wrong and sum(value is not None for value in shown.values()) > 0.8 * len(targets)
    for blocks in (name for name in reads if name.endswith(("blocks.0", "layer2.0", "stages.1", "layers.1"))):
        width, first = shown[blocks] or (0, False)
        assert all(shape[1 if first and len(shape) > 2 else -1] == width for shape, _ in seen.shapes[blocks])


ENTRIES = [
    {"NAME": "adapter", "TARGETS": ["mixer"]},
    {"NAME": "adapter", "TARGETS": ["gate"], "NUM": 2},
    {"NAME": "adaptformer", "TARGETS": ["gate"], "COBOT": True},
    {"NAME": "mona", "TARGETS": ["mixer"], "BOTTLENECK": 4},
]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry['NAME']} on {entry['TARGETS'][0]}")
def test_somebodys_model(entry: dict[str, Any], tmp_path: Any, disturb: Any) -> None:
    """Injected without being told anything, live, saved, and loaded without another pass."""
    model, image = Somebodys().eval(), torch.randn(2, 3, 16, 24)
    other = copy.deepcopy(model)
    peft_d2.inject(model, [entry])
    [stored] = peft.get_injection(model).current.methods  # type: ignore[union-attr]
    assert stored["OUTPUTS"] == {entry["TARGETS"][0]: "24 last"}
    peft_d2.prove_live(model, image)
    disturb(model)
    peft_d2.save_adapter(model, tmp_path / "a")
    other.stem.forward = None  # type: ignore[assignment]  # a pass would fail
    peft_d2.load_adapter(other, tmp_path / "a")
    del other.stem.forward
    assert torch.equal(other(image), model(image))
    peft_d2.inject(third := copy.deepcopy(Somebodys()), [{**entry, "DIM": 24, "LAYOUT": "last"}])
    assert third.calls == 0


def test_a_pass_leaves_nothing_behind() -> None:
    model = Somebodys().train()
    model.gate.eval()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[union-attr]
    before = {**vars(model)}
    assert watch(model, {"gate": model.gate}).shapes["gate"] == {((1, 16, 24, 24), (64, 96))}
    assert {key: value for key, value in vars(model).items()} == before and not hasattr(model, "last")
    assert float(model.seen) == 0 and model.training and not model.gate.training  # type: ignore[arg-type]
    assert not any(module._forward_hooks for module in model.modules())
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    assert torch.equal(states[2], torch.get_rng_state())


class Needs(nn.Module):
    """Takes what no image is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Somebodys()

    def forward(self, image: Tensor, scale: dict[str, float]) -> Tensor:
        return self.inner(image * scale["by"])


def test_an_example_where_none_can_be_made_up() -> None:
    model, entry = Needs(), {"NAME": "adapter", "TARGETS": ["mixer"]}
    with pytest.raises(peft.MethodError, match="mixer .Mixer.*set DIM, and LAYOUT; or give inject an example.*scale"):
        peft_d2.inject(model, [entry])
    assert peft.get_injection(model) is None
    peft_d2.inject(model, [entry], example=(torch.zeros(1, 3, 8, 12), {"by": 2.0}))
    peft.add_adapter(model, "second", [{**entry, "NUM": 2}], example=(torch.zeros(1, 3, 8, 12), {"by": 2.0}))
    assert peft.adapter_state_dict(model, "second")["inner.mixer.adapters.1.down.weight"].shape == (6, 24)


def test_one_module_with_two_widths_is_named() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.drop = nn.Linear(4, 8), nn.Linear(8, 4), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.two(self.drop(self.one(x))))

    with pytest.raises(peft.MethodError, match=r"drop .*set DIM.*gave \[.*(8\).*4\)|4\).*8\))"):
        peft_d2.inject(Twice(), [{"NAME": "adapter", "TARGETS": ["drop"]}])


@pytest.mark.parametrize("value", ["40", "first 40", "0 last", "40 middle"])
def test_outputs_that_are_none(value: str) -> None:
    with pytest.raises(peft.MethodError, match="OUTPUTS"):
        peft_d2.inject(Somebodys(), [{**ENTRIES[0], "OUTPUTS": {"mixer": value}}])


def test_a_detector_shows_its_own_blocks() -> None:
    """Detectron2's kind of input, from the model's pixels and divisibility; blocks with both kinds of layers."""
    pytest.importorskip("detectron2")
    pytest.importorskip("timm")
    from detectron2.modeling import build_model

    from peft_d2.engine.config import load_config

    root = Path(__file__).resolve().parents[2]
    keys = ["MODEL.TIMM.NAME", "convnext_atto", "MODEL.TIMM.KWARGS", "{depths: [1, 1, 1, 1]}"]
    peft_d2.register()
    model = build_model(load_config(str(root / "configs/nuclei/efficientnet/model.yaml"), opts=keys).cfg)
    peft_d2.inject(model, [{"NAME": "adapter", "TARGETS": ["backbone.net.stages.*.blocks.*"]}])
    [stored] = peft.get_injection(model).current.methods  # type: ignore[union-attr]
    widths = [40, 80, 160, 320]
    assert stored["OUTPUTS"] == {f"backbone.net.stages.{i}.blocks.0": f"{w} first" for i, w in enumerate(widths)}
    image = torch.zeros(3, 64, 96)
    peft.prove_live(model, lambda model: list(model.backbone(image[None]).values()))
