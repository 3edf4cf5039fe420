"""The DaViT backbones: outputs of the published ones, attention against plain sums in float64, stochastic depth."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from peft_d2.models import add_models_config, register
from peft_d2.models.backbones.davit import ChannelAttention, DaViT, Residual, WindowAttention

from ..conftest import GOLDENS
from .test_focalnet import same_maps, same_shapes

SMALL = {"DIM_EMBED": [8, 8, 16, 16], "NUM_HEADS": [1, 2, 2, 4], "NUM_GROUPS": [2, 1, 4, 2], "DEPTHS": [1, 1, 2, 1]}


def config(**davit: Any) -> CfgNode:
    register()
    cfg = get_cfg()
    add_models_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "PD2DaViT"
    cfg.MODEL.BACKBONE.DAVIT.merge_from_other_cfg(CfgNode(davit))
    return cfg


@pytest.mark.parametrize("kind", ["d3", "d5"])
def test_outputs_are_the_published_ones(golden: Any, filler: ModuleType, kind: str) -> None:
    recipe, expected = golden("davit_tiny"), np.load(GOLDENS / "davit_tiny.npz")
    published = recipe["kinds"][kind]
    model = build_backbone(config(**published["davit_cfg"])).eval()
    assert filler.fill(model) == published["state_dict"]
    for name, value in model.state_dict().items():
        if name.endswith(("fc2.weight", "attn.fn.proj.weight")):
            value.mul_(0.25)
    for item in recipe["inputs"]:
        prefix = f"{kind}.{item['tag']}."
        maps = {key.removeprefix(prefix): expected[key] for key in expected.files if key.startswith(prefix)}
        same_maps(model, filler.image(item["seed"], item["height"], item["width"]), maps)
    same_shapes(model, published)


def plain(x: Tensor, module: Any, heads: int) -> tuple[np.ndarray, ...]:
    """q, k and v (tokens, heads, channels of a head) of x (tokens, C), in float64 NumPy."""
    weight, bias = module.qkv.weight.detach().numpy(), module.qkv.bias.detach().numpy()
    both = x.numpy() @ weight.T + bias
    return tuple(part.reshape(len(x), heads, -1) for part in np.split(both, 3, axis=1))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits)
    return powers / powers.sum()


@torch.no_grad()
def test_window_attention_is_softmax_attention_inside_each_window() -> None:
    module = WindowAttention(6, n_heads=2, window=3).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    padded = torch.zeros(2, 6, 6, 6, dtype=torch.float64)
    padded[:, :4, :5] = x
    expected = np.zeros((2, 6, 6, 6))
    for n in range(2):
        for top in (0, 3):
            for left in (0, 3):
                q, k, v = plain(padded[n, top : top + 3, left : left + 3].reshape(9, 6), module, 2)
                for i in range(9):
                    for h in range(2):
                        weights = softmax(np.array([q[i, h] @ k[j, h] for j in range(9)]) / np.sqrt(3))
                        row = sum(weights[j] * v[j, h] for j in range(9))
                        expected[n, top + i // 3, left + i % 3, 3 * h : 3 * h + 3] = row
    expected = expected @ module.proj.weight.numpy().T + module.proj.bias.numpy()
    np.testing.assert_allclose(module(x).numpy(), expected[:, :4, :5], atol=1e-12)


@torch.no_grad()
def test_channel_attention_is_softmax_attention_among_the_channels_of_a_group() -> None:
    module = ChannelAttention(6, n_groups=2).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    expected = np.zeros((2, 20, 6))
    for n in range(2):
        q, k, v = plain(x[n].reshape(20, 6), module, 2)
        for g in range(2):
            for i in range(3):
                weights = softmax(np.array([q[:, g, i] @ k[:, g, j] for j in range(3)]) / np.sqrt(20))
                expected[n, :, 3 * g + i] = sum(weights[j] * v[:, g, j] for j in range(3))
    expected = expected @ module.proj.weight.numpy().T + module.proj.bias.numpy()
    np.testing.assert_allclose(module(x).numpy(), expected.reshape(2, 4, 5, 6), atol=1e-12)


def test_stochastic_depth_is_in_every_attention_and_mlp_and_grows() -> None:
    model = DaViT(config(**SMALL, DROP_PATH_RATE=0.9))
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, StochasticDepth)}
    assert all(rate == 0 for name, rate in rates.items() if ".conv" in name)
    assert [rate for name, rate in rates.items() if ".ffn." in name] == pytest.approx([i / 10 for i in range(10)])
    assert [rate for name, rate in rates.items() if "_attn." in name] == pytest.approx([i / 10 for i in range(10)])


@torch.no_grad()
def test_stochastic_depth_drops_a_branch_whole_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    block = Residual(nn.LayerNorm(4), nn.Linear(4, 4), drop_path=0.25).train()
    x = torch.randn(1, 3, 3, 4)
    found = block(x.expand(64, -1, -1, -1))
    kept = x[0] + block.fn(block.norm(x[0])) / 0.75
    is_kept = torch.tensor([torch.allclose(row, kept, atol=1e-6) for row in found])
    is_dropped = torch.tensor([torch.equal(row, x[0]) for row in found])
    assert (is_kept ^ is_dropped).all() and 36 < is_kept.sum() < 60


@pytest.mark.parametrize("changes", [{"CONV_AT_ATTN": False}, {"CONV_AT_FFN": False}, {"WINDOW_SIZE": 4}])
def test_options(changes: dict[str, Any]) -> None:
    model = DaViT(config(**SMALL, **changes, OUT_FEATURES=["res3", "res4"]))
    outputs = model(torch.randn(1, 3, 64, 96))
    assert [tuple(f.shape) for f in outputs.values()] == [(1, 8, 8, 12), (1, 16, 4, 6)]
    names = {name.split(".")[4] for name, _ in model.named_parameters() if name.startswith("blocks")}
    left_out = {"CONV_AT_ATTN": "conv1", "CONV_AT_FFN": "conv2"}
    assert names == {"conv1", "window_attn", "channel_attn", "conv2", "ffn"} - {left_out.get(key) for key in changes}


def test_lists_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"DAVIT\.DEPTHS is \[.*\]; it should be a list of 4 entries, as DIM_EMBED"):
        DaViT(config(**{**SMALL, "DEPTHS": [1, 1, 2]}))


def test_checkpointing_changes_memory_alone() -> None:
    models = [DaViT(config(**SMALL, ENABLE_CHECKPOINT=saving)).train() for saving in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    image = torch.randn(2, 3, 32, 32)
    gradients = []
    for model in models:
        torch.manual_seed(1)
        model(image)["res5"].square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
