"""COBOT, LoRA and AdaptFormer against the published implementation: dense quaternion matrices, outputs, gradients,
counts.

``goldens/cobot.npz`` holds arrays computed by the published SAM-COBOT code on deterministic weights; names are that
code's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_d2 import peft
from peft_d2.peft.cobot import QuaternionLinear

BLOCKS, INDEX = 4, 2


@pytest.fixture(scope="module")
def golden() -> Mapping[str, Tensor]:
    with np.load(Path(__file__).parent / "goldens" / "cobot.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.mark.parametrize("case", ["primes", "r4", "r16", "rect8to12"])
def test_quaternion_matrices(case: str, golden: Mapping[str, Tensor]) -> None:
    r = golden[f"quat.{case}.r"]
    layer = QuaternionLinear(4 * r.shape[0], 4 * r.shape[1], {})
    layer.load_state_dict({letter: golden[f"quat.{case}.{letter}"] for letter in "rijk"})
    dense = golden[f"quat.{case}.dense_in_out"]
    torch.testing.assert_close(layer.dense(), dense)
    torch.testing.assert_close(layer(torch.eye(dense.shape[0])), dense)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = Mlp(width, hidden)


def vit(width: int, hidden: int, blocks: int) -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList(Block(width, hidden) for _ in range(blocks))
    return model


def names_of_lora(cobot: bool) -> dict[str, str]:
    """Ours -> the golden's, for the block under test."""
    prefix = f"blocks.{INDEX}.qkv."
    names = {}
    for letter, number in (("q", 1), ("v", 2)):
        names[f"{prefix}{letter}.lora_a"] = f"linear_a_{letter}.weight"
        names[f"{prefix}{letter}.lora_b"] = f"linear_b_{letter}.weight"
        if cobot:
            for part in "rijk":
                names[f"{prefix}{letter}.cobot.mix.{part}"] = f"FacT_d{number}.{part}_weight"
    return names


def load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    state = dict(peft.adapter_state_dict(model))
    assert tensors.keys() <= state.keys()
    peft.load_adapter_state_dict(model, {**state, **tensors})


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {t.name: t.param.grad for t in peft.trained_parameters(model) if t.param.grad is not None}


