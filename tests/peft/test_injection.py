"""What injection promises, for every method: start, keys, freezing, copies, files, switching, merging."""

from __future__ import annotations

import copy
import io
import time
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
    "dora": ([{"NAME": "lora", "TARGETS": ["proj", "qkv", "stem", "conv", "self_attn"], "DORA": True}], []),
    "pissa": ([{"NAME": "lora", "TARGETS": ["proj", "stem", "self_attn"], "INIT": "pissa", "RANK": 2}], []),
    "lora cobot": ([{"NAME": "lora", "TARGETS": ["qkv"], "PARTS": ["q", "v"], "RANK": 4, "COBOT": True}], []),
    "adapter": ([{"NAME": "adapter", "TARGETS": ["self_attn", "mlp", "stem", "neck", "box"], "NUM": 2}], []),
    "adapter dropout": ([{"NAME": "adapter", "TARGETS": ["layers.*.dropout"]}], []),
    "adaptformer": ([{"NAME": "adaptformer", "TARGETS": ["mlp"], "BOTTLENECK": 4}], []),
    "adaptformer cobot": ([{"NAME": "adaptformer", "TARGETS": ["mlp"], "BOTTLENECK": 4, "COBOT": True}], []),
    "mona": ([{"NAME": "mona", "TARGETS": ["stem", "mlp"], "BOTTLENECK": 4, "GRID": "square"}], []),
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
    assert peft.get_injection(toy) is None and not any(isinstance(m, peft.Specialised) for m in toy.modules())


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


def test_base_weights_load_after_injection(toy: nn.Module, images: Tensor, disturb: Callable) -> None:
    other = copy.deepcopy(toy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
        expected = other(images)
        methods = CASES["dora"][0] + [{"NAME": "adapter", "TARGETS": ["mlp"]}]
        methods[0] = {**methods[0], "TARGETS": ["proj", "conv"]}
        peft.inject(toy, [*methods, {"NAME": "mona", "TARGETS": ["stem"], "BOTTLENECK": 4}], ["head"])
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


def test_whole_state_dicts_round_trip_and_half_of_one_is_an_error(
    toy: nn.Module, images: Tensor, disturb: Callable
) -> None:
    fresh = copy.deepcopy(toy)
    for model in (toy, fresh):
        peft.inject(model, *CASES["all together"])
    disturb(toy)
    state = toy.state_dict()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(images), toy(images))
    removed = next(key for key in state if key.endswith("lora_a"))
    with pytest.raises(RuntimeError, match=removed):
        fresh.load_state_dict({key: value for key, value in state.items() if key != removed})


def test_adapter_state_names_every_mismatch(toy: nn.Module) -> None:
    peft.inject(toy, CASES["lora linear"][0], ["head"])
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


