"""Tuners of the ``peft`` package behind our freeze, report, files, switching and merging."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_d2 import peft

hf = pytest.importorskip("peft")

TUNERS = [
    ("ia3", {}, "IA3Config"),
    ("loha", {"r": 2}, "LoHaConfig"),
    ("lokr", {"r": 2}, "LoKrConfig"),
    ("oft", {"oft_block_size": 8, "r": 0}, "OFTConfig"),
    ("hra", {"r": 2}, "HRAConfig"),
]


@pytest.mark.parametrize(("tuner", "config", "config_class"), TUNERS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_tuner_computes_what_peft_computes(
    tuner: str, config: dict[str, Any], config_class: str, toy: nn.Module, images: Tensor, disturb: Callable
) -> None:
    keys, base = list(toy.state_dict()), copy.deepcopy(toy)
    extra = {"feedforward_modules": []} if tuner == "ia3" else {}
    theirs = hf.inject_adapter_in_model(
        getattr(hf, config_class)(target_modules=["proj", "mlp.fc1"], **extra, **config), copy.deepcopy(toy)
    )
    peft.inject(toy, [{"NAME": "hf", "TUNER": tuner, "TARGETS": ["proj", "mlp.fc1"], "CONFIG": config}], ["head"])
    assert set(keys) <= set(toy.state_dict()) and list(peft.base_state_dict(toy)) == keys
    with torch.no_grad():
        torch.testing.assert_close(toy(images), base(images), rtol=1e-5, atol=1e-5)
        disturb(toy)
        for name, value in peft.adapter_state_dict(toy).items():
            if name.startswith("head."):
                theirs.get_parameter(name).copy_(value)
            else:
                place, _, local = name.partition(".hf.")
                dict(theirs.get_submodule(place).named_parameters())[local].copy_(value)
        adapted = toy(images)
        torch.testing.assert_close(adapted, theirs.eval()(images))
        assert not torch.allclose(adapted, base(images), atol=1e-3)
        assert torch.equal(copy.deepcopy(toy)(images), adapted)
        with peft.disabled(toy):
            assert torch.equal(toy(images), base(images))
        before = peft.frozen_hash(toy)
        assert peft.merge(toy) == []
        torch.testing.assert_close(toy(images), adapted, rtol=1e-5, atol=1e-5)
        peft.unmerge(toy)
        assert torch.equal(toy(images), adapted) and peft.frozen_hash(toy) == before
        peft.remove(toy)
        assert torch.equal(toy(images), base(images))
    assert list(toy.state_dict()) == keys


@pytest.mark.parametrize(("tuner", "config", "config_class"), TUNERS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_tuner_on_a_base_in_half_precision_is_trained_in_float32(
    tuner: str, config: dict[str, Any], config_class: str, toy: nn.Module, images: Tensor
) -> None:
    """As behind peft's get_peft_model."""
    half = copy.deepcopy(toy).bfloat16()
    gradients = []
    for model, image in ((toy, images), (half, images.bfloat16())):
        torch.manual_seed(0)
        peft.inject(model, [{"NAME": "hf", "TUNER": tuner, "TARGETS": ["proj", "mlp.fc1"], "CONFIG": config}])
        with torch.no_grad():
            for item in peft.trained_parameters(model):
                item.param.add_(0.05 * torch.randn(item.param.shape))
        output = model(image)
        assert output.dtype is image.dtype
        output.float().square().mean().backward()
        gradients.append(torch.cat([item.param.grad.flatten() for item in peft.trained_parameters(model)]))
    peft.prove_live(half, images.bfloat16())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_a_tuner_that_puts_another_norm_in_the_places(toy: nn.Module, images: Tensor, disturb: Callable) -> None:
    """peft's LN tuning merges by exchanging layers; the module here must keep its own."""
    base, fresh = copy.deepcopy(toy), copy.deepcopy(toy)
    peft.inject(toy, [{"NAME": "hf", "TUNER": "ln_tuning", "TARGETS": ["norm1"]}])
    disturb(toy)
    with torch.no_grad():
        adapted = toy(images)
        assert not torch.allclose(adapted, base(images), atol=1e-3)
        names = list(peft.adapter_state_dict(toy))
        assert peft.merge(toy) == [] and list(peft.adapter_state_dict(toy)) == names
        torch.testing.assert_close(toy(images), adapted)
        peft.unmerge(toy)
        assert torch.equal(toy(images), adapted)
        with peft.disabled(toy):
            assert torch.equal(toy(images), base(images))
        record = peft.get_injection(toy)
        assert record is not None
        peft.inject(fresh, record.methods)
        peft.load_adapter_state_dict(fresh, peft.adapter_state_dict(toy))
        assert torch.equal(fresh(images), adapted)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"TUNER": "ia4"}, "no tuner 'ia4'. Nearest: IA3"),
        ({}, "TUNER is ''"),
        ({"TUNER": "loha", "CONFIG": {"rank": 3}}, "does not fit LoHaConfig"),
        ({"TUNER": "loha", "TARGETS": ["norm1"]}, "cannot go on blocks.0.norm1"),
    ],
)
def test_what_a_tuner_refuses(entry: dict[str, Any], said: str, toy: nn.Module) -> None:
    with pytest.raises(peft.MethodError, match=said):
        peft.inject(toy, [{"NAME": "hf", "TARGETS": ["proj"], **entry}])
    assert not any(isinstance(module, peft.Adapted) for module in toy.modules())


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changes_the_base_is_refused(start: str) -> None:
    model = nn.ModuleDict({"m": nn.Linear(8, 8)})
    before = model["m"].weight.detach().clone()
    entry = {"NAME": "hf", "TUNER": "lora", "TARGETS": ["m"], "CONFIG": {"init_lora_weights": start, "r": 2}}
    with pytest.raises(peft.MethodError, match="its start changes the base's weights"):
        peft.inject(model, [entry])
    assert torch.equal(model["m"].weight, before) and model["m"].weight.requires_grad
