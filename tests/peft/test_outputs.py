"""Adapters, AdaptFormer and Mona: their formulas written out again in float64, where they sit, and how wide they
are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_d2 import peft


class Named(NamedTuple):
    out: Tensor
    rest: int


class Returns(nn.Module):
    """A linear layer that returns what it is told to."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.linear(x))


def affine(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def chain(state: dict[str, Tensor], place: str, count: int, h: Tensor) -> Tensor:
    """h_i = h_(i-1) + up(relu(down(h_(i-1)))), by the book."""
    for i in range(count):
        h = h + affine(state, f"{place}.adapters.{i}.up", affine(state, f"{place}.adapters.{i}.down", h).clamp(min=0))
    return h


@pytest.mark.parametrize("count", [1, 2, 3])
def test_chain_sits_before_residual_and_norm(count: int, toy: nn.Module, disturb: Callable) -> None:
    layer = toy.layers[0].double()  # type: ignore[union-attr, index]
    model = nn.ModuleDict({"layer": layer})
    peft.inject(model, [{"NAME": "adapter", "TARGETS": ["self_attn"], "NUM": count}])
    disturb(model)
    state = peft.adapter_state_dict(model)
    assert state["layer.self_attn.adapters.0.down.weight"].shape == (4, 16)
    x = torch.randn(5, 2, 16, dtype=torch.float64)
    with peft.disabled(model):
        s = layer.self_attn(x, x, x)[0]
    expected = F.layer_norm(x + chain(state, "layer.self_attn", count, s), (16,), layer.norm.weight, layer.norm.bias)
    torch.testing.assert_close(layer(x), expected)


def test_after_the_dropout_and_after_the_attention_are_one_place_without_dropout(toy: nn.Module) -> None:
    x = torch.randn(5, 2, 16)
    outputs = []
    for target in ("self_attn", "dropout"):
        torch.manual_seed(1)
        layer = type(toy.layers[0])(16)  # type: ignore[index]
        model = nn.ModuleDict({"layer": layer})
        peft.inject(model, [{"NAME": "adapter", "TARGETS": [target]}])
        torch.manual_seed(2)
        for trained in peft.trained_parameters(model):
            nn.init.normal_(trained.param)
        outputs.append(layer(x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "form", [lambda y: y, lambda y: (y, 3), lambda y: Named(y, 3)], ids=["tensor", "tuple", "named tuple"]
)
def test_outputs_that_can_be_adapted(form: Callable[[Tensor], Any], disturb: Callable) -> None:
    model = nn.ModuleDict({"m": Returns(form)})
    peft.inject(model, [{"NAME": "adapter", "TARGETS": ["m"]}])
    disturb(model)
    x = torch.randn(2, 8)
    out = model["m"](x)
    first = out if isinstance(out, Tensor) else out[0]
    torch.testing.assert_close(first, chain(peft.adapter_state_dict(model), "m", 1, model["m"].linear(x)))
    assert type(out) is type(form(x)) and (isinstance(out, Tensor) or out[1] == 3)


@pytest.mark.parametrize("form", [lambda y: {"res2": y}, lambda y: [y], lambda y: None, lambda y: (3, y)])
def test_outputs_that_cannot_are_named(form: Callable[[Tensor], Any]) -> None:
    model = nn.ModuleDict({"m": Returns(form)})
    peft.inject(model, [{"NAME": "adapter", "TARGETS": ["m"]}])
    with pytest.raises(peft.MethodError, match="^m returns .*choose a module inside"):
        model["m"](torch.randn(2, 8))


def wide(**attributes: int) -> nn.Module:
    module = nn.Identity()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 12), (2, 4)),
        (nn.LayerNorm((5, 12)), (2, 5, 12)),
        (nn.Conv2d(4, 12, 1), (2, 4, 3, 5)),
        (nn.BatchNorm2d(12), (2, 12, 3, 5)),
        (nn.GroupNorm(3, 12), (2, 12, 3, 5)),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU()), (2, 4)),
        (nn.Sequential(nn.Conv2d(4, 12, 1), nn.ReLU()), (2, 4, 3, 5)),
        (nn.TransformerEncoderLayer(12, 2), (2, 5, 12)),
        (wide(d_model=12), (2, 12)),
        (wide(out_channels=12), (2, 12)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_width_and_layout_are_read_off_the_module(module: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.ModuleDict({"m": module}).eval()
    x = torch.randn(shape)
    expected = module(x)
    peft.inject(model, [{"NAME": "adapter", "TARGETS": ["m"], "REDUCTION": 3}])
    assert peft.adapter_state_dict(model)["m.adapters.0.down.weight"].shape == (4, 12)
    torch.testing.assert_close(model["m"](x), expected)


def test_unknown_widths_are_asked_for_and_wrong_ones_are_named() -> None:
    entry = {"NAME": "adapter", "TARGETS": ["act"]}
    model = nn.Module()
    model.act = nn.GELU()
    with pytest.raises(peft.MethodError, match=r"act \(GELU\).*set DIM"):
        peft.inject(model, [entry])
    model.norm1, model.norm2 = nn.LayerNorm(8), nn.LayerNorm(16)
    with pytest.raises(peft.MethodError, match="8 or 16; set DIM"):
        peft.inject(model, [entry])
    peft.inject(model, [{**entry, "DIM": 8}])
    model.act(torch.randn(2, 8))
    with pytest.raises(peft.MethodError, match=r"act: its output is \(2, 16\).*8 channels on the last axis"):
        model.act(torch.randn(2, 16))


def test_adaptformer_goes_beside_what_keeps_its_shape(disturb: Callable) -> None:
    entry, x = {"NAME": "adaptformer", "TARGETS": ["re:.*"], "BOTTLENECK": 2}, torch.randn(2, 4, 6, 6)
    kept, others = nn.Conv2d(4, 4, 3, padding=1), [nn.Conv2d(4, 8, 1), nn.Conv2d(4, 4, 2, stride=2), nn.Linear(4, 6)]
    for module in others:
        with pytest.raises(peft.MethodError, match="cannot go on 0,.*this module's output has another shape"):
            peft.inject(nn.Sequential(module), [{**entry, "TARGETS": ["0"]}])
    model = nn.ModuleList([kept, *others])
    assert [place.name for place in peft.inject(model, [{**entry, "TARGETS": ["re:[0-3]"]}]).places] == ["0"]
    pool = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.MaxPool2d(2)))
    peft.inject(pool, [{**entry, "TARGETS": ["re:0"]}])
    with pytest.raises(peft.MethodError, match=r"0 makes \(2, 4, 3, 3\) of \(2, 4, 6, 6\): AdaptFormer adds .*input"):
        pool(x)
    wide = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    peft.inject(wide, [{**entry, "TARGETS": ["re:0"]}])
    with pytest.raises(peft.MethodError, match=r"0: its input is \(2, 3, 6, 6\), but the adapter .* 4 channels"):
        wide(x[:, :3])


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Conv2d(3, 8, 3), torch.randn(2, 3, 6, 7)),
        (nn.Conv2d(3, 8, 3), torch.randn(2, 3, 6, 7).to(memory_format=torch.channels_last)),
        (nn.Conv2d(3, 8, 3), torch.randn(0, 3, 6, 7)),
        (nn.Conv1d(3, 8, 3), torch.randn(2, 3, 6)),
        (nn.Conv3d(3, 8, 3), torch.randn(2, 3, 4, 6, 5)),
        (nn.BatchNorm1d(8), torch.randn(5, 8)),
    ],
    ids=["image", "channels last", "no image", "sequence", "volume", "vectors"],
)
def test_channels_first_is_a_chain_over_channels(module: nn.Module, x: Tensor, disturb: Callable) -> None:
    model = nn.ModuleDict({"m": module}).double().eval()
    peft.inject(model, [{"NAME": "adapter", "TARGETS": ["m"], "NUM": 2}])
    disturb(model)
    runs = []
    for by_hand in (True, False):
        given = x.double().requires_grad_()
        state = {name: t.detach().requires_grad_() for name, t in peft.adapter_state_dict(model).items()}
        if by_hand:
            with peft.disabled(model):
                out = chain(state, "m", 2, model["m"](given).movedim(1, -1)).movedim(-1, 1)
        else:
            out = model["m"](given)
            state = {t.name: t.param for t in peft.trained_parameters(model)}
        runs.append([out, *torch.autograd.grad(out.square().sum(), [given, *state.values()])])
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-10)


