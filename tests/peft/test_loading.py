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


def test_a_loaded_adapter_survives_base_weights_and_trained_ones_are_overwritten(
    toy: nn.Module, disturb: Callable
) -> None:
    base = copy.deepcopy(toy.state_dict())
    peft.inject(toy, [], ["head"])
    disturb(toy)
    trained = copy.deepcopy(peft.adapter_state_dict(toy))
    toy.load_state_dict(base)
    assert torch.equal(toy.head.weight, base["head.weight"])  # type: ignore[union-attr, arg-type]
    peft.load_adapter_state_dict(toy, trained)
    toy.load_state_dict(base)
    assert torch.equal(toy.head.weight, trained["head.weight"])  # type: ignore[union-attr, arg-type]


def test_untouched_values_of_every_adapter_follow_the_base(toy: nn.Module, images: Tensor, disturb: Callable) -> None:
    other = copy.deepcopy(toy)
    disturb(other.requires_grad_(True))
    other.requires_grad_(False)
    peft.inject(toy, [], ["head"], name="a")
    peft.add_adapter(toy, "b")
    peft.add_adapter(toy, "c")
    peft.set_adapter(toy, "c")
    disturb(toy)
    trained = toy.head.weight.detach().clone()  # type: ignore[union-attr, operator]
    peft.set_adapter(toy, "a")
    toy.load_state_dict(other.state_dict())
    with torch.no_grad():
        for name in ("a", "b"):
            peft.set_adapter(toy, name)
            assert torch.equal(toy(images), other(images)), name
        peft.set_adapter(toy, "c")
        assert torch.equal(toy.head.weight, trained)  # type: ignore[union-attr, arg-type]


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
