"""LoRA on every kind of layer: the formula, merging, files, precisions, compilers, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_d2
from peft_d2 import peft
from peft_d2.adapters import save_merged


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


WORDS = torch.tensor([[1, 5, 0, 3], [2, 2, 4, 6]])
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(6, 4), numbers(2, 5, 6)),
    "conv 1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1), numbers(2, 4, 9)),
    "conv 2d": (lambda: nn.Conv2d(4, 6, (3, 1), 1, "same", dilation=(2, 1)), numbers(2, 4, 6, 7)),
    "conv 3d": (lambda: nn.Conv3d(4, 6, 3, (1, 2, 2), (1, 0, 1)), numbers(1, 4, 5, 6, 5)),
    "conv 1d in groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), numbers(2, 4, 9)),
    "conv 3d depthwise": (lambda: nn.Conv3d(4, 4, 2, groups=4, bias=False), numbers(1, 4, 3, 4, 3)),
    "conv 2d around the edge": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), numbers(1, 4, 5, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1), numbers(2, 4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 2, 2), numbers(2, 4, 3, 5)),
    "transposed 2d dilated": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 1, False, 2), numbers(1, 4, 4, 3)),
    "transposed 2d in groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), numbers(1, 4, 4, 3)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 2, 2), numbers(1, 4, 2, 3, 2)),
    "transposed without a batch": (lambda: nn.ConvTranspose2d(4, 6, 2, 2), numbers(4, 3, 5)),
    "conv without a batch": (lambda: nn.Conv2d(4, 6, 3), numbers(4, 5, 5)),
    "embedding": (lambda: nn.Embedding(7, 6), WORDS),
    "embedding with padding": (lambda: nn.Embedding(7, 6, padding_idx=0), WORDS),
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {}, "rslora": {"RSLORA": True}, "dora": {"DORA": True}, "pissa": {"INIT": "pissa"},
    "A frozen": {"FREEZE_A": True},
    "dora and pissa": {"DORA": True, "INIT": "pissa"},
}  # fmt: skip
both = pytest.mark.parametrize("layer", LAYERS)


def adapted(layer: str, dtype: torch.dtype = torch.float64, **keys: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, x = LAYERS[layer]
    model = nn.ModuleDict({"m": make()}).to(dtype).eval()
    peft_d2.inject(model, [{"NAME": "lora", "TARGETS": ["m"], "RANK": 2, "ALPHA": 3, **keys}])
    return model, x.to(dtype) if x.is_floating_point() else x


def kernels(module: Any, weight: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """(place in the weight, row) of each output's row of the weight, found by loops: the matrix that LoRA changes."""
    if isinstance(module, nn.Embedding):
        return [((slice(None), j), weight[:, j]) for j in range(weight.shape[1])]  # type: ignore[misc]
    if not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return [((i,), weight[i]) for i in range(len(weight))]
    inside, out = module.in_channels // module.groups, module.out_channels // module.groups
    return [
        ((slice(g * inside, (g + 1) * inside), o), weight[g * inside : (g + 1) * inside, o])  # type: ignore[misc]
        for g in range(module.groups)
        for o in range(out)
    ]


def dense(model: nn.Module, variant: dict[str, Any]) -> Tensor:
    """The changed weight by the formula."""
    module: Any = model["m"]  # type: ignore[index]
    state = peft.adapter_state_dict(model)
    weight = module.weight.detach().clone()
    a = next(v for k, v in state.items() if k.endswith("_a")).flatten(1)
    b = next(v for k, v in state.items() if k.endswith("_b")).flatten(1)
    scale = 3 / 2**0.5 if variant.get("RSLORA") else 1.5
    for i, (place, row) in enumerate(kernels(module, module.weight.detach())):
        change = b[i] @ a
        if variant.get("INIT") == "pissa":
            change = change - state["m.lora_b_start"].flatten(1)[i] @ state["m.lora_a_start"].flatten(1)
        new = row.flatten() + scale * change
        if variant.get("DORA"):
            new = new * state["m.lora_magnitude"][i] / new.norm()
        weight[place] = new.view(row.shape)
    return weight