@pytest.mark.parametrize("cobot", [False, True])
def test_lora_on_qkv(cobot: bool, golden: Mapping[str, Tensor]) -> None:
    variant = f"lora_cobot.block{INDEX}" if cobot else "lora"
    weights = {name.split(".w.")[1]: value for name, value in golden.items() if name.startswith(f"{variant}.w.")}
    model = vit(48, 192, BLOCKS)
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["qkv"], "PARTS": ["q", "v"], "RANK": 4, "COBOT": cobot}])
    block = model.blocks[INDEX]
    with torch.no_grad():
        block.qkv.weight.copy_(weights["qkv.weight"])
        block.qkv.bias.copy_(weights["qkv.bias"])
    names = names_of_lora(cobot)
    load(model, {ours: weights[theirs] for ours, theirs in names.items()})
    if cobot:
        shared = {"coefficients": weights["FacT_c"][0], "relation": weights["FacT_p"]}
        load(model, {f"blocks.0.qkv.q.cobot.space.{name}": value for name, value in shared.items()})
        q, v = (f"blocks.{INDEX}.qkv.{letter}.cobot.gamma" for letter in "qv")
        load(model, {q: weights["gamma"][:4], v: weights["gamma"][4:]})
    x = golden["x"].clone().requires_grad_()
    out = block.qkv(x)
    torch.testing.assert_close(out, golden[f"{variant}.out"], rtol=0, atol=1e-4)
    (out * golden["g_qkv"]).sum().backward()
    torch.testing.assert_close(x.grad, golden[f"{variant}.grad.x"], rtol=1e-4, atol=1e-3)
    found = gradients(model)
    for ours, theirs in names.items():
        torch.testing.assert_close(found[ours], golden[f"{variant}.grad.{theirs}"], rtol=1e-4, atol=1e-3)
    if cobot:
        gamma = torch.cat([found[f"blocks.{INDEX}.qkv.{letter}.cobot.gamma"] for letter in "qv"])
        torch.testing.assert_close(gamma, golden[f"{variant}.grad.gamma"], rtol=1e-4, atol=1e-3)
        for name, theirs in (("coefficients", "FacT_c"), ("relation", "FacT_p")):
            mine = found[f"blocks.0.qkv.q.cobot.space.{name}"]
            torch.testing.assert_close(mine, golden[f"{variant}.grad.{theirs}"].view_as(mine), rtol=1e-4, atol=1e-3)
    peft.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(block.qkv(x), golden[f"{variant}.out"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("cobot", [False, True])
def test_adaptformer_beside_the_mlp(cobot: bool, golden: Mapping[str, Tensor]) -> None:
    variant = f"adaptformer_cobot.block{INDEX}" if cobot else "adaptformer"
    weights = {name.split(".w.")[1]: value for name, value in golden.items() if name.startswith(f"{variant}.w.")}
    model = vit(48, 192, BLOCKS).eval()
    block = model.blocks[INDEX]
    block.mlp.load_state_dict({name[4:]: value for name, value in weights.items() if name.startswith("mlp.")})
    peft.inject(model, [{"NAME": "adaptformer", "TARGETS": ["mlp"], "BOTTLENECK": 16, "COBOT": cobot}])
    prefix = f"blocks.{INDEX}.mlp.adaptformer_"
    names = {
        f"{prefix}{ours}.{leaf}": f"{theirs}.{leaf}"
        for ours, theirs in (("norm", "adapter_layer_norm_before"), ("down", "down_proj"), ("up", "up_proj"))
        for leaf in ("weight", "bias")
    }
    shared = {}
    if cobot:
        names |= {f"{prefix}cobot.mix.{part}": f"FacT_d1.{part}_weight" for part in "rijk"}
        names[f"{prefix}cobot.gamma"] = "gamma"
        first = "blocks.0.mlp.adaptformer_cobot.space."
        shared = {f"{first}coefficients": "FacT_c", f"{first}relation": "FacT_p"}
        load(model, {f"{first}coefficients": weights["FacT_c"][0], f"{first}relation": weights["FacT_p"]})
    load(model, {ours: weights[theirs] for ours, theirs in names.items()})
    x = golden["x"].clone().requires_grad_()
    out = block.mlp(x)
    torch.testing.assert_close(out, golden[f"{variant}.out"], rtol=0, atol=1e-4)
    (out * golden["g_mlp"]).sum().backward()
    torch.testing.assert_close(x.grad, golden[f"{variant}.grad.x"], rtol=1e-4, atol=1e-3)
    found = gradients(model)
    for ours, theirs in (names | shared).items():
        expected = golden[f"{variant}.grad.{theirs}"]
        torch.testing.assert_close(found[ours], expected.view_as(found[ours]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"NAME": "lora", "TARGETS": ["qkv"], "PARTS": ["q", "v"], "RANK": 4}, 147_456),
        ({"NAME": "lora", "TARGETS": ["qkv"], "PARTS": ["q", "v"], "RANK": 4, "COBOT": True}, 148_320),
        ({"NAME": "adaptformer", "TARGETS": ["mlp"], "BOTTLENECK": 16}, 322_752),
        ({"NAME": "adaptformer", "TARGETS": ["mlp"], "BOTTLENECK": 16, "COBOT": True}, 324_048),
    ],
)
def test_counts_on_vit_b(entry: dict[str, object], expected: int) -> None:
    with torch.device("meta"):
        report = peft.inject(vit(768, 3072, 12), [entry])
    assert report.trainable == expected


def test_one_space_and_what_it_refuses() -> None:
    model = vit(48, 96, 2)
    entry = {"NAME": "lora", "TARGETS": ["qkv"], "PARTS": ["q", "v"], "RANK": 4, "COBOT": True}
    for change, said in (({"RANK": 6}, "multiple of 4"), ({"RANK_PATTERN": {"blocks.1.qkv": 8}}, "same RANK")):
        with pytest.raises(peft.MethodError, match=said):
            peft.inject(model, [{**entry, **change}])
    peft.inject(model, [entry])
    spaces = {id(m) for m in model.modules() if type(m).__name__ == "CobotSpace"}
    assert len(spaces) == 1


