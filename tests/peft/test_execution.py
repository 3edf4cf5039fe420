"""Injected models under half precision, autocast, compile, export, checkpointing, wrappers; speed and memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_d2 import peft

MIXED: list[dict[str, Any]] = [
    {"NAME": "lora", "TARGETS": ["stem", "mlp.fc1", "self_attn", "neck.0", "box.fc1"]},
    {"NAME": "adapter", "TARGETS": ["stem", "mlp.fc1", "self_attn", "neck", "dropout"], "NUM": 3},
    {"NAME": "adaptformer", "TARGETS": ["mlp", "neck"], "BOTTLENECK": 4},
    {"NAME": "bitfit", "TARGETS": ["blocks.0.norm1"]},
]
LINEAR: list[dict[str, Any]] = [{"NAME": "lora", "TARGETS": ["proj", "mlp.{fc1,fc2}"], "RANK": 4, "ALPHA": 8}]


def test_wrapped_models_are_found(toy: nn.Module) -> None:
    peft.inject(toy, LINEAR)
    for wrapped in (nn.DataParallel(toy), torch.compile(toy, backend="eager")):
        assert peft.get_injection(wrapped) is peft.get_injection(toy)
        assert list(peft.adapter_state_dict(wrapped)) == list(peft.adapter_state_dict(toy))


def test_half_precision_bases_get_float_adapters(toy: nn.Module, images: Tensor) -> None:
    toy, images = toy.bfloat16(), images.bfloat16()
    with torch.no_grad():
        expected = toy(images)
        peft.inject(toy, MIXED[:3])
        injected = [t.param for t in peft.trained_parameters(toy) if t.kind == "injected"]
        assert injected and all(parameter.dtype is torch.float32 for parameter in injected)
        assert torch.equal(toy(images), expected)
    toy.train()(images).float().sum().backward()
    assert all(t.param.grad is not None for t in peft.trained_parameters(toy))


def test_autocast(toy: nn.Module, images: Tensor) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = toy(images)
        peft.inject(toy, MIXED)
        assert torch.equal(toy(images), expected)
    with torch.autocast("cpu", torch.bfloat16):
        toy.train()(images).float().sum().backward()
    assert all(t.param.grad is not None for t in peft.trained_parameters(toy))


def test_weights_are_made_in_their_own_type_within_autocast(toy: nn.Module, disturb: Callable) -> None:
    peft.inject(toy, [*LINEAR, {"NAME": "lora", "TARGETS": ["self_attn"], "RANK": 2}])
    disturb(toy)
    models = toy, copy.deepcopy(toy).double()
    for model, autocast in zip(models, (True, False), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            peft.combine_adapters(model, {"default": 0.5}, "less", kind="svd", rank=4)
            peft.merge(model)
    for _ in range(2):  # the adapter's own weights, then the combination's
        for (name, value), expected in zip(toy.named_parameters(), models[1].parameters(), strict=True):
            if ".peft." not in name:
                torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        for model in models:
            peft.unmerge(model)
            peft.set_adapter(model, "less")
            peft.merge(model)


@pytest.mark.parametrize("gradients", [False, True])
def test_autocast_keeps_no_copy_of_what_was_loaded_over(
    toy: nn.Module, images: Tensor, disturb: Callable, gradients: bool
) -> None:
    other = copy.deepcopy(toy)
    for model in (toy, other):
        peft.inject(model, LINEAR, ["head"])
    disturb(other)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
        before = toy(images)
        peft.load_adapter_state_dict(toy, peft.adapter_state_dict(other))
        found = toy(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found, other(images)) and not torch.equal(found, before)


def test_compile_and_export(toy: nn.Module, images: Tensor, disturb: Callable) -> None:
    """Every mixin in one graph without breaks, trained and exported."""
    methods = [
        {"NAME": "lora", "TARGETS": ["stem", "conv", "mlp.fc1"]},
        {"NAME": "lora", "TARGETS": ["proj"], "DORA": True},
        {"NAME": "lora", "TARGETS": ["self_attn"], "INIT": "pissa", "RANK": 2},
        {"NAME": "lora", "TARGETS": ["qkv"], "PARTS": ["q", "v"], "RANK": 4, "COBOT": True},
        {"NAME": "adapter", "TARGETS": ["self_attn", "neck", "mlp.fc1"], "NUM": 2},
        {"NAME": "adaptformer", "TARGETS": ["mlp"], "BOTTLENECK": 4, "DROPOUT": 0.0},
        {"NAME": "mona", "TARGETS": ["stem"], "BOTTLENECK": 4, "DROPOUT": 0.0},
    ]
    torch.compiler.reset()
    peft.inject(toy, methods)
    disturb(toy)
    with torch.no_grad():
        exported = torch.export.export(toy, (images,)).module()
        torch.testing.assert_close(exported(images), toy(images), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(toy.train(), fullgraph=True, backend="aot_eager")
    compiled(images).sum().backward()
    found = [t.param.grad.clone() for t in peft.trained_parameters(toy)]  # type: ignore[union-attr]
    toy.zero_grad()
    toy(images).sum().backward()
    for trained, value in zip(peft.trained_parameters(toy), found, strict=True):
        torch.testing.assert_close(value, trained.param.grad, rtol=1e-4, atol=1e-4)


def test_activation_checkpointing(toy: nn.Module, images: Tensor, disturb: Callable) -> None:
    from torch.utils.checkpoint import checkpoint

    peft.inject(toy, MIXED)
    disturb(toy)
    toy(images).sum().backward()
    expected = [t.param.grad.clone() for t in peft.trained_parameters(toy)]  # type: ignore[union-attr]
    toy.zero_grad()
    checkpoint(toy, images, use_reentrant=False).sum().backward()
    for trained, value in zip(peft.trained_parameters(toy), expected, strict=True):
        torch.testing.assert_close(trained.param.grad, value)


def test_no_activations_are_saved_before_the_first_trained_part(images: Tensor) -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["5"], "RANK": 2}])
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        model(torch.randn(3, 8))
    assert len([t for t in saved if t.shape == (3, 8)]) <= 1 and len(saved) <= 4


def test_loras_branch_adds_thin_products_and_no_pass_over_wide_tensors(operations: Callable) -> None:
    rows, inputs, wide, rank = 50, 24, 40, 2
    model = nn.ModuleDict({"m": nn.Linear(inputs, wide)})
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["m"], "RANK": rank, "ALPHA": 3}])
    x, gradient = torch.randn(5, 10, inputs, requires_grad=True), torch.randn(5, 10, wide)
    with operations() as forward:
        out = model["m"](x)
    with operations() as backward:
        torch.autograd.backward(out, gradient)
    assert [name for name, shape in forward.seen if math.prod(shape) == rows * wide] == ["addmm", "addmm"]
    assert not [name for name, shape in backward.seen if math.prod(shape) == rows * wide]
    products = {shape for name, shape in backward.seen if name == "mm"}
    # B's gradient comes as (r, out): as (out, r) it takes CPUs the time of the whole weight's. And that one is absent.
    assert products == {(rows, inputs), (rows, rank), (rank, wide), (rank, inputs)}


def test_a_compiled_model_follows_switching_and_merging(toy: nn.Module, images: Tensor, disturb: Callable) -> None:
    torch.compiler.reset()
    peft.inject(toy, MIXED, ["head"], name="a")
    disturb(toy)
    peft.add_adapter(toy, "b", LINEAR)
    compiled = torch.compile(toy, backend="eager")

    def same() -> Tensor:
        with torch.no_grad():
            expected = toy(images)
            torch.testing.assert_close(compiled(images), expected)
        return expected

    first = same()
    with peft.disabled(compiled):
        base = same()
    peft.merge(compiled)
    same()
    peft.unmerge(compiled)
    peft.set_adapter(compiled, "b")
    assert torch.equal(same(), base)
    disturb(toy)
    second = same()
    peft.set_adapter(compiled, "a")
    assert torch.equal(same(), first)
    assert not torch.equal(first, base) and not torch.equal(second, base)


def test_moving_averages_are_adapters_of_their_own(toy: nn.Module, images: Tensor, disturb: Callable) -> None:
    """Copies that follow by parameters (torch's AveragedModel), and by state dicts, as Detectron2's users do it."""
    peft.inject(toy, MIXED, ["head"])
    averaged = torch.optim.swa_utils.AveragedModel(toy, avg_fn=lambda old, new, _: (old + new) / 2)
    averaged.update_parameters(toy)  # the first one copies
    by_name, kept = copy.deepcopy(toy), {name: value.clone() for name, value in toy.state_dict().items()}
    before = {name: value.clone() for name, value in peft.adapter_state_dict(toy).items()}
    disturb(toy)
    averaged.update_parameters(toy)
    by_name.load_state_dict(
        {
            name: (kept[name] + value) / 2 if value.is_floating_point() else value
            for name, value in toy.state_dict().items()
        }
    )
    after = peft.adapter_state_dict(toy)
    for model in (averaged, by_name):
        found = peft.adapter_state_dict(model)
        assert found.keys() == after.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, (before[name] + after[name]) / 2)
        with peft.disabled(model), peft.disabled(toy), torch.no_grad():
            assert torch.equal(model(images), toy(images))
    peft.merge(averaged)
    with torch.no_grad():
        torch.testing.assert_close(averaged(images), by_name(images), rtol=1e-4, atol=1e-4)