def test_channels_first_copies_no_image(operations: Callable) -> None:
    model = nn.ModuleDict({"m": nn.Conv2d(3, 16, 1)})
    peft.inject(model, [{"NAME": "adapter", "TARGETS": ["m"], "NUM": 2}])
    x = torch.randn(2, 3, 12, 10)
    with operations() as seen:
        model["m"](x).sum().backward()
    copies = ("clone", "copy_", "_to_copy", "contiguous")
    assert not [shape for name, shape in seen.seen if name in copies and math.prod(shape) >= 2 * 16 * 120]


def test_mask2former_counts_of_the_paper() -> None:
    """24 places of width 256: one, two, three adapters at r 4 and 16, as in the published table without its heads."""
    heads = 329_988 + 257 * 80
    table = {
        (1, 4): 1_144_660,
        (2, 4): 1_938_772,
        (3, 4): 2_732_884,
        (1, 16): 553_684,
        (2, 16): 756_820,
        (3, 16): 959_956,
    }
    for (count, reduction), expected in table.items():
        with torch.device("meta"):
            model = nn.ModuleList(nn.MultiheadAttention(256, 8) for _ in range(24))
            entry = {"NAME": "adapter", "TARGETS": ["re:\\d+"], "NUM": count, "REDUCTION": reduction}
            assert peft.inject(model, [entry]).trainable == expected - heads