LORA = {"NAME": "lora", "TARGETS": ["qkv"], "PARTS": ["q", "v"], "RANK": 4}
ADAPTFORMER = {"NAME": "adaptformer", "TARGETS": ["mlp"], "BOTTLENECK": 16, "DROPOUT": 0.0}
# Switches, and by hand what they add to LoRA (T = 24 places of V = 4) and AdaptFormer (12 of 16) on the ViT-B:
# V T of coefficients, T T of the relation, V per place of own coefficients, V V / 4 or V V per place of the layer.
SWITCHES = {
    "all": ({}, 96 + 576 + 96 + 96, 192 + 144 + 192 + 768),
    "no communication": ({"COBOT_COEFFICIENTS": "none"}, 96, 768),
    "no enhancement": ({"COBOT_MIX": "none"}, 96 + 576 + 96, 192 + 144 + 192),
    "shared sets alone": ({"COBOT_COEFFICIENTS": "shared"}, 96 + 576 + 96, 192 + 144 + 768),
    "own sets alone": ({"COBOT_COEFFICIENTS": "own"}, 96 + 96, 192 + 768),
    "fixed relation": ({"COBOT_RELATION": "fixed"}, 96 + 96 + 96, 192 + 192 + 768),
    "random relation": ({"COBOT_RELATION": "random"}, 96 + 96 + 96, 192 + 192 + 768),
    "linear layer": ({"COBOT_MIX": "linear"}, 96 + 576 + 96 + 384, 192 + 144 + 192 + 3072),
}


@pytest.mark.parametrize("case", SWITCHES)
@pytest.mark.parametrize("kind", ["lora", "adaptformer"])
def test_counts_of_the_ablations(case: str, kind: str) -> None:
    keys, *added = SWITCHES[case]
    entry, plain, more = (LORA, 147_456, added[0]) if kind == "lora" else (ADAPTFORMER, 322_752, added[1])
    with torch.device("meta"):
        report = peft.inject(vit(768, 3072, 12), [{**entry, "COBOT": True, **keys}])
    assert report.trainable == plain + more


def published(t: int, sets: list[Tensor], layer: Tensor | None, h: Tensor, relation: Tensor | None) -> Tensor:
    """h' of place t, written out: ``sets`` are C (V, T) and gamma (V,), as far as they are there."""
    total = torch.zeros(h.shape[-1], dtype=h.dtype)
    for coefficients in sets:
        if coefficients.dim() == 1:
            total += coefficients
        elif relation is None:
            total += coefficients[:, t]
        else:
            total += sum(coefficients[:, other] * relation[other, t] for other in range(len(relation)))
    scaled = h * total if sets else h
    return scaled if layer is None else scaled @ layer