def test_switching_takes_less_than_a_millisecond() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(100)])
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["re:\\d+\\.\\d"]}], ["99"])
    peft.add_adapter(model, "other")
    times = []
    for name in ["other", "default"] * 10:
        start = time.perf_counter()
        peft.set_adapter(model, name)
        times.append(time.perf_counter() - start)
    assert sorted(times)[len(times) // 2] < 1e-3


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


def test_wrapped_models_are_found(toy: nn.Module) -> None:
    peft.inject(toy, CASES["lora linear"][0])
    for wrapped in (nn.DataParallel(toy), torch.compile(toy, backend="eager")):
        assert peft.get_injection(wrapped) is peft.get_injection(toy)
        assert list(peft.adapter_state_dict(wrapped)) == list(peft.adapter_state_dict(toy))


@pytest.mark.parametrize(
    ("methods", "train", "error", "said"),
    [
        ([{"NAME": "lroa", "TARGETS": ["proj"]}], [], peft.MethodError, "'lroa' does not exist. Nearest: lora"),
        ([{"NAME": "lora", "TARGETS": ["proj"], "RNAK": 4}], [], peft.MethodError, "no key 'RNAK'. Nearest: RANK"),
        ([{"NAME": "lora", "TARGETS": ["proj"], "rank": 4}], [], peft.MethodError, "no key 'rank'"),
        ([{"NAME": "lora", "TARGETS": ["proj"], "RANK": "4"}], [], peft.MethodError, "RANK is '4', expected .*int"),
        ([{"NAME": "lora", "TARGETS": ["proj"], "RANK": 0}], [], peft.MethodError, "RANK is 0: expected a positive"),
        ([{"NAME": "lora", "TARGETS": ["proj"], "DROPOUT": 1.0}], [], peft.MethodError, "DROPOUT"),
        ([{"NAME": "lora", "TARGETS": ["proj"], "INIT": "zero"}], [], peft.MethodError, "INIT is 'zero'"),
        ([{"NAME": "lora", "TARGETS": "proj"}], [], peft.MethodError, "TARGETS is 'proj', expected a list"),
        ([{"NAME": "lora"}], [], peft.MethodError, "TARGETS is empty"),
        ([{"TARGETS": ["proj"]}], [], peft.MethodError, "no NAME"),
        ({"NAME": "lora", "TARGETS": ["proj"]}, [], peft.MethodError, "expected a list of methods"),
        ([{"NAME": "lora", "TARGETS": ["norm1"]}], [], peft.MethodError, "cannot go on blocks.0.norm1.*LayerNorm"),
        ([{"NAME": "lora", "TARGETS": ["mlp"]}], [], peft.MethodError, "in it are fc1, fc2"),
        ([{"NAME": "lora", "TARGETS": ["blocks.*"]}], [], peft.MethodError, r"blocks\.\*\* reaches deeper"),
        ([{"NAME": "lora", "TARGETS": ["proj"], "PARTS": ["q"]}], [], peft.MethodError, "fused qkv"),
        ([{"NAME": "lora", "TARGETS": ["self_attn"], "DROPOUT": 0.1}], [], peft.MethodError, "without DROPOUT"),
        ([{"NAME": "lora", "TARGETS": ["proj", "prjo"]}], [], peft.PatternError, "prjo.*proj"),
        ([{"NAME": "lora", "TARGETS": ["proj"], "EXCLUDE": ["prjo"]}], [], peft.PatternError, "prjo"),
        ([{"NAME": "lora", "TARGETS": ["proj"], "EXCLUDE": ["proj"]}], [], peft.MethodError, "EXCLUDE takes back"),
        (
            [{"NAME": "lora", "TARGETS": ["proj"], "RANK_PATTERN": {"blocks.7.proj": 2}}],
            [],
            peft.PatternError,
            "blocks.7",
        ),
        ([{"NAME": "lora", "TARGETS": ["proj"]}] * 2, [], peft.MethodError, "chosen by two 'lora' entries"),
        ([{"NAME": "adapter", "TARGETS": ["layers"]}], [], peft.MethodError, "only holds other modules"),
        ([{"NAME": "adapter", "TARGETS": ["box_again.*.fc1", "out_proj"]}], [], peft.MethodError, "without calling it"),
        ([{"NAME": "adapter", "TARGETS": ["neck.1"]}], [], None, ""),
        ([{"NAME": "lora", "TARGETS": ["proj"]}], ["haed"], peft.PatternError, "haed.*head"),
        ([], ["neck.1"], peft.PatternError, "has no parameters"),
        ([], "head", peft.PatternError, r"\['head'\]"),
        ([], [], peft.InjectionError, "nothing would be trained"),
    ],
)
def test_a_wrong_entry_is_an_error_and_changes_nothing(
    methods: Any, train: Any, error: type[Exception] | None, said: str, toy: nn.Module
) -> None:
    keys = list(toy.state_dict())
    toy.requires_grad_(True)
    if error is None:
        peft.inject(toy, methods, train)
        return
    with pytest.raises(error, match=said):
        peft.inject(toy, methods, train)
    assert list(toy.state_dict()) == keys and all(p.requires_grad for p in toy.parameters())
    assert not any(isinstance(m, peft.Specialised) for m in toy.modules())


@pytest.mark.parametrize("name", ["", "a.b", "train", "keys"])
def test_names_that_cannot_name_an_adapter(name: str, toy: nn.Module) -> None:
    with pytest.raises(peft.InjectionError, match="cannot name an adapter"):
        peft.inject(toy, CASES["lora linear"][0], name=name)


def test_report_counts_and_prints(toy: nn.Module) -> None:
    base = sum(p.numel() for p in toy.parameters())
    report = peft.inject(toy, CASES["lora linear"][0], ["head"])
    injected = 2 * (4 * 32 + 4 * 48 + 4 * 48)
    assert (report.total, report.injected, report.trainable) == (base + injected, injected, injected + 85)
    assert report.percent == 100 * report.trainable / report.total
    assert sum(row.total for row in report.rows) == report.total
    text = str(report)
    for part in ("lora on 6 Linear: 1,024 parameters, blocks.0.proj", "trained in full: head", "blocks.1", "%"):
        assert part in text
    record = peft.get_injection(toy)
    assert record is not None and record.methods[0]["RANK"] == 4 and record.train == ["head"]
    copied = copy.deepcopy(record)
    assert copied == record and len(copied.places) == 6


def test_rank_and_alpha_per_pattern(toy: nn.Module) -> None:
    entry = {"NAME": "lora", "TARGETS": ["proj", "fc1"], "RANK": 8, "ALPHA": 8}
    peft.inject(toy, [{**entry, "RANK_PATTERN": {"blocks.0.proj": 2, "fc1": 4}, "ALPHA_PATTERN": {"fc1": 16}}])
    state = peft.adapter_state_dict(toy)
    found = {name: value.shape[0] for name, value in state.items() if name.endswith("lora_a")}
    expected = {"blocks.0.proj": 2, "blocks.1.proj": 8, "blocks.0.mlp.fc1": 4, "box.fc1": 4}
    assert {name: found[f"{name}.lora_a"] for name in expected} == expected
    assert toy.blocks[0].mlp.fc1.peft["default"]["lora"].scale == 4  # type: ignore[union-attr, index]
    assert toy.blocks[0].proj.peft["default"]["lora"].scale == 4  # type: ignore[union-attr, index]


def test_half_precision_bases_get_float_adapters(toy: nn.Module, images: Tensor) -> None:
    toy, images = toy.bfloat16(), images.bfloat16()
    with torch.no_grad():
        expected = toy(images)
        peft.inject(toy, CASES["all together"][0])
        injected = [t.param for t in peft.trained_parameters(toy) if t.kind == "injected"]
        assert injected and all(parameter.dtype is torch.float32 for parameter in injected)
        assert torch.equal(toy(images), expected)
    toy.train()(images).float().sum().backward()
    assert all(t.param.grad is not None for t in peft.trained_parameters(toy))


def test_autocast(toy: nn.Module, images: Tensor) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = toy(images)
        peft.inject(toy, CASES["all together"][0])
        assert torch.equal(toy(images), expected)
    with torch.autocast("cpu", torch.bfloat16):
        toy.train()(images).float().sum().backward()
    assert all(t.param.grad is not None for t in peft.trained_parameters(toy))


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

    peft.inject(toy, CASES["all together"][0])
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
