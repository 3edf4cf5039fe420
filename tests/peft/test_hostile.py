"""What people do to models that was not foreseen: refused by name with the model as it was, or right."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_d2 import peft

LORA: dict[str, Any] = {"NAME": "lora", "TARGETS": ["fc1", "fc2"], "RANK": 2}
ADAPTER: dict[str, Any] = {"NAME": "adapter", "TARGETS": ["fc1"]}


class Small(nn.Module):
    """(N, 8) -> (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential()
        self.body.add_module("fc1", nn.Linear(8, 8))
        self.body.add_module("fc2", nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def small(change: Callable[[Small], Any] = lambda model: None) -> Small:
    model = Small().eval()
    change(model)
    return model


def set_scripted_head(model: Small) -> None:
    model.head = torch.jit.script(nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3)).eval())  # type: ignore[assignment]


def set_lazy_head(model: Small) -> None:
    model.head = nn.LazyLinear(3)


def set_integer_weight(model: Small) -> None:
    model.body.fc1.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("change", "entry", "error", "said"),
    [
        (
            lambda m: peft.inject(m.body, [LORA]),
            LORA,
            peft.InjectionError,
            "fc1 was injected as a part of another",
        ),
        (lambda m: setattr(m.body.fc1, "peft", 3), LORA, peft.MethodError, "body.fc1: Linear already has .* 'peft'"),
        (lambda m: nn.utils.weight_norm(m.body.fc1), LORA, peft.MethodError, "computed from others .weight_norm"),
        (lambda m: nn.utils.spectral_norm(m.body.fc1), LORA, peft.MethodError, "computed from others"),
        (lambda m: nn.utils.parametrizations.weight_norm(m.body.fc1), LORA, peft.MethodError, "computed from others"),
        (set_integer_weight, LORA, peft.MethodError, "stored as torch.int8"),
        (set_scripted_head, LORA, peft.InjectionError, "statistics of head.1 cannot be frozen.*scripted"),
        (set_lazy_head, LORA, peft.InjectionError, "head.weight has no shape yet"),
    ],
    ids=["in part", "attribute", "weight norm", "spectral norm", "parametrised", "int8", "scripted", "lazy"],
)
def test_a_model_that_cannot_be_injected_stays_as_it_was(
    change: Callable[[Small], Any], entry: dict[str, Any], error: type[Exception], said: str
) -> None:
    model = small(change)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(error, match=said):
        peft.inject(model, [entry])
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert kinds == [type(module) for module in model.modules()]


def test_a_part_of_an_injected_model_is_not_injected_again() -> None:
    model = small()
    peft.inject(model, [LORA])
    with pytest.raises(peft.InjectionError, match="fc1 was injected as a part of another model"):
        peft.inject(model.body, [ADAPTER])


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")], ids=["parallel", "compiled"]
)
def test_a_wrapper_is_not_the_model(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """DDP would exchange no gradients of what comes later, and every name would begin with the wrapper's."""
    with pytest.raises(peft.InjectionError, match="inject the model itself, then wrap it"):
        peft.inject(wrap(small()), [LORA])


def test_scripted_modules_can_be_around_and_are_not_trained() -> None:
    model = small(lambda m: setattr(m, "head", torch.jit.script(m.head)))
    with pytest.raises(peft.InjectionError, match="head.bias is in a scripted module"):
        peft.inject(model, [LORA], ["head.bias"])
    peft.inject(model, [LORA])
    model.eval()
    peft.prove_live(model, X)
    assert not model.head.training
    peft.require_intact(model)


@pytest.mark.parametrize("entry", [ADAPTER, {**LORA, "TARGETS": ["head"]}], ids=["adapter", "lora elsewhere"])
def test_parametrised_modules_can_be_around_and_adapted(entry: dict[str, Any], disturb: Callable) -> None:
    model = small(lambda m: nn.utils.parametrizations.weight_norm(m.body.fc1))
    base = model(X)
    peft.inject(model, [entry])
    assert torch.equal(model(X), base)
    disturb(model)
    assert not torch.allclose(model(X), base)
    peft.remove(model)
    assert torch.equal(model(X), base)


@pytest.mark.filterwarnings("ignore")
def test_quantised_modules_can_be_around(disturb: Callable) -> None:
    """Their state dict holds things that are no tensors."""
    model = small()
    model.head = torch.ao.quantization.quantize_dynamic(nn.Sequential(model.head), {nn.Linear})  # type: ignore[assignment]
    base = model(X)
    peft.inject(model, [LORA])
    assert torch.equal(model(X), base)
    before = peft.frozen_hash(model)
    disturb(model)
    assert peft.frozen_hash(model) == before
    with pytest.raises(peft.MethodError, match="head.0.*Linear is none of"):
        peft.inject(small(lambda m: setattr(m, "head", model.head)), [{**LORA, "TARGETS": ["head.0"]}])


def test_a_state_dict_after_merging_holds_the_change_once(disturb: Callable) -> None:
    """With the adapter beside the merged weights, loading both would add the change twice."""
    model, injected, plain = small(), small(), small()
    peft.inject(model, [LORA, {**ADAPTER, "TARGETS": ["body"]}], ["head"])
    peft.inject(injected, [LORA, {**ADAPTER, "TARGETS": ["body"]}], ["head"])
    disturb(model)
    expected = model(X)
    whole = list(model.state_dict())
    peft.merge(model)
    state = copy.deepcopy(model.state_dict())
    assert [key for key in state if "peft" in key] == [key for key in whole if "peft.default.adapter" in key]
    injected.load_state_dict(state, strict=False)
    torch.testing.assert_close(injected(X), expected)
    peft.unmerge(model)
    assert list(model.state_dict()) == whole
    peft.remove(model)
    peft.inject(model, [LORA])
    disturb(model)
    expected = model(X)
    peft.merge(model)
    plain.load_state_dict(model.state_dict(), strict=True)  # the merged model is a plain one to everybody else
    torch.testing.assert_close(plain(X), expected)


def test_removing_inside_of_disabled_is_refused(disturb: Callable) -> None:
    model = small()
    base = model(X)
    peft.inject(model, [LORA], ["head"])
    disturb(model)
    adapted = model(X)
    with peft.disabled(model):
        with pytest.raises(peft.InjectionError, match="leave the disabled"):
            peft.remove(model)
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), adapted)


