"""LoRA against independent oracles: the real ``peft`` package, and the dense formula in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_d2 import peft

hf = pytest.importorskip("peft")


def pair(module: nn.Module, entry: dict[str, Any], config: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    """The same module adapted by us and by ``peft``, with the same random factors."""
    ours = nn.ModuleDict({"m": module}).to(dtype).eval()
    theirs = hf.inject_adapter_in_model(hf.LoraConfig(target_modules=["m"], **config), copy.deepcopy(ours))
    peft.inject(ours, [{"NAME": "lora", "TARGETS": ["m"], **entry}])
    layer = theirs["m"]
    state = peft.adapter_state_dict(ours)
    generator = torch.Generator().manual_seed(3)
    for value in state.values():
        value.add_(0.1 * torch.randn(value.shape, generator=generator).to(value.dtype))
    with torch.no_grad():
        layer.lora_A["default"].weight.data = state["m.lora_a"].clone()
        layer.lora_B["default"].weight.data = state["m.lora_b"].clone()
        if "m.lora_magnitude" in state:
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude.copy_(state["m.lora_magnitude"].view_as(magnitude))
    return ours["m"], layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", ["plain", "rslora", "dora"])
@pytest.mark.parametrize("place", ["linear", "linear without bias", "conv", "strided conv"])
def test_equal_to_the_peft_package(place: str, variant: str, dtype: torch.dtype) -> None:
    module, x = {
        "linear": lambda: (nn.Linear(12, 20), torch.randn(2, 5, 12)),
        "linear without bias": lambda: (nn.Linear(12, 20, bias=False), torch.randn(7, 12)),
        "conv": lambda: (nn.Conv2d(6, 10, 3, padding=1), torch.randn(2, 6, 9, 9)),
        "strided conv": lambda: (nn.Conv2d(6, 10, 3, stride=2, padding=1, bias=False), torch.randn(2, 6, 9, 9)),
    }[place]()
    flag = {"rslora": {"RSLORA": True}, "dora": {"DORA": True}}.get(variant, {})
    theirs_flag = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}.get(variant, {})
    ours, theirs = pair(
        module, {"RANK": 4, "ALPHA": 6, **flag}, {"r": 4, "lora_alpha": 6, "bias": "none", **theirs_flag}, dtype
    )
    x = x.to(dtype)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = ours(first), theirs(second)
    tight = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(a, b, **tight)
    weight = torch.randn_like(a)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    torch.testing.assert_close(first.grad, second.grad, **tight)
    part = ours.peft["default"]["lora"]
    torch.testing.assert_close(part.lora_a.grad, theirs.lora_A["default"].weight.grad, **tight)
    torch.testing.assert_close(part.lora_b.grad, theirs.lora_B["default"].weight.grad, **tight)
    if variant == "dora":
        magnitude = theirs.lora_magnitude_vector["default"].weight.grad
        torch.testing.assert_close(part.lora_magnitude.grad.view_as(magnitude), magnitude, **tight)
    theirs.merge()
    merged = part.effective(ours.weight)
    torch.testing.assert_close(merged, theirs.get_base_layer().weight, **tight)


def test_pissa_starts_on_the_principal_directions_as_peft_does() -> None:
    base = nn.Linear(12, 8)
    ours = nn.ModuleDict({"m": copy.deepcopy(base)})
    theirs = hf.inject_adapter_in_model(
        hf.LoraConfig(target_modules=["m"], r=3, lora_alpha=6, init_lora_weights="pissa"),
        nn.ModuleDict({"m": copy.deepcopy(base)}),
    )["m"]
    peft.inject(ours, [{"NAME": "lora", "TARGETS": ["m"], "RANK": 3, "ALPHA": 6, "INIT": "pissa"}])
    part = ours["m"].peft["default"]["lora"]
    mine = part.lora_b @ part.lora_a
    torch.testing.assert_close(
        mine, theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(base.weight - 2 * mine, theirs.base_layer.weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours["m"].weight, base.weight)  # the stored weight is not touched


def dense_attention(
    module: nn.MultiheadAttention, deltas: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Attention by the book, (L, N, E), with changed weights."""
    if module.in_proj_weight is None:
        weights = {letter: getattr(module, f"{letter}_proj_weight") for letter in "qkv"}
    else:
        weights = dict(zip("qkv", module.in_proj_weight.chunk(3), strict=True))
    weights["out"] = module.out_proj.weight
    weights = {letter: value + deltas.get(letter, 0) for letter, value in weights.items()}
    bias = dict(zip("qkv", module.in_proj_bias.chunk(3), strict=True))
    heads, size = module.num_heads, module.embed_dim // module.num_heads

    def split(x: Tensor, letter: str) -> Tensor:
        return (x @ weights[letter].T + bias[letter]).unflatten(-1, (heads, size)).permute(1, 2, 0, 3)

    scores = split(q, "q") @ split(k, "k").transpose(-1, -2) / math.sqrt(size)
    mixed = (scores.softmax(-1) @ split(v, "v")).permute(2, 0, 1, 3).flatten(2)
    return mixed @ weights["out"].T + module.out_proj.bias


