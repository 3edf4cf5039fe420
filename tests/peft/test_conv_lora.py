"""Conv-LoRA: the formula image by image, the gate's chances and what trains it, places that fit, merging refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_d2 import peft
from peft_d2.peft.conv_lora import NoisyGate, imbalance

ENTRY = {"NAME": "conv_lora", "TARGETS": ["qkv"], "PARTS": ["q", "v"], "RANK": 3, "EXPERTS": 4, "GRID": "square"}


def attention(width: int = 12) -> nn.Module:
    model = nn.Module()
    model.qkv = nn.Linear(width, 3 * width)
    return model


def disturbed(entry: dict[str, object], model: nn.Module) -> dict[str, Tensor]:
    """Inject, change every parameter, and return them by local name."""
    peft.inject(model, [entry])
    with torch.no_grad():
        for item in peft.trained_parameters(model):
            item.param.add_(0.5 * torch.randn_like(item.param))
    return {name.removeprefix("qkv."): value for name, value in peft.adapter_state_dict(model).items()}


def branch(state: dict[str, Tensor], letter: str, image: Tensor) -> tuple[Tensor, int]:
    """s B (h + E_i(h)) for one image (H, W, C), and i."""
    part = {name.removeprefix(f"{letter}."): value for name, value in state.items() if name.startswith(f"{letter}.")}
    h = torch.einsum("hwc,rc->rhw", image, part["conv_lora_down"])
    logits = [float(h.mean((1, 2)) @ part["gate.choice"][:, i]) for i in range(part["gate.choice"].shape[1])]
    i = max(range(len(logits)), key=logits.__getitem__)
    kernel, bias = part[f"experts.{i}.weight"], part[f"experts.{i}.bias"]
    large = F.interpolate(h[None], size=[(i + 1) * side for side in h.shape[1:]], mode="bicubic") if i else h[None]
    patches = F.unfold(large, 3, padding=1)[0].view(h.shape[0] * 9, -1)
    convolved = (kernel.flatten(1) @ patches + bias[:, None]).view_as(large[0])
    convolved = convolved * 0.5 * (1 + torch.erf(convolved / math.sqrt(2)))
    small = F.interpolate(convolved[None], size=h.shape[1:], mode="bicubic")[0] if i else convolved
    return torch.einsum("rhw,or->hwo", h + small, part["conv_lora_up"]), i


def test_it_is_the_formula_image_by_image() -> None:
    torch.manual_seed(0)
    model = attention().double().eval()
    x = torch.randn(12, 5, 5, 12, dtype=torch.float64) + 3 * torch.randn(12, 1, 1, 12, dtype=torch.float64)
    before = model.qkv(x)
    state = disturbed(ENTRY, model)
    expected, chosen = before.clone(), set()
    for number, image in enumerate(x):
        for letter, rows in (("q", slice(0, 12)), ("v", slice(24, 36))):
            change, i = branch(state, letter, image)
            expected[number, ..., rows] += change
            chosen.add(i)
    assert len(chosen) > 2
    torch.testing.assert_close(model.qkv(x), expected)
    torch.testing.assert_close(model.qkv(x.flatten(1, 2)), expected.flatten(1, 2))


def test_a_pointwise_convolution_is_a_linear_layer_on_an_image() -> None:
    entry = {**ENTRY, "TARGETS": ["0"], "PARTS": [], "GRID": "auto"}
    linear, x = nn.Sequential(nn.Linear(12, 8)).double().eval(), torch.randn(3, 5, 7, 12, dtype=torch.float64)
    state = disturbed(entry, linear)
    model = nn.Sequential(nn.Conv2d(12, 8, 1)).double().eval()
    model[0].load_state_dict({"weight": linear[0].weight[..., None, None], "bias": linear[0].bias})
    peft.inject(model, [entry])
    peft.load_adapter_state_dict(model, {f"0.{key.removeprefix('0.')}": value for key, value in state.items()})
    torch.testing.assert_close(model(x.movedim(-1, 1)).movedim(1, -1), linear(x))
    for kwargs in ({"stride": 2}, {"padding": 1}, {"groups": 2}):
        with pytest.raises(peft.MethodError, match="1 x 1 nn.Conv2d"):
            peft.inject(nn.Sequential(nn.Conv2d(12, 8, 1, **kwargs)), [entry])  # type: ignore[arg-type]


def test_the_start_is_the_layer_in_both_modes() -> None:
    model, x = attention(), torch.randn(3, 16, 12)
    before = model.qkv(x)
    peft.inject(model, [ENTRY])
    for mode in (True, False):
        assert torch.equal(model.train(mode).qkv(x), before)
    peft.prove_live(model, lambda m: m.qkv(x))


def test_chances_are_those_of_drawing_the_noise_again() -> None:
    torch.manual_seed(3)
    gate = NoisyGate(3, 4, {"dtype": torch.float64}).train()
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    h = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    torch.manual_seed(8)
    chosen, chances = gate(h)
    assert chances is not None
    torch.manual_seed(8)
    mean = h.mean((2, 3))
    deviation = F.softplus(mean @ gate.noise) + 0.01
    noisy = mean @ gate.choice + torch.randn(5, 4, dtype=torch.float64) * deviation
    assert torch.equal(chosen, noisy.argmax(1))
    for n in range(5):
        for i in range(4):
            rival = max(noisy[n, k].item() for k in range(4) if k != i)
            draws = (mean @ gate.choice)[n, i] + deviation[n, i] * torch.randn(20_000, dtype=torch.float64)
            assert chances[n, i].item() == pytest.approx(float((draws > rival).double().mean()), abs=0.02)


def test_the_balance_alone_trains_the_gate() -> None:
    torch.manual_seed(1)
    model, x = attention(), torch.randn(6, 16, 12)
    disturbed({**ENTRY, "PARTS": ["q"], "BALANCE": 0.5}, model)
    experts = next(m for m in model.modules() if type(m).__name__ == "ConvExperts")
    model.train()
    torch.manual_seed(5)
    (0.0 * model.qkv(x).sum()).backward()
    found = {name: p.grad.clone() for name, p in experts.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(5)
    h = F.linear(x.unflatten(1, (4, 4)), experts.conv_lora_down).permute(0, 3, 1, 2)
    load = experts.gate(h)[1].sum(0)
    (0.5 * load.var(unbiased=True) / load.mean() ** 2).backward()
    assert found["gate.choice"].abs().sum() > 0
    for name in ("gate.choice", "gate.noise", "conv_lora_down"):
        torch.testing.assert_close(found[name], dict(experts.named_parameters())[name].grad)
    model.zero_grad()
    model.eval().qkv(x).sum().backward()
    assert experts.gate.choice.grad is None


def test_every_process_has_the_same_gradients_to_share() -> None:
    model = attention()
    disturbed({**ENTRY, "BALANCE": 0.0}, model)
    model.train().qkv(torch.randn(1, 16, 12)).sum().backward()  # one map: one expert of four
    trained = peft.trained_parameters(model)
    assert all(item.param.grad is not None for item in trained)
    used = {item.name.split(".experts.")[1][0] for item in trained if "experts" in item.name and item.param.grad.any()}
    assert len(used) <= 2  # of q and of v


def test_balanced_loads_cost_nothing() -> None:
    assert imbalance(torch.full((6, 4), 0.25)) == 0
    assert imbalance(torch.eye(4)[[0, 0, 0]]) == pytest.approx(4.0)


@pytest.mark.parametrize(("parts", "weights"), [(["q", "k", "v"], 3), (["q"], 1)])
def test_counts(parts: list[str], weights: int) -> None:
    with torch.device("meta"):
        report = peft.inject(attention(768), [{**ENTRY, "PARTS": parts, "EXPERTS": 8}])
    assert report.trainable == weights * (3 * (768 + 768) + 2 * 3 * 8 + 8 * (3 * 3 * 9 + 3))


def test_no_weight_can_hold_it() -> None:
    model = attention()
    peft.inject(model, [ENTRY])
    assert peft.merge(model) == ["qkv"]  # what keeps running
    peft.unmerge(model)
    with pytest.raises(peft.InjectionError, match="no weight can hold: qkv"):
        peft.remove(model, keep=True)


@pytest.mark.parametrize(
    ("model", "change", "said"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3)), {"TARGETS": ["0"], "PARTS": []}, "Conv2d is no nn.Linear or 1 x 1"),
        (nn.MultiheadAttention(8, 2), {"TARGETS": ["out_proj"], "PARTS": []}, "no nn.Linear"),
        (nn.Sequential(nn.Linear(8, 8)), {"TARGETS": ["0"]}, "PARTS needs a fused qkv"),
        (attention(), {"PARTS": ["out"]}, "PARTS is"),
        (attention(), {"EXPERTS": 0}, "EXPERTS is 0"),
    ],
)
def test_places_and_values_that_do_not_fit(model: nn.Module, change: dict[str, object], said: str) -> None:
    with pytest.raises(peft.MethodError, match=said):
        peft.inject(model, [{**ENTRY, **change}])


def test_tokens_without_a_grid_are_named() -> None:
    model = attention()
    peft.inject(model, [{**ENTRY, "GRID": "auto"}])
    with pytest.raises(peft.MethodError, match="qkv: the image grid of its tokens"):
        model.qkv(torch.randn(1, 6, 12))
    model.H, model.W = 2, 3
    model.qkv(torch.randn(1, 6, 12))
