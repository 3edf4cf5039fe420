"""Adapter folders that peft_d2 wrote at commit 4941f4b, before its files were rearranged, load and compute the same.

There is one folder for each kind of adapter in fixtures/, and in outputs.json what each model computed then. `python
-m tests.storage.test_written_before <folder>` writes them anew; do that for a new kind only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peft_d2

FIXTURES = Path(__file__).with_name("fixtures")


class Base(nn.Module):
    """Image (N, 3, 8, 8) -> scores (N, 16, 3), through every kind of module that a method adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.stem_norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)
        for number, tensor in enumerate(self.state_dict().values()):
            if tensor.is_floating_point():  # exact in every build of torch, so that the fingerprint is the same
                tensor.copy_(((torch.arange(tensor.numel()) * 37 + number) % 17 - 8).view(tensor.shape) / 32)
        self.stem_norm.running_var.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).flatten(2).transpose(1, 2)
        x = self.norm(x + self.attention(x, x, x)[0])
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        return self.head(x + self.mlp(x))


def lora(*targets: str, **keys: Any) -> dict[str, Any]:
    return {"NAME": "lora", "TARGETS": list(targets), "RANK": 4, "ALPHA": 6, **keys}


KINDS: dict[str, list[dict[str, Any]]] = {
    "lora": [lora("proj", "mlp.*", RANK_PATTERN={"mlp.0": 2}, ALPHA_PATTERN={"mlp.2": 3})],
    "lora_rs": [lora("proj", RSLORA=True)],
    "lora_conv": [lora("stem")],
    "lora_attention": [lora("attention", PARTS=["q", "v", "out"])],
    "lora_fused": [lora("qkv", PARTS=["q", "v"])],
    "lora_pissa": [lora("proj", "stem", INIT="pissa")],
    "dora": [lora("proj", "stem", DORA=True)],
    "lora_cobot": [lora("proj", "mlp.*", COBOT=True)],
    "conv_lora": [{"NAME": "conv_lora", "TARGETS": ["qkv"], "PARTS": ["q", "v"], "EXPERTS": 2, "GRID": "square"}],
    "adapter": [{"NAME": "adapter", "TARGETS": ["mlp", "stem"], "NUM": 2, "REDUCTION": 2}],
    "adaptformer": [{"NAME": "adaptformer", "TARGETS": ["mlp"], "BOTTLENECK": 4}],
    "adaptformer_cobot": [{"NAME": "adaptformer", "TARGETS": ["mlp", "proj"], "BOTTLENECK": 4, "COBOT": True}],
    "mona": [{"NAME": "mona", "TARGETS": ["mlp"], "BOTTLENECK": 4, "GRID": "square"}],
    "hf_ia3": [{"NAME": "hf", "TUNER": "ia3", "TARGETS": ["proj"]}],
    "bitfit": [{"NAME": "bitfit", "TARGETS": ["attention", "proj"]}],
    "norm": [{"NAME": "norm", "TARGETS": ["**"]}],
    "last_blocks": [{"NAME": "last_blocks", "TARGETS": ["mlp.*"], "NUM": 1}],
    "several": [lora("proj"), {"NAME": "adapter", "TARGETS": ["mlp", "proj"]}, {"NAME": "norm", "TARGETS": ["norm"]}],
}


def image() -> Tensor:
    return torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8).sin()


def write(folder: Path) -> None:
    outputs = {}
    for kind, methods in KINDS.items():
        torch.manual_seed(0)
        model = Base().eval()
        peft_d2.inject(model, methods, train=["head"])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn(parameter.shape)
            outputs[kind] = model(image())[0, ::5].tolist()
        peft_d2.save_adapter(model, folder / kind)
    (folder / "outputs.json").write_text(json.dumps(outputs, indent=1) + "\n")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_written_before_gives_the_same_model(kind: str) -> None:
    if kind == "hf_ia3":
        pytest.importorskip("peft")
    expected = torch.tensor(json.loads((FIXTURES / "outputs.json").read_text())[kind])
    model = Base().eval()
    assert not torch.allclose(model(image())[0, ::5], expected, atol=1e-2)
    peft_d2.load_adapter(model, FIXTURES / kind)
    with torch.no_grad():
        assert torch.allclose(model.eval()(image())[0, ::5], expected, atol=1e-5)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
