"""Base weights and adapters into an injected model: what follows, what stays, what is refused."""

from __future__ import annotations

import copy
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


def test_base_weights_load_after_injection(toy: nn.Module, images: Tensor, disturb: Callable) -> None:
    other = copy.deepcopy(toy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
        expected = other(images)
        dora = {"NAME": "lora", "TARGETS": ["proj", "conv"], "DORA": True}
        adapter = {"NAME": "adapter", "TARGETS": ["mlp"]}
        peft.inject(toy, [dora, adapter, {"NAME": "mona", "TARGETS": ["stem"], "BOTTLENECK": 4}], ["head"])
        toy.load_state_dict(other.state_dict(), strict=True)
        assert torch.equal(toy(images), expected)  # DoRA's magnitude followed the new weights
        disturb(toy)
        with peft.disabled(toy):
            assert torch.equal(toy(images), expected)  # and so did the base's copy of the head


def test_pissa_follows_the_base_that_is_loaded_later(toy: nn.Module, images: Tensor) -> None:
    other = copy.deepcopy(toy)
    with torch.no_grad():
        other.blocks[0].proj.weight.normal_()  # type: ignore[union-attr, operator]
    peft.inject(toy, [{"NAME": "lora", "TARGETS": ["proj"], "INIT": "pissa", "RANK": 2}])
    toy.load_state_dict(other.state_dict())
    peft.inject(other, [{"NAME": "lora", "TARGETS": ["proj"], "INIT": "pissa", "RANK": 2}])
    for name, value in peft.adapter_state_dict(other).items():
        assert torch.equal(value, peft.adapter_state_dict(toy)[name])


TRAINED: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "everything": ([], ["*"]),
    "heads": ([], ["head", "stem.norm"]),
    "lora and heads": (LINEAR, ["head"]),
    "mixed": (MIXED, ["box"]),
    "norms": ([{"NAME": "norm"}], []),
}


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("assign", [False, True])
def test_the_same_base_again_changes_nothing(kind: str, assign: bool, toy: nn.Module, disturb: Callable) -> None:
    """What DefaultPredictor and resume_or_load do with a model that was built with its base and its adapter."""
    base = copy.deepcopy(toy.requires_grad_(True).state_dict())
    peft.inject(toy, *TRAINED[kind])
    disturb(toy)
    toy.train()(torch.randn(2, 3, 8, 8))  # counters move
    before, objects = copy.deepcopy(toy.state_dict()), list(map(id, toy.parameters()))
    peft.load_adapter_state_dict(toy, copy.deepcopy(peft.adapter_state_dict(toy)))
    for _ in range(2):
        result = toy.load_state_dict(base, strict=True, assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        assert list(map(id, toy.parameters())) == objects
        after = toy.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("kind", ["heads", "lora and heads", "mixed", "norms"])
def test_another_base_is_refused_once_something_was_trained(kind: str, toy: nn.Module, disturb: Callable) -> None:
    other = copy.deepcopy(toy.state_dict())
    other["blocks.1.qkv.weight"] += 1e-3
    peft.inject(toy, *TRAINED[kind])
    disturb(toy)
    before = copy.deepcopy(toy.state_dict())
    with pytest.raises(peft.InjectionError, match=r"another base.*1 of \d+ tensors differ, blocks.1.qkv.*load_base"):
        toy.load_state_dict(other)
    assert all(torch.equal(toy.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("kind", TRAINED)
def test_a_state_dict_of_the_trained_model_is_loaded_whole(kind: str, toy: nn.Module, disturb: Callable) -> None:
    """As Detectron2's trainer writes and resumes it, whether the base was loaded before or not."""
    fresh, random = copy.deepcopy(toy), type(toy)().eval()
    peft.inject(toy, *TRAINED[kind])
    disturb(toy)
    for other in (fresh, random):
        peft.inject(other, *TRAINED[kind])
        other.load_state_dict(toy.state_dict())
        own, found = toy.state_dict(), other.state_dict()
        assert all(torch.equal(found[key], value) for key, value in own.items())


def test_values_that_are_not_active_come_back_from_a_state_dict(toy: nn.Module, disturb: Callable) -> None:
    fresh, outputs = copy.deepcopy(toy), {}
    x = torch.randn(2, 3, 8, 8)
    for model in (toy, fresh):
        peft.inject(model, LINEAR, ["head"], name="a")
        peft.add_adapter(model, "b", [], ["head", "blocks.0.norm1"])
    with torch.no_grad():
        base = toy(x)
        for name in ("a", "b"):
            peft.set_adapter(toy, name)
            disturb(toy, 0.1 if name == "a" else 0.3)  # type: ignore[call-arg]
            outputs[name] = toy(x)
        fresh.load_state_dict(toy.state_dict())  # b is active there, a is here
        for name, expected in outputs.items():
            peft.set_adapter(fresh, name)
            assert torch.equal(fresh(x), expected)
        with peft.disabled(fresh):
            assert torch.equal(fresh(x), base)


def test_whole_state_dicts_round_trip_and_half_of_one_is_an_error(
    toy: nn.Module, images: Tensor, disturb: Callable
) -> None:
    fresh = copy.deepcopy(toy)
    for model in (toy, fresh):
        peft.inject(model, MIXED, ["head", "box"])
    disturb(toy)
    state = toy.state_dict()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(images), toy(images))
    removed = next(key for key in state if key.endswith("lora_a"))
    with pytest.raises(RuntimeError, match=removed):
        fresh.load_state_dict({key: value for key, value in state.items() if key != removed})


def test_adapter_state_names_every_mismatch(toy: nn.Module) -> None:
    peft.inject(toy, LINEAR, ["head"])
    state = peft.adapter_state_dict(toy)
    state["head.weight"] = torch.zeros(7, 16)
    state["nonsense"] = state.pop("blocks.0.proj.lora_a")
    kept = copy.deepcopy(peft.adapter_state_dict(toy))
    with pytest.raises(peft.AdapterStateError) as caught:
        peft.load_adapter_state_dict(toy, state)
    for part in (
        "missing: blocks.0.proj.lora_a (4, 16)",
        "unexpected: nonsense",
        "head.weight: (7, 16) given, (5, 16)",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(v, kept[k]) for k, v in peft.adapter_state_dict(toy).items())