@pytest.mark.parametrize("layout", ["first", "last"])
def test_mona_by_the_book(layout: str, disturb: Callable) -> None:
    module = nn.Conv2d(3, 8, 1) if layout == "first" else nn.Linear(3, 8)
    model = nn.ModuleDict({"m": module}).double().eval()
    peft.inject(model, [{"NAME": "mona", "TARGETS": ["m"], "BOTTLENECK": 4}])
    disturb(model)
    s = {name.removeprefix("m.mona_"): value for name, value in peft.adapter_state_dict(model).items()}
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    x = x if layout == "first" else x.movedim(1, -1)
    with peft.disabled(model):
        y = module(x)
    h = y.movedim(1, -1) if layout == "first" else y
    normed = F.layer_norm(h, (8,), s["norm.weight"], s["norm.bias"])
    u = affine(s, "down", normed * s["gain"] + h * s["skip"]).movedim(-1, 1)
    scales = [
        F.conv2d(u, s[f"convs.{i}.weight"], s[f"convs.{i}.bias"], padding=k // 2, groups=4)
        for i, k in enumerate((3, 5, 7))
    ]
    f = u + sum(scales) / 3
    g = f + F.conv2d(f, s["mix.weight"], s["mix.bias"])
    expected = h + affine(s, "up", F.gelu(g.movedim(1, -1)))
    torch.testing.assert_close(module(x), expected.movedim(-1, 1) if layout == "first" else expected)


def test_mona_needs_to_know_the_image_grid() -> None:
    class SwinBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(8, 8)
            self.H = self.W = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x)

    block = SwinBlock()
    peft.inject(block, [{"NAME": "mona", "TARGETS": ["mlp"], "BOTTLENECK": 4}])
    tokens = torch.randn(1, 6, 8)
    with pytest.raises(peft.MethodError, match="H and W that fit"):
        block(tokens)
    block.H, block.W = 2, 3
    block(tokens)


@pytest.mark.parametrize(
    "entry",
    [
        {"NAME": "mona", "TARGETS": ["mlp"], "BOTTLENECK": 4, "DROPOUT": 0.0},
        {"NAME": "conv_lora", "TARGETS": ["mlp"], "RANK": 2, "EXPERTS": 2},
    ],
    ids=lambda entry: entry["NAME"],
)
def test_tokens_before_the_image_go_without_convolutions(entry: dict[str, Any], disturb: Callable) -> None:
    """A class, registers or queries: the image's tokens come out as if they were alone, the others by themselves."""
    block = nn.Module()
    block.mlp, block.H, block.W, block.num_prefix_tokens = nn.Linear(8, 8), 2, 3, 0
    block.double().eval()
    peft.inject(block, [entry])
    disturb(block)
    tokens = torch.randn(2, 4 + 6, 8, dtype=torch.float64)
    alone = block.mlp(tokens[:, 4:])
    block.num_prefix_tokens = 4
    found = block.mlp(tokens)
    torch.testing.assert_close(found[:, 4:], alone)
    if entry["NAME"] == "mona":
        with peft.disabled(block):
            h = block.mlp(tokens[:, :4])
        s = {name.removeprefix("mlp.mona_"): value for name, value in peft.adapter_state_dict(block).items()}
        normed = F.layer_norm(h, (8,), s["norm.weight"], s["norm.bias"])
        inner = F.gelu(affine(s, "down", normed * s["gain"] + h * s["skip"]))
        torch.testing.assert_close(found[:, :4], h + affine(s, "up", inner))
    else:
        with peft.disabled(block):
            torch.testing.assert_close(found[:, :4], block.mlp(tokens[:, :4]))
    block.num_prefix_tokens = 3
    with pytest.raises(peft.MethodError, match="H and W that fit"):
        block.mlp(tokens)


def test_selecting_methods_train_exactly_their_parameters(toy: nn.Module) -> None:
    def trained(*entries: dict[str, Any]) -> set[str]:
        peft.inject(toy, list(entries))
        names = {t.name for t in peft.trained_parameters(toy)}
        peft.remove(toy)
        return names

    everything = dict(toy.named_parameters())
    assert trained({"NAME": "bitfit"}) == {name for name in everything if name.endswith("bias")}
    norms = trained({"NAME": "norm", "TARGETS": ["blocks", "stem"]})
    assert norms == {
        f"{p}.{w}"
        for p in ("stem.norm", *[f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)])
        for w in ("weight", "bias")
    }
    last = trained({"NAME": "last_blocks", "TARGETS": ["layers.*", "blocks.*"], "NUM": 3})
    assert last == {name for name in everything if name.startswith(("layers.1.", "blocks."))}
    for entry, said in (
        ({"NAME": "last_blocks", "TARGETS": ["blocks.*"], "NUM": 3}, "NUM is 3, but TARGETS choose 2"),
        ({"NAME": "norm", "TARGETS": ["neck"]}, "no norm"),
        ({"NAME": "bitfit", "TARGETS": ["neck.1"]}, "no biases"),
    ):
        with pytest.raises(peft.MethodError, match=said):
            peft.inject(toy, [entry])
