"""LoRA's linear layer in weight space against the branch, autograd's numerical checks, and a count of its work."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peft_d2
from peft_d2 import peft
from peft_d2.peft.lora import linear
from peft_d2.peft.lora.linear import low_rank_linear, saves_passes


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([(), (1,), (5,), (2, 3), (2, 0, 3)]),
    inputs=st.integers(1, 6),
    out=st.integers(1, 6),
    rank=st.integers(1, 4),
    bias=st.booleans(),
    learns=st.lists(st.booleans(), min_size=5, max_size=5).filter(any),
    seed=st.integers(0, 2**31),
)
def test_gradients(
    rows: tuple[int, ...], inputs: int, out: int, rank: int, bias: bool, learns: list[bool], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(*rows, inputs), (out, inputs), (out,), (rank, inputs), (out, rank)]
    made = [torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes]
    x, weight, shift, a, b = (t.requires_grad_(learn) for t, learn in zip(made, learns, strict=True))
    if not bias:
        shift = None
    expected = x @ (weight + b @ a).T + (0 if shift is None else shift)
    torch.testing.assert_close(low_rank_linear(x, weight, shift, a, b), expected)
    if expected.requires_grad and expected.numel():
        assert torch.autograd.gradcheck(low_rank_linear, (x, weight, shift, a, b))


def test_second_derivatives_and_transforms() -> None:
    x, weight, a, b = (torch.randn(size, dtype=torch.float64) for size in ((4, 3), (5, 3), (2, 3), (5, 2)))
    leaves = (x.requires_grad_(), weight, None, a.requires_grad_(), b.requires_grad_())
    assert torch.autograd.gradgradcheck(low_rank_linear, leaves)
    frozen = (x, weight, None, a.detach(), b)
    assert torch.autograd.gradgradcheck(low_rank_linear, frozen)
    for_one = torch.func.grad(lambda row: low_rank_linear(row, weight, None, a, b).square().sum())
    torch.testing.assert_close(torch.func.vmap(for_one)(x), torch.stack([for_one(row) for row in x]))


ENTRIES = {
    "plain": {},
    "rslora": {"RSLORA": True},
    "COBOT": {"COBOT": True, "RANK": 4},
    "q and v": {"PARTS": ["q", "v"]},
    "k": {"PARTS": ["k"]},
    "A frozen": {"FREEZE_A": True},
    "q and v, A frozen": {"PARTS": ["q", "v"], "FREEZE_A": True},
    "q, k, v with COBOT": {"PARTS": ["q", "k", "v"], "COBOT": True, "RANK": 4},
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_equals_the_branch(
    entry: dict[str, Any], bias: bool, monkeypatch: pytest.MonkeyPatch, disturb: Callable
) -> None:
    model = nn.ModuleDict({"m": nn.Linear(6, 18, bias=bias)}).double()
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["m"], "RANK": 2, "ALPHA": 3, **entry}])
    disturb(model)
    runs = []
    for chosen in (True, False):
        used: list[Tensor] = []
        monkeypatch.setattr(linear, "saves_passes", lambda *_, chosen=chosen: chosen)
        monkeypatch.setattr(linear, "low_rank_linear", lambda *x, used=used: used.append(x[0]) or low_rank_linear(*x))
        x = torch.randn(2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model.zero_grad()
        out = model["m"](x)
        out.square().sum().backward()
        assert bool(used) is chosen
        runs.append([out, x.grad, *[t.param.grad for t in peft.trained_parameters(model)]])
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_the_output_may_be_changed_in_place(entry: dict[str, Any], bias: bool, disturb: Callable) -> None:
    """As nn.ReLU(inplace=True) after a layer does, or timm's Swin v2, which adds the bias itself."""
    model = nn.ModuleDict({"m": nn.Linear(6, 18, bias=bias)}).double()
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["m"], "RANK": 2, **entry}])
    disturb(model)
    x = torch.randn(3, 40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert saves_passes(x, model["m"].weight, torch.empty(2, 6, dtype=torch.float64))
    runs = []
    for relu in (torch.relu, torch.relu_):
        model.zero_grad()
        out = relu(model["m"](x))
        out.sum().backward()
        runs.append([out, *[t.param.grad for t in peft.trained_parameters(model)]])
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("entry", [{"DORA": True}, {"INIT": "pissa"}, {"DROPOUT": 0.5}], ids=str)
def test_what_needs_the_branch_keeps_it(entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "low_rank_linear", lambda *_: pytest.fail("used in spite of the entry"))
    for parts in ([], ["q"]):
        model = nn.ModuleDict({"m": nn.Linear(4, 12)})
        peft.inject(model, [{"NAME": "lora", "TARGETS": ["m"], "RANK": 2, "PARTS": parts, **entry}])
        x = torch.randn(100, 4)
        assert saves_passes(x, model["m"].weight, torch.empty(2, 4))
        model["m"](x)


def test_many_rows_and_full_precision_are_where_it_pays() -> None:
    weight, a = torch.empty(32, 32), torch.empty(2, 32)
    assert saves_passes(torch.empty(65, 32), weight, a) and saves_passes(torch.empty(5, 13, 32), weight, a)
    assert not saves_passes(torch.empty(64, 32), weight, a)
    many = torch.empty(1000, 32)
    assert not saves_passes(many.bfloat16(), weight.bfloat16(), a.bfloat16())
    assert not saves_passes(many, weight.bfloat16(), a) and not saves_passes(many, weight, a.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not saves_passes(many, weight, a)


@pytest.mark.parametrize("parts", [[], ["q", "v"]], ids=["whole", "q and v"])
def test_the_start_is_the_base_bit_for_bit(parts: list[str]) -> None:
    base = nn.Linear(16, 48)
    x = torch.randn(300, 16)
    expected = base(x)
    peft.inject(nn.ModuleDict({"m": base}), [{"NAME": "lora", "TARGETS": ["m"], "RANK": 2, "PARTS": parts}])
    assert saves_passes(x, base.weight, torch.empty(2, 16))
    torch.testing.assert_close(base(x), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_models_can_be_saved(disturb: Callable) -> None:
    model = nn.ModuleDict({"m": nn.Linear(8, 24)})
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["m"], "RANK": 2}])
    disturb(model)
    x, file = torch.randn(200, 8), io.BytesIO()
    torch.jit.save(torch.jit.trace(model["m"], (x,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model["m"](x))


def test_nothing_wide_is_passed_over_or_kept(operations: Callable) -> None:
    rows, inputs, wide, rank = 200, 24, 40, 2
    model = nn.ModuleDict({"m": nn.Linear(inputs, wide)})
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["m"], "RANK": rank, "ALPHA": 3}])
    x, gradient = torch.randn(4, 50, inputs, requires_grad=True), torch.randn(4, 50, wide)
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)  # type: ignore[func-returns-value]
    with hooks, operations() as forward:
        out = model["m"](x)
    with operations() as backward:
        torch.autograd.backward(out, gradient)
    assert [name for name, shape in forward.seen if math.prod(shape) == rows * wide] == ["addmm"]
    assert not [name for name, shape in backward.seen if math.prod(shape) == rows * wide]
    assert [name for name, shape in backward.seen if math.prod(shape) == rows * inputs] == ["mm"]
    base = {x.data_ptr(), model["m"].weight.data_ptr()}
    assert sum(t.numel() for t in kept if t.data_ptr() not in base) <= rank * (inputs + 2 * wide)
    products = {shape for name, shape in backward.seen if name == "mm"}
    assert products == {(rows, inputs), (rows, rank), (rank, inputs), (rank, wide)}


