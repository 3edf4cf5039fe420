"""What injection promises, for every method: start, keys, freezing, copies, files, switching, merging."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_d2 import peft

Methods = list[dict[str, Any]]
CASES: dict[str, tuple[Methods, list[str]]] = {
    "lora linear": ([{"NAME": "lora", "TARGETS": ["proj", "mlp.{fc1,fc2}"], "RANK": 4, "ALPHA": 8}], []),
    "lora qkv": ([{"NAME": "lora", "TARGETS": ["qkv"], "PARTS": ["q", "v"]}], []),
    "lora attention": ([{"NAME": "lora", "TARGETS": ["self_attn"], "PARTS": ["q", "k", "v", "out"]}], []),
    "lora convs": ([{"NAME": "lora", "TARGETS": ["stem", "conv"], "RANK": 3}], []),
    "rslora dropout": ([{"NAME": "lora", "TARGETS": ["proj"], "RSLORA": True, "DROPOUT": 0.3}], []),
    "A frozen": ([{"NAME": "lora", "TARGETS": ["proj", "qkv", "stem", "self_attn"], "FREEZE_A": True}], []),
    "dora": ([{"NAME": "lora", "TARGETS": ["proj", "qkv", "stem", "conv", "self_attn"], "DORA": True}], []),
    "pissa": ([{"NAME": "lora", "TARGETS": ["proj", "stem", "self_attn"], "INIT": "pissa", "RANK": 2}], []),
    "lora cobot": ([{"NAME": "lora", "TARGETS": ["qkv"], "PARTS": ["q", "v"], "RANK": 4, "COBOT": True}], []),
    "adapter": ([{"NAME": "adapter", "TARGETS": ["self_attn", "mlp", "stem", "neck", "box"], "NUM": 2}], []),
    "adapter dropout": ([{"NAME": "adapter", "TARGETS": ["layers.*.dropout"]}], []),
    "adaptformer": ([{"NAME": "adaptformer", "TARGETS": ["mlp"], "BOTTLENECK": 4}], []),
    "adaptformer cobot": ([{"NAME": "adaptformer", "TARGETS": ["mlp"], "BOTTLENECK": 4, "COBOT": True}], []),
    "mona": ([{"NAME": "mona", "TARGETS": ["stem", "mlp"], "BOTTLENECK": 4, "GRID": "square"}], []),
    "conv experts": (
        [{"NAME": "conv_lora", "TARGETS": ["qkv"], "PARTS": ["q", "v"], "EXPERTS": 2, "GRID": "square"}],
        [],
    ),
    "bitfit": ([{"NAME": "bitfit"}], []),
    "norm": ([{"NAME": "norm"}], []),
    "last block": ([{"NAME": "last_blocks", "TARGETS": ["blocks.*"]}], []),
    "heads": ([], ["head", "layers.1.norm.bias"]),
    "all together": (
        [
            {"NAME": "lora", "TARGETS": ["stem", "mlp.fc1", "self_attn", "neck.0", "box.fc1"]},
            {"NAME": "adapter", "TARGETS": ["stem", "mlp.fc1", "self_attn", "neck", "dropout"], "NUM": 3},
            {"NAME": "adaptformer", "TARGETS": ["mlp", "neck"], "BOTTLENECK": 4},
            {"NAME": "bitfit", "TARGETS": ["blocks.0.norm1"]},
        ],
        ["head", "box"],
    ),
}
MERGEABLE = [name for name in CASES if name.startswith(("lora", "rslora", "dora", "pissa"))]


@pytest.fixture(params=list(CASES), ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest) -> tuple[Methods, list[str]]:
    return copy.deepcopy(CASES[request.param])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_start_training_disabling_and_removing(
    case: tuple[Methods, list[str]], dtype: torch.dtype, toy: nn.Module, images: Tensor, disturb: Callable
) -> None:
    model, images = toy.to(dtype), images.to(dtype)
    base, state, classes = copy.deepcopy(model), dict(model.state_dict()), [type(m) for m in model.modules()]
    with torch.no_grad():
        expected = base(images)
        report = peft.inject(model, *case)
        assert torch.equal(model(images), expected)
        assert state.keys() <= model.state_dict().keys()
        assert peft.base_state_dict(model).keys() == state.keys()

    before = peft.frozen_hash(model)
    model.train()
    trained = list(peft.trained_parameters(model))
    assert {id(t.param) for t in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    assert sum(t.param.numel() for t in trained) == report.trainable > 0
    optimizer = torch.optim.SGD([t.param for t in trained], lr=0.01)
    for _ in range(2):  # what follows a zero up-projection gets its gradient from the second step on
        optimizer.zero_grad()
        model(images).square().mean().backward()
        assert all(t.param.grad is not None for t in trained)
        optimizer.step()
    disturb(model)
    model.eval()
    assert peft.frozen_hash(model) == before
    with torch.no_grad():
        adapted = model(images)
        assert adapted.isfinite().all() and not torch.allclose(adapted, expected, atol=1e-4)
        with peft.disabled(model):
            assert torch.equal(model(images), expected)
            found = peft.base_state_dict(model)
            assert all(torch.equal(value, found[key]) for key, value in base.state_dict().items())
        assert torch.equal(model(images), adapted)
        peft.remove(model)
        assert torch.equal(model(images), expected)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == list(state)


def test_copies_and_files(case: tuple[Methods, list[str]], toy: nn.Module, images: Tensor, disturb: Callable) -> None:
    fresh = copy.deepcopy(toy)
    peft.inject(toy, *case)
    disturb(toy)
    copied = copy.deepcopy(toy)
    buffer = io.BytesIO()
    torch.save(toy, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    peft.inject(fresh, *case)
    peft.load_adapter_state_dict(fresh, peft.adapter_state_dict(toy))
    with torch.no_grad():
        expected = toy(images)
        for other in (copied, loaded, fresh):
            assert torch.equal(other(images), expected)
        disturb(copied)  # a copy's switch, shared modules and parameters are its own
        with peft.disabled(copied):
            assert torch.equal(toy(images), expected)
        assert not torch.equal(copied(images), expected)
    names = peft.adapter_state_dict(toy).keys()
    assert not any("default" in name or "peft" in name for name in names)


def test_named_adapters(case: tuple[Methods, list[str]], toy: nn.Module, images: Tensor, disturb: Callable) -> None:
    with torch.no_grad():
        base = toy(images)
        peft.inject(toy, *case)
        disturb(toy)
        day = toy(images)
        peft.add_adapter(toy, "night")
        assert torch.equal(toy(images), day)
        peft.set_adapter(toy, "night")
        assert torch.equal(toy(images), base)
        disturb(toy, 0.3)  # type: ignore[call-arg]
        night = toy(images)
        assert not torch.equal(night, day)
        peft.set_adapter(toy, "default")
        assert torch.equal(toy(images), day)
        with peft.disabled(toy):
            assert torch.equal(toy(images), base)
        active = {id(t.param) for t in peft.trained_parameters(toy)}
        assert active == {id(p) for p in toy.parameters() if p.requires_grad}
        other = copy.deepcopy(peft.adapter_state_dict(toy, "night"))
        peft.load_adapter_state_dict(toy, other)
        assert torch.equal(toy(images), night)
        with pytest.raises(peft.InjectionError, match="is active"):
            peft.delete_adapter(toy, "default")
        peft.delete_adapter(toy, "night")
        with pytest.raises(peft.InjectionError, match="no adapter 'night'"):
            peft.set_adapter(toy, "night")
        assert torch.equal(toy(images), night)


@pytest.mark.parametrize("name", MERGEABLE)
def test_merge_and_unmerge(name: str, toy: nn.Module, images: Tensor, disturb: Callable) -> None:
    state = copy.deepcopy(toy.state_dict())
    clean = copy.deepcopy(toy)
    peft.inject(toy, *CASES[name])
    disturb(toy)
    before = peft.frozen_hash(toy)
    with torch.no_grad():
        adapted = toy(images)
        assert peft.merge(toy) == []
        torch.testing.assert_close(toy(images), adapted, rtol=1e-5, atol=1e-5 * adapted.abs().max().item())
        clean.load_state_dict(peft.base_state_dict(toy))
        assert torch.equal(clean(images), toy(images))  # a plain model with the merged weights is the same model
        with peft.disabled(toy):
            assert all(torch.equal(v, state[k]) for k, v in peft.base_state_dict(toy).items())
        assert peft.frozen_hash(toy) == before
        peft.unmerge(toy)
        assert all(torch.equal(v, state[k]) for k, v in peft.base_state_dict(toy).items())
        assert torch.equal(toy(images), adapted)


def test_removing_with_the_changes_kept_is_a_plain_model(toy: nn.Module, images: Tensor, disturb: Callable) -> None:
    peft.inject(toy, CASES["lora linear"][0], ["head"])
    disturb(toy)
    with torch.no_grad():
        adapted = toy(images)
        peft.remove(toy, keep=True)
        torch.testing.assert_close(toy(images), adapted, rtol=1e-5, atol=1e-5)
    assert peft.get_injection(toy) is None and not any(isinstance(m, peft.Adapted) for m in toy.modules())


def test_bottlenecks_stay_beside_merged_weights(toy: nn.Module, images: Tensor, disturb: Callable) -> None:
    peft.inject(toy, CASES["all together"][0])
    disturb(toy)
    with torch.no_grad():
        adapted = toy(images)
        left = peft.merge(toy)
        assert {"stem", "neck", "blocks.0.mlp", "blocks.0.mlp.fc1", "layers.1.dropout"} <= set(left)
        torch.testing.assert_close(toy(images), adapted, rtol=1e-4, atol=1e-4)
    with pytest.raises(peft.InjectionError, match="no weight can hold"):
        peft.remove(toy, keep=True)


def test_a_merged_model_refuses_what_would_go_wrong(toy: nn.Module, images: Tensor) -> None:
    peft.inject(toy, CASES["lora linear"][0])
    state = copy.deepcopy(peft.base_state_dict(toy))
    peft.merge(toy)
    with pytest.warns(UserWarning, match="merged into the weights and is not trained"):
        toy.train()(images)
    with pytest.raises(RuntimeError, match="unmerge"):
        toy.load_state_dict(state)
    for refused in (peft.merge, lambda m: peft.add_adapter(m, "x")):
        with pytest.raises(peft.InjectionError, match="unmerge"):
            refused(toy)


def test_a_weight_with_two_owners_is_not_merged() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["0"]}])
    with pytest.raises(peft.InjectionError, match="0.weight also belongs to another module"):
        peft.merge(model)


def test_adapters_of_different_methods_in_one_model(toy: nn.Module, images: Tensor, disturb: Callable) -> None:
    with torch.no_grad():
        base = toy(images)
        peft.inject(toy, CASES["lora linear"][0], ["head"])
        disturb(toy)
        first = toy(images)
        peft.add_adapter(toy, "other", [{"NAME": "adapter", "TARGETS": ["mlp", "neck"]}], ["layers.0"])
        peft.set_adapter(toy, "other")
        assert torch.equal(toy(images), base)
        names = peft.adapter_state_dict(toy, "other").keys()
        assert "layers.0.norm.weight" in names and "head.weight" not in names
        assert not toy.head.weight.requires_grad  # type: ignore[union-attr]
        peft.set_adapter(toy, "default")
        assert torch.equal(toy(images), first)


def test_full_fine_tuning_keeps_what_the_base_froze(toy: nn.Module) -> None:
    toy.requires_grad_(True)
    toy.stem.weight.requires_grad_(False)  # type: ignore[union-attr]
    report = peft.inject(toy, [], ["*"])
    assert not toy.stem.weight.requires_grad and toy.train().stem.norm.training  # type: ignore[union-attr]
    assert report.trainable == report.total - toy.stem.weight.numel()  # type: ignore[union-attr, operator]
    with pytest.raises(peft.InjectionError, match="keeps no copy"), peft.disabled(toy):
        pass


def test_frozen_statistics_stay(toy: nn.Module, images: Tensor) -> None:
    toy.requires_grad_(True).train()
    peft.inject(toy, [{"NAME": "adapter", "TARGETS": ["stem"]}], ["stem.norm.weight"])
    before = toy.stem.norm.running_mean.clone()  # type: ignore[union-attr, operator]
    for reset in (toy.train, toy.stem.train):  # type: ignore[union-attr]
        reset()
        toy(images)
        assert torch.equal(toy.stem.norm.running_mean, before)  # type: ignore[union-attr, arg-type]
    assert toy.layers[0].dropout.training  # type: ignore[union-attr, index]
    peft.add_adapter(toy, "norms", [], ["stem.norm"])
    peft.set_adapter(toy, "norms")
    toy(images)
    assert not torch.equal(toy.stem.norm.running_mean, before)  # type: ignore[union-attr, arg-type]
    peft.set_adapter(toy, "default")
    assert torch.equal(toy.stem.norm.running_mean, before)  # type: ignore[union-attr, arg-type]


def test_shared_modules_stay_shared(toy: nn.Module, images: Tensor, disturb: Callable) -> None:
    peft.inject(
        toy, [{"NAME": "lora", "TARGETS": ["box_again.1.fc1"]}, {"NAME": "adapter", "TARGETS": ["box"]}], ["box"]
    )
    copied = copy.deepcopy(toy)
    for model in (toy, copied):
        assert model.box is model.box_again[0] is model.box_again[1]  # type: ignore[index]
    names = [name for name in peft.adapter_state_dict(toy) if not name.startswith("box.")]
    assert names == []  # each tensor once, under its first name
    peft.add_adapter(toy, "other")
    disturb(toy)
    peft.set_adapter(toy, "other")
    assert toy.box.fc1.weight is toy.box_again[1].fc1.weight  # type: ignore[union-attr, index]


def test_shared_parameters_stay_shared(disturb: Callable) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    peft.inject(model, [], ["1"])
    assert model[0].weight is model[1].weight and model[0].weight.requires_grad
    peft.add_adapter(model, "other")
    disturb(model)
    peft.set_adapter(model, "other")
    assert model[0].weight is model[1].weight
    assert list(peft.adapter_state_dict(model)) == ["0.weight"]