@pytest.mark.parametrize("variant", VARIANTS)
@both
def test_the_formula_its_gradients_and_merging(layer: str, variant: str, disturb: Callable) -> None:
    if "embedding" in layer and variant == "A frozen":
        with pytest.raises(peft.PeftError, match="FREEZE_A leaves nothing to train in an nn.Embedding"):
            adapted(layer, FREEZE_A=True)
        return
    model, x = adapted(layer, **VARIANTS[variant])
    base: Any = copy.deepcopy(model)
    peft.remove(base)
    start = base["m"](x)
    torch.testing.assert_close(model["m"](x), start, rtol=1e-12, atol=1e-12)  # type: ignore[index]
    disturb(model)
    weight = dense(model, VARIANTS[variant])
    base["m"].weight.data.copy_(weight)
    expected = base["m"](x)
    assert (expected - start).abs().max() > 1e-2
    forms = []
    part: Any = model["m"].peft["default"]["lora"]  # type: ignore[index]
    for form in (True, False) if getattr(part, "has_branch", False) else (True,):
        part.in_weight_space = form
        model.zero_grad()
        out = model["m"](x)  # type: ignore[index]
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        out.square().sum().backward()
        forms.append([item.param.grad for item in peft.trained_parameters(model)])
        assert all(gradient is not None and bool(gradient.any()) for gradient in forms[-1])
    torch.testing.assert_close(forms[0], forms[-1], rtol=1e-9, atol=1e-9)
    stored = model["m"].weight.clone()  # type: ignore[index]
    peft.merge(model)
    torch.testing.assert_close(model["m"].weight.data, weight, rtol=1e-10, atol=1e-10)  # type: ignore[index]
    torch.testing.assert_close(model["m"](x), expected, rtol=1e-10, atol=1e-10)  # type: ignore[index]
    peft.unmerge(model)
    assert torch.equal(model["m"].weight, stored)  # type: ignore[index]
    peft.prove_live(model, lambda m: m["m"](x))  # type: ignore[index]


@both
def test_dora_where_outputs_died(layer: str) -> None:
    """Rows of zeros, as pretrained CNNs have them, stay what they are at the start, and can be trained."""
    make, x = LAYERS[layer]
    model = nn.ModuleDict({"m": make()}).double().eval()
    x = x.double() if x.is_floating_point() else x
    module: Any = model["m"]
    with torch.no_grad():
        for place, _ in kernels(module, module.weight)[:2]:
            module.weight[place] = 0
        expected = module(x)
    peft_d2.inject(model, [{"NAME": "lora", "TARGETS": ["m"], "RANK": 2, "DORA": True}])
    torch.testing.assert_close(model["m"](x), expected, rtol=1e-10, atol=1e-10)
    peft.prove_live(model, lambda m: m["m"](x))
    trained = [item.param for item in peft.trained_parameters(model)]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        (model["m"](x) - 1).square().sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in trained)
    found = model["m"](x)
    peft.merge(model)
    torch.testing.assert_close(model["m"](x), found, rtol=1e-10, atol=1e-10)


@both
def test_files(layer: str, tmp_path: Path, disturb: Callable) -> None:
    model, x = adapted(layer, torch.float32, DORA=True)
    disturb(model)
    expected = model["m"](x)  # type: ignore[index]
    peft_d2.save_adapter(model, tmp_path / "adapter")
    other = nn.ModuleDict({"m": LAYERS[layer][0]()}).eval()
    other["m"].load_state_dict({k: v for k, v in model["m"].state_dict().items() if "peft" not in k})  # type: ignore[index]
    peft_d2.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other["m"](x), expected)
    save_merged(other, tmp_path / "merged.pth")
    plain = nn.ModuleDict({"m": LAYERS[layer][0]()}).eval()
    plain.load_state_dict(torch.load(tmp_path / "merged.pth")["model"])
    torch.testing.assert_close(plain["m"](x), expected, rtol=1e-4, atol=1e-5)


@both
def test_copies_and_pickles(layer: str, disturb: Callable) -> None:
    model, x = adapted(layer)
    disturb(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin["m"](x), model["m"](x))  # type: ignore[index]
        disturb(twin)
        assert not torch.equal(twin["m"](x), model["m"](x))  # type: ignore[index]


@both
def test_half_precision_bases_and_autocast(layer: str, disturb: Callable) -> None:
    for variant in ({}, {"DORA": True}):
        model, x = adapted(layer, torch.bfloat16, **variant)
        assert all(item.param.dtype == torch.float32 for item in peft.trained_parameters(model))
        disturb(model)
        exact: Any = copy.deepcopy(model).double()
        expected = exact["m"](x.double() if x.is_floating_point() else x)
        out = model["m"](x)  # type: ignore[index]
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.05)
        out.float().square().sum().backward()
        whole, x = adapted(layer, torch.float32, **variant)
        base: Any = copy.deepcopy(whole)
        peft.remove(base)
        disturb(whole)
        with torch.autocast("cpu", torch.bfloat16):
            assert whole["m"](x).dtype == base["m"](x).dtype  # type: ignore[index]
            whole["m"](x).float().square().sum().backward()  # type: ignore[index]
        assert all(item.param.grad is not None for item in peft.trained_parameters(whole))