@pytest.mark.parametrize("kind", ["self", "kdim and vdim", "batch first"])
@pytest.mark.parametrize("parts", [["q"], ["k"], ["v"], ["out"], ["q", "v"], ["q", "k", "v", "out"]], ids=",".join)
def test_each_projection_of_an_attention_alone(parts: list[str], kind: str) -> None:
    kdim, vdim = (10, 14) if kind == "kdim and vdim" else (None, None)
    model = nn.ModuleDict({"m": nn.MultiheadAttention(16, 4, kdim=kdim, vdim=vdim, batch_first=kind == "batch first")})
    model = model.double().eval()
    nn.init.normal_(model["m"].in_proj_bias)
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["m"], "PARTS": parts, "RANK": 2, "ALPHA": 3}])
    names = peft.adapter_state_dict(model)
    assert names.keys() == {f"m.{part}.lora_{x}" for part in parts for x in "ab"}
    for value in names.values():
        value.normal_()
    q = torch.randn(5, 3, 16, dtype=torch.float64)
    k = torch.randn(7, 3, kdim or 16, dtype=torch.float64)
    v = torch.randn(7, 3, vdim or 16, dtype=torch.float64)
    if kind == "batch first":
        k = v = q  # the case of torch's fused inference kernel
    deltas = {part: 1.5 * names[f"m.{part}.lora_b"] @ names[f"m.{part}.lora_a"] for part in parts}
    expected = dense_attention(model["m"], deltas, q, k, v)
    inputs = [x.transpose(0, 1) for x in (q, k, v)] if kind == "batch first" else [q, k, v]
    if kind == "batch first":
        inputs = [inputs[0]] * 3
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            out, _ = model["m"](*inputs)
            torch.testing.assert_close(out.transpose(0, 1) if kind == "batch first" else out, expected)
    peft.merge(model)
    merged, _ = model["m"](*inputs)
    torch.testing.assert_close(merged.transpose(0, 1) if kind == "batch first" else merged, expected)


def test_q_and_v_of_an_attention_cost_what_the_formula_says() -> None:
    model = nn.ModuleDict({"m": nn.MultiheadAttention(256, 8)})
    assert peft.inject(model, [{"NAME": "lora", "TARGETS": ["m"], "RANK": 8}]).trainable == 8192


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("parts", [["q"], ["k"], ["v"], ["q", "v"]], ids=",".join)
def test_each_third_of_a_fused_qkv_alone(parts: list[str], dora: bool) -> None:
    model = nn.ModuleDict({"m": nn.Linear(8, 24)}).double()
    entry = {"NAME": "lora", "TARGETS": ["m"], "PARTS": parts, "RANK": 2, "ALPHA": 3, "DORA": dora}
    peft.inject(model, [entry])
    state = peft.adapter_state_dict(model)
    for value in state.values():
        value.normal_()
    weight = model["m"].weight.detach().clone()
    for part in parts:
        rows = slice("qkv".index(part) * 8, "qkv".index(part) * 8 + 8)
        changed = weight[rows] + 1.5 * state[f"m.{part}.lora_b"] @ state[f"m.{part}.lora_a"]
        if dora:
            changed = changed * (state[f"m.{part}.lora_magnitude"] / changed.norm(dim=1))[:, None]
        weight[rows] = changed
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(model["m"](x), x @ weight.T + model["m"].bias)