@pytest.mark.parametrize("rows", [3, 200], ids=["branch", "weight space"])
@pytest.mark.parametrize("parts", [[], ["q", "v"]], ids=["whole", "q and v"])
def test_with_a_frozen_a_layer_keeps_r_channels_of_its_input(rows: int, parts: list[str], tmp_path: Path) -> None:
    """LoRA-FA: B alone is trained, with the gradient it has beside a trained A; A is stored with it."""
    model = nn.ModuleDict({"m": nn.Linear(24, 72)})
    twin = copy.deepcopy(model)
    entry = {"NAME": "lora", "TARGETS": ["m"], "RANK": 2, "PARTS": parts}
    for freeze, one in ((True, model), (False, twin)):
        torch.manual_seed(1)
        peft.inject(one, [{**entry, "FREEZE_A": freeze}])
        for name, tensor in one.state_dict().items():
            if name.endswith("lora_b"):
                tensor.normal_()
    x = torch.randn(rows, 24, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        out = model["m"](x)
    assert all(t.untyped_storage().data_ptr() != x.data_ptr() for t in kept)
    assert sum(t.shape[-1] for t in kept if t.shape[:1] == (rows,)) == 2 * max(1, len(parts))
    out.square().sum().backward()
    twin["m"](x.detach()).square().sum().backward()
    gradients = [{t.name: t.param.grad for t in peft.trained_parameters(one)} for one in (model, twin)]
    assert gradients[0].keys() == {name for name in gradients[1] if name.endswith("lora_b")}
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name])
    peft_d2.save_adapter(model, tmp_path / "a")
    other = nn.ModuleDict({"m": nn.Linear(24, 72)})
    other.load_state_dict({name: value for name, value in model.state_dict().items() if "peft" not in name})
    peft_d2.load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(other["m"](x), out, rtol=0, atol=0)
    peft.merge(other.eval())
    torch.testing.assert_close(other["m"](x), out, rtol=1e-4, atol=1e-4)