@pytest.mark.parametrize("variant", [{}, {"DORA": True}], ids=["plain", "dora"])
@both
def test_export_and_compile(layer: str, variant: dict[str, Any], disturb: Callable) -> None:
    model, x = adapted(layer, torch.float32, **variant)
    disturb(model)
    module = model["m"]  # type: ignore[index]
    expected = module(x)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert all(item.param.grad is not None for item in peft.trained_parameters(model))


def test_dropout_is_on_the_branch_alone() -> None:
    for layer in ("linear", "conv 1d", "transposed 2d"):
        model, x = adapted(layer, DROPOUT=0.5, INIT="xavier")
        model.train()
        outs = torch.stack([model["m"](x) for _ in range(2000)])  # type: ignore[index]
        model.eval()
        torch.testing.assert_close(outs.mean(0), model["m"](x), rtol=0.2, atol=0.2)  # type: ignore[index]
        assert (outs[0] - outs[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("layer", "keys", "said"),
    [
        ("embedding", {"DROPOUT": 0.1}, "DROPOUT does not apply to an nn.Embedding"),
        ("embedding", {"COBOT": True, "RANK": 4}, "COBOT does not apply to an nn.Embedding"),
        ("embedding", {"PARTS": ["q"]}, "PARTS does not apply to an nn.Embedding"),
        ("transposed 2d", {"COBOT": True, "RANK": 4}, "COBOT does not apply to a convolution"),
        ("conv 3d", {"PARTS": ["q"]}, "PARTS does not apply to a convolution"),
        ("transposed 2d in groups", {"DROPOUT": 0.1}, "DROPOUT needs a branch"),
        ("conv 2d around the edge", {"DROPOUT": 0.1}, "DROPOUT needs a branch"),
        ("transposed 1d", {"INIT": "pissa", "RANK": 7}, "RANK 7 exceeds"),
        ("embedding", {"INIT": "pissa", "RANK": 7}, "RANK 7 exceeds"),
    ],
)
def test_what_does_not_go_together(layer: str, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(peft.MethodError, match=said):
        adapted(layer, **keys)


def test_an_embedding_that_rewrites_its_weight_is_refused() -> None:
    with pytest.raises(peft.MethodError, match="max_norm rewrites"):
        peft_d2.inject(nn.ModuleDict({"m": nn.Embedding(4, 4, max_norm=1.0)}), [{"NAME": "lora", "TARGETS": ["m"]}])


@pytest.mark.parametrize(
    "keys",
    [
        {"ALPHA": float("nan")}, {"ALPHA": float("inf")}, {"ALPHA": 0.0}, {"ALPHA": -1.0}, {"ALPHA": True},
        {"ALPHA_PATTERN": {"m": "8"}}, {"ALPHA_PATTERN": {"m": None}}, {"ALPHA_PATTERN": {"m": float("nan")}},
        {"RANK_PATTERN": {"m": 2.0}}, {"RANK_PATTERN": {"m": True}}, {"RANK_PATTERN": {"m": 0}}, {"RANK": 0},
        {"DROPOUT": float("nan")}, {"DROPOUT": 1.0}, {"INIT": "best"}, {"PARTS": ["w"]},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_no_lora_has(keys: dict[str, Any]) -> None:
    model = nn.ModuleDict({"m": nn.Linear(4, 4)})
    with pytest.raises(peft.MethodError, match=next(iter(keys)).partition("_")[0]):
        peft_d2.inject(model, [{"NAME": "lora", "TARGETS": ["m"], **keys}])


def test_a_padding_word_stays_as_it_is() -> None:
    model, x = adapted("embedding with padding")
    optimizer = torch.optim.SGD([item.param for item in peft.trained_parameters(model)], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model["m"](x).square().sum().backward()  # type: ignore[index]
        optimizer.step()
    assert not bool(model["m"](torch.tensor(0)).any())  # type: ignore[index]
    peft.merge(model)
    assert not bool(model["m"].weight[0].any())  # type: ignore[index]


def test_an_output_size_can_be_given(disturb: Callable) -> None:
    model = nn.ModuleDict({"m": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)}).double()
    peft_d2.inject(model, [{"NAME": "lora", "TARGETS": ["m"], "RANK": 2}])
    disturb(model)
    x = numbers(2, 4, 5, 5).double()
    for size in ([9, 10], [10, 10]):
        out = model["m"](x, output_size=size)
        assert list(out.shape[2:]) == size
        peft.merge(model)
        torch.testing.assert_close(model["m"](x, output_size=size), out)
        peft.unmerge(model)


def test_a_pattern_that_ends_in_a_wildcard_reaches_what_it_always_reached() -> None:
    """Adapters and configs made before LoRA knew these layers mean what they meant."""

    def model() -> nn.Module:
        made = {"fc": nn.Linear(4, 4), "up": nn.ConvTranspose2d(4, 4, 1), "words": nn.Embedding(3, 4)}
        return nn.ModuleDict({"m": nn.ModuleDict(made)})

    for targets, places in (
        (["m.*"], ["m.fc"]), (["m.**"], ["m.fc"]), (["**"], ["m.fc"]), (["re:m.*"], ["m.fc"]),
        (["m.*", "up"], ["m.fc", "m.up"]), (["*.{up,words}"], ["m.up", "m.words"]), ([r"re:m\.up"], ["m.up"]),
    ):  # fmt: skip
        report = peft_d2.inject(model(), [{"NAME": "lora", "TARGETS": targets, "RANK": 2}])
        assert [place.name for place in report.places] == places
    with pytest.raises(peft.MethodError, match="passes over ConvTranspose2d; name it outright"):
        peft_d2.inject(nn.ModuleDict({"m": nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, 1)})}),
                       [{"NAME": "lora", "TARGETS": ["m.*"]}])  # fmt: skip


@both
def test_inputs_by_name(layer: str, disturb: Callable) -> None:
    model, x = adapted(layer)
    disturb(model)
    assert torch.equal(model["m"](input=x), model["m"](x))  # type: ignore[index]


@pytest.mark.parametrize("kind", ["linear", "svd"])
@both
def test_a_weighted_combination(layer: str, kind: str, disturb: Callable) -> None:
    model, x = adapted(layer)
    peft.add_adapter(model, "other", [{"NAME": "lora", "TARGETS": ["m"], "RANK": 3, "INIT": "pissa"}])
    base = model["m"].weight.detach().clone()  # type: ignore[index]
    changes = {}
    for name in ("default", "other"):
        peft_d2.set_adapter(model, name)
        disturb(model)
        peft.merge(model)
        changes[name] = model["m"].weight.detach() - base  # type: ignore[index]
        peft.unmerge(model)
    peft.combine_adapters(model, {"default": 0.5, "other": -2.0}, "mix", kind, rank=6)
    peft_d2.set_adapter(model, "mix")
    expected = base + 0.5 * changes["default"] - 2 * changes["other"]
    out = model["m"](x)  # type: ignore[index]
    peft.merge(model)
    torch.testing.assert_close(model["m"].weight.data, expected, rtol=1e-9, atol=1e-9)  # type: ignore[index]
    torch.testing.assert_close(model["m"](x), out, rtol=1e-9, atol=1e-9)  # type: ignore[index]
    with peft_d2.disabled(model):
        assert torch.equal(model["m"].weight, base)  # type: ignore[index]


@pytest.mark.parametrize(
    "module",
    [nn.Linear(4, 6), nn.Conv1d(4, 6, 1), nn.Conv2d(4, 6, 1), nn.ConvTranspose2d(4, 6, 1)],
    ids=lambda module: type(module).__name__,
)
def test_autocast_does_not_swallow_a_small_change(module: Any) -> None:
    """Added to a weight of ones in bfloat16, a change of a thousandth would be nothing."""
    peft_d2.inject(nn.ModuleDict({"m": module}), [{"NAME": "lora", "TARGETS": ["m"], "RANK": 2}])
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    x = torch.ones(1000, 4) if isinstance(module, nn.Linear) else torch.ones(2, 4, *[8] * (module.weight.dim() - 2))
    with torch.no_grad():
        module.bias.zero_()
        rows = module.weight.flatten(1) if not isinstance(module, nn.ConvTranspose2d) else module.weight[..., 0, 0].t()
        rows.copy_(signs.expand(6, 4))
        for value in module.peft_parameters().values():
            value.fill_(0.02)
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x).float()
    torch.testing.assert_close(out, torch.full_like(out, 4 * 2 * 0.02**2), rtol=0.02, atol=0.0)