@pytest.mark.parametrize("case", SWITCHES)
def test_outputs_of_the_ablations(case: str) -> None:
    keys = SWITCHES[case][0]
    model = vit(48, 96, 3).double()
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    before = model.blocks[INDEX].qkv(x)
    peft.inject(model, [{**LORA, "COBOT": True, **keys}])
    assert torch.equal(model.blocks[INDEX].qkv(x), before)  # whatever is switched off, the start is the base
    with torch.no_grad():
        for tensor in peft.trained_parameters(model):
            tensor.param.add_(torch.randn_like(tensor.param))
    state = {name.removeprefix("blocks."): value for name, value in peft.adapter_state_dict(model).items()}
    expected = before.detach().clone()
    for number, letter in enumerate("qv"):
        here, space = f"{INDEX}.qkv.{letter}.", "0.qkv.q.cobot.space."
        sets = [state[n] for n in (f"{space}coefficients", f"{here}cobot.gamma") if n in state]
        layer = state[f"{here}cobot.mix.weight"].t() if "linear" in case else None
        if f"{here}cobot.mix.r" in state:
            r, i, j, k = (state[f"{here}cobot.mix.{part}"] for part in "rijk")
            layer = torch.cat([torch.cat(c) for c in ((r, -i, -j, -k), (i, r, -k, j), (j, k, r, -i), (k, -j, i, r))], 1)
        low = published(2 * INDEX + number, sets, layer, x @ state[f"{here}lora_a"].t(), state.get(f"{space}relation"))
        rows = slice(0, 48) if letter == "q" else slice(96, 144)
        expected[..., rows] += low @ state[f"{here}lora_b"].t()
    torch.testing.assert_close(model.blocks[INDEX].qkv(x), expected)
    peft.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model.blocks[INDEX].qkv(x), expected)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"COBOT_MIX": "none", "COBOT_COEFFICIENTS": "none"}, "COBOT_MIX is 'none': expected a layer"),
        ({"COBOT_MIX": "quarternion"}, "COBOT_MIX is 'quarternion': expected one of quaternion, linear, none"),
        ({"COBOT_RELATION": "fixed", "COBOT_COEFFICIENTS": "own"}, "COBOT_RELATION is 'fixed'"),
        ({"COBOT_RELATION": "random", "COBOT_COEFFICIENTS": "own"}, "COBOT_RELATION is 'random'"),
        ({"COBOT_COEFFICIENTS": True}, "COBOT_COEFFICIENTS is True, expected a value of type str"),
        ({"COBOT": False, "COBOT_MIX": "linear"}, "COBOT is False: expected true where another COBOT_ key is set"),
    ],
)
def test_switches_that_make_no_sense(keys: dict[str, object], said: str) -> None:
    with pytest.raises(peft.MethodError, match=said):
        peft.inject(vit(48, 96, 2), [{**LORA, "COBOT": True, **keys}])


def test_a_random_relation_is_stored_and_never_trained() -> None:
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(vit(48, 96, 3))
        peft.inject(made[-1], [{**LORA, "COBOT": True, "COBOT_RELATION": "random"}])
    first, second = (peft.adapter_state_dict(model) for model in made)
    [name] = [name for name in first if name.endswith("relation")]
    assert not torch.equal(first[name], second[name]) and first[name].shape == (6, 6)
    assert not any(tensor.name == name for tensor in peft.trained_parameters(made[0]))
    peft.load_adapter_state_dict(made[1], first)
    assert torch.equal(peft.adapter_state_dict(made[1])[name], first[name])


def test_a_linear_layer_takes_any_width() -> None:
    peft.inject(vit(48, 96, 2), [{**LORA, "RANK": 6, "COBOT": True, "COBOT_MIX": "linear"}])
    peft.inject(vit(48, 96, 2), [{**ADAPTFORMER, "BOTTLENECK": 6, "COBOT": True, "COBOT_MIX": "none"}])


def test_any_stack_of_blocks() -> None:
    """torch's own encoder: its attentions hold two places each, its feed-forward layers one."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 32)
    before = model(x)
    shared = {"NAME": "lora", "RANK": 4, "COBOT": True}
    entry = {**shared, "TARGETS": ["layers.*.self_attn", "layers.*.linear1"], "PARTS": ["q", "v"]}
    with pytest.raises(peft.MethodError, match="PARTS needs a fused qkv"):
        peft.inject(model, [entry])
    report = peft.inject(model, [{**entry, "PARTS": []}])
    places = 3 * (2 + 1)
    factors = 3 * (2 * 4 * (32 + 32) + 4 * (32 + 64))
    assert report.trainable == factors + 4 * places + places**2 + 4 * places + 4 * places
    torch.testing.assert_close(model(x), before)
    peft.prove_live(model, lambda m: m(x))


def test_a_convolution_is_refused() -> None:
    with pytest.raises(peft.MethodError, match="COBOT does not apply to a convolution"):
        peft.inject(nn.Sequential(nn.Conv2d(3, 8, 3)), [{"NAME": "lora", "TARGETS": ["0"], "RANK": 4, "COBOT": True}])