def test_weights_that_come_to_a_model_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = Small()
        peft.inject(model, [LORA], ["head"])
    with pytest.raises(peft.InjectionError, match="on the meta device when it was injected"):
        model.load_state_dict(small().state_dict(), assign=True)


def test_weights_can_be_assigned_instead_of_copied(disturb: Callable) -> None:
    model, other = small(), small()
    peft.inject(model, [LORA], ["head"])
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert torch.equal(model(X), other(X))
    disturb(model)
    adapted = model(X)
    with peft.disabled(model):
        assert torch.equal(model(X), other(X))
    assert torch.equal(model(X), adapted)
    trained = {id(t.param) for t in peft.trained_parameters(model)}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_switch_under_ddp_is_refused(tmp_path: Any) -> None:
    """DDP exchanges gradients of the parameters that were trained when it was made, and of no others."""
    import torch.distributed as dist

    model = small()
    peft.inject(model, [LORA], name="a")
    peft.add_adapter(model, "b")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        peft.set_adapter(wrapped, "a")  # it is active
        with pytest.raises(peft.InjectionError, match="exchanges no gradients of adapter 'b'"):
            peft.set_adapter(wrapped, "b")
    finally:
        dist.destroy_process_group()
    peft.set_adapter(model, "b")


def test_odd_layouts_and_shapes(disturb: Callable) -> None:
    model = small()
    model.body.fc1.weight = nn.Parameter(torch.randn(8, 8).t())  # type: ignore[union-attr]
    model.conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    peft.inject(model, [{**LORA, "TARGETS": ["fc1", "conv"]}])
    disturb(model)
    image = torch.randn(1, 4, 6, 6).to(memory_format=torch.channels_last)
    cases = [lambda x=x: model(x) for x in (X, X[0], X[:0], X.view(5, 1, 1, 8), X.t().contiguous().t())]
    cases.append(lambda: model.conv(image))
    expected = [case() for case in cases]
    peft.merge(model)
    for case, value in zip(cases, expected, strict=True):
        torch.testing.assert_close(case(), value, rtol=1e-5, atol=1e-5)


def calls_of(function: Callable[[], Any]) -> int:
    """How many functions of Python it calls: its time, but for what the machine does besides."""
    count = 0

    def listen(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(listen)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_a_thousand_places() -> None:
    """A switch does not depend on how many there are; all else grows with them, not with their square."""
    lora = {"NAME": "lora", "TARGETS": ["*"], "RANK": 2}

    def counts(places: int) -> tuple[int, list[int]]:
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(places)])
        made = [
            calls_of(lambda: peft.inject(model, [lora], name="a")),
            calls_of(lambda: peft.add_adapter(model, "b")),
            calls_of(lambda: (peft.merge(model), peft.unmerge(model))),
        ]
        peft.set_adapter(model, "b")
        return calls_of(lambda: peft.set_adapter(model, "a")), made

    (few_switch, few), (many_switch, many) = counts(10), counts(1000)
    assert few_switch == many_switch
    assert all(large < 150 * small for small, large in zip(few, many, strict=True)), (few, many)


@pytest.mark.parametrize(
    "entry",
    [
        {"NAME": "lora", "RANK": 10**6},
        {"NAME": "lora", "RANK_PATTERN": {"x": 10**6}},
        {"NAME": "adapter", "NUM": 10**6},
        {"NAME": "adapter", "DIM": 10**6},
        {"NAME": "adaptformer", "BOTTLENECK": 10**6},
        {"NAME": "mona", "BOTTLENECK": 10**6},
        {"NAME": "conv_lora", "RANK": 10**6},
        {"NAME": "conv_lora", "EXPERTS": 10**4},
    ],
    ids=lambda entry: "-".join(entry),
)
def test_a_typing_error_in_a_size_is_one_error_before_memory_is_taken(entry: dict[str, Any]) -> None:
    key = list(entry)[1]
    with pytest.raises(peft.MethodError, match=f"{key}.*at most"):
        peft.inject(nn.Sequential(nn.Linear(4, 4)), [{**entry, "TARGETS": ["0"]}])