def test_delta_of_a_normed_convolution_comes_before_its_norm(Conv2d: Any, disturb: Callable) -> None:  # noqa: N803
    norm = nn.BatchNorm2d(6)
    model = (
        nn.ModuleDict({"m": Conv2d(4, 6, 3, padding=1, bias=False, norm=norm, activation=torch.relu)}).double().eval()
    )
    with torch.no_grad():
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["m"], "RANK": 2}])
    disturb(model)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    state = peft.adapter_state_dict(model)
    delta = torch.einsum("or,rikl->oikl", state["m.lora_b"][..., 0, 0], state["m.lora_a"])
    expected = torch.relu(norm(nn.functional.conv2d(x, model["m"].weight + delta, padding=1)))
    torch.testing.assert_close(model["m"](x), expected)
    naive = torch.relu(norm(nn.functional.conv2d(x, model["m"].weight, padding=1)))
    naive = naive + nn.functional.conv2d(x, delta, padding=1)
    assert (naive - expected).abs().max() > 1e-2  # what a wrapper around the module would compute
    peft.merge(model)
    torch.testing.assert_close(model["m"](x), expected)


@pytest.mark.parametrize("module", [nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(4, 4, 3, padding=1, groups=4)])
def test_grouped_convolutions(module: nn.Conv2d, disturb: Callable) -> None:
    model = nn.ModuleDict({"m": module}).eval()
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["m"], "RANK": 2}])
    disturb(model)
    x = torch.randn(1, 4, 6, 6)
    expected = model["m"](x)
    peft.merge(model)
    torch.testing.assert_close(model["m"](x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(peft.MethodError, match="DROPOUT"):
        peft.inject(
            nn.ModuleDict({"m": copy.deepcopy(nn.Conv2d(4, 6, 3, groups=2))}),
            [{"NAME": "lora", "TARGETS": ["m"], "DROPOUT": 0.1}],
        )


def test_subclasses_with_another_forward_are_refused() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(peft.MethodError, match="Scaled is none of"):
        peft.inject(nn.ModuleDict({"m": Scaled(4, 4)}), [{"NAME": "lora", "TARGETS": ["m"]}])


@pytest.mark.parametrize("kind", ["linear", "svd"])
def test_weighted_combination(kind: str, toy: nn.Module, disturb: Callable) -> None:
    entries = [{"NAME": "lora", "TARGETS": ["proj", "qkv", "stem"], "RANK": 3, "ALPHA": 5}]
    peft.inject(toy, entries, ["head"], name="a")
    disturb(toy)
    peft.add_adapter(toy, "b", [{**entries[0], "RANK": 2, "INIT": "pissa"}])
    peft.set_adapter(toy, "b")
    disturb(toy, 0.5)  # type: ignore[call-arg]
    deltas = {}
    for name in "ab":
        parts = {
            m.peft_name: m.peft[name]["lora"] for m in toy.modules() if hasattr(m, "peft_name") and hasattr(m, "peft")
        }
        deltas[name] = {place: part.delta().detach() for place, part in parts.items()}
    head = {name: peft.adapter_state_dict(toy, name)["head.weight"].clone() for name in "ab"}
    with peft.disabled(toy):
        base = toy.head.weight.detach().clone()  # type: ignore[union-attr, operator]
    peft.combine_adapters(toy, {"a": 0.75, "b": -0.5}, "mix", kind, rank=4 if kind == "svd" else None)
    peft.set_adapter(toy, "mix")
    for module in toy.modules():
        if not hasattr(module, "peft"):
            continue
        total = 0.75 * deltas["a"][module.peft_name] - 0.5 * deltas["b"][module.peft_name]
        part = module.peft["mix"]["lora"]
        if kind == "svd":
            u, s, v = torch.linalg.svd(total.flatten(1), full_matrices=False)
            total = (u[:, :4] * s[:4] @ v[:4]).view_as(total)
            assert part.lora_a.shape[0] == 4
        torch.testing.assert_close(part.delta(), total, rtol=1e-4, atol=1e-5)
    expected = base + 0.75 * (head["a"] - base) - 0.5 * (head["b"] - base)
    torch.testing.assert_close(toy.head.weight, expected)  # type: ignore[union-attr]


def test_combinations_that_have_no_sum(toy: nn.Module) -> None:
    peft.inject(toy, [{"NAME": "lora", "TARGETS": ["proj"], "DORA": True}], name="a")
    peft.add_adapter(toy, "b")
    peft.add_adapter(toy, "c", [{"NAME": "adapter", "TARGETS": ["mlp"]}])
    for weights, kind, said in (
        ({"a": 1.0, "b": 1.0}, "linear", "DoRA"),
        ({"a": 1.0, "c": 1.0}, "linear", "same places"),
        ({"c": 1.0}, "svd", "LoRA alone"),
        ({"a": 1.0}, "max", "one of linear, svd"),
        ({"a": math.nan}, "linear", "finite weights"),
        ({"a": "0.5"}, "linear", "finite weights"),
        ({"z": 1.0}, "linear", "no adapter 'z'"),
    ):
        with pytest.raises(peft.InjectionError, match=said):
            peft.combine_adapters(toy, weights, "mix", kind)
    record = peft.get_injection(toy)
    assert record is not None and list(record.adapters) == ["a", "b", "c"]


@pytest.mark.parametrize("variant", [{}, {"DORA": True}, {"INIT": "pissa"}], ids=["plain", "dora", "pissa"])
def test_both_forms_of_a_convolution_compute_the_same(variant: dict[str, Any], disturb: Callable) -> None:
    model = nn.ModuleDict({"m": nn.Conv2d(4, 6, 3, stride=2, padding=1)}).double()
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["m"], "RANK": 2, "ALPHA": 3, **variant}])
    disturb(model)
    part = model["m"].peft["default"]["lora"]
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    runs = []
    for part.in_weight_space in (True, False):
        given = x.clone().requires_grad_()
        model.zero_grad()
        out = model["m"](given)
        out.square().sum().backward()
        runs.append([out, given.grad, *[t.param.grad for t in peft.trained_parameters(model)]])
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("module", "entry", "weight_space"),
    [
        (nn.Conv2d(32, 32, 3), {}, True),
        (nn.Conv2d(64, 256, 1), {}, True),
        (nn.Conv2d(256, 256, 3), {}, False),
        (nn.Conv2d(512, 512, 3), {}, False),
        (nn.Conv2d(128, 128, 3), {"RANK": 64}, True),
        (nn.Conv2d(32, 32, 3), {"DROPOUT": 0.1}, False),
        (nn.Conv2d(32, 32, 3).bfloat16(), {}, False),
        (nn.Conv2d(512, 512, 3, groups=2), {}, True),
    ],
    ids=lambda value: repr(value) if isinstance(value, nn.Module) else "",
)
def test_a_convolution_takes_the_cheaper_form(module: nn.Conv2d, entry: dict[str, Any], weight_space: bool) -> None:
    peft.inject(nn.ModuleDict({"m": module}), [{"NAME": "lora", "TARGETS": ["m"], **entry}])
    assert module.peft["default"]["lora"].in_weight_space is weight_space  # type: ignore[index, union-attr]
