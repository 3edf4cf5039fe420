"""Traps measured on other tools. Each test shows the naive result beside ours, so that it fails where the trap is
back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from peft_d2 import peft


def test_one_of_two_targets_mistyped(toy: nn.Module) -> None:
    with pytest.raises(peft.PatternError, match="'porj' matches no module. Nearest names: .*proj"):
        peft.inject(toy, [{"NAME": "lora", "TARGETS": ["fc1", "porj"]}])


@pytest.mark.parametrize("gradients", [True, False])
def test_lora_on_out_proj_has_an_effect(gradients: bool, disturb: Callable) -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)}).eval().requires_grad_(False)
    x = torch.randn(2, 3, 8)
    with torch.set_grad_enabled(gradients):
        before = model["attn"](x, x, x)[0]
        peft.inject(model, [{"NAME": "lora", "TARGETS": ["out_proj"], "RANK": 2}])
        assert peft.adapter_state_dict(model).keys() == {"attn.out.lora_a", "attn.out.lora_b"}
        torch.testing.assert_close(model["attn"](x, x, x)[0], before, rtol=0, atol=1e-6)
        disturb(model)
        assert not torch.allclose(model["attn"](x, x, x)[0], before, atol=1e-3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("target", ["linear1", "linear2", "self_attn", "out_proj"])
@pytest.mark.parametrize("padded", [False, True])
def test_lora_inside_torchs_encoder_in_eval_without_gradients(target: str, padded: bool, disturb: Callable) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None

    def run(gradients: bool) -> Tensor:
        with torch.set_grad_enabled(gradients):
            return model(x, src_key_padding_mask=mask)[:, :3]

    base = run(False)
    peft.inject(model, [{"NAME": "lora", "TARGETS": [target], "RANK": 2}])
    torch.testing.assert_close(run(False), base)
    disturb(model)
    adapted = run(False)
    assert not torch.allclose(adapted, base, atol=1e-3)
    torch.testing.assert_close(adapted, run(True))
    with peft.disabled(model):
        assert torch.equal(run(False), base)  # the fast path is back, to the bit
    peft.merge(model)
    torch.testing.assert_close(run(False), adapted)  # and merged weights take it too
    peft.unmerge(model)
    peft.remove(model)
    assert torch.equal(run(False), base)


def test_an_adapter_inside_torchs_encoder_in_eval_without_gradients(disturb: Callable) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).eval()
    model = nn.ModuleDict({"layer": model})
    peft.inject(model, [{"NAME": "adapter", "TARGETS": ["self_attn", "dropout2"], "REDUCTION": 2}])
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        before = model["layer"](x)
        disturb(model)
        assert not torch.allclose(model["layer"](x), before, atol=1e-3)


def test_q_k_v_out_are_chosen_one_by_one() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=6, vdim=4)})
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["attn"], "PARTS": ["k"], "RANK": 2}])
    shapes = {name: tuple(value.shape) for name, value in peft.adapter_state_dict(model).items()}
    assert shapes == {"attn.k.lora_a": (2, 6), "attn.k.lora_b": (8, 2)}


def test_a_frozen_half_precision_attention_does_not_drift(disturb: Callable) -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2)}).bfloat16()
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["attn"], "RANK": 2}])
    disturb(model)
    before = peft.frozen_hash(model)
    naive = model["attn"].in_proj_weight.clone()
    delta = (0.01 * torch.randn(naive.shape)).bfloat16()
    x = torch.randn(3, 1, 16).bfloat16()
    for _ in range(100):
        model["attn"](x, x, x)
        naive += delta
        naive -= delta
    assert not torch.equal(naive, model["attn"].in_proj_weight)  # rewriting and undoing loses bits
    assert peft.frozen_hash(model) == before


def test_base_weights_load_after_injection_under_their_own_names(toy: nn.Module, images: Tensor) -> None:
    other = type(toy)().eval().requires_grad_(False)
    peft.inject(
        toy, [{"NAME": "lora", "TARGETS": ["proj", "self_attn", "stem"]}, {"NAME": "adapter", "TARGETS": ["mlp"]}]
    )
    result = toy.load_state_dict(other.state_dict(), strict=False)
    assert result.missing_keys == [] and result.unexpected_keys == []
    with torch.no_grad():
        assert torch.equal(toy(images), other(images))


def test_shared_heads_stay_one(toy: nn.Module, disturb: Callable) -> None:
    peft.inject(toy, [], ["box_again.0"])
    disturb(toy)
    state = toy.state_dict()
    for alias in ("box.fc1.weight", "box_again.0.fc1.weight", "box_again.1.fc1.weight"):
        assert torch.equal(state[alias], toy.box.fc1.weight)  # type: ignore[union-attr, arg-type]
    assert [name for name in peft.adapter_state_dict(toy) if "again" in name] == []


def test_an_adapter_of_another_rank_is_refused(toy: nn.Module) -> None:
    other = copy.deepcopy(toy)
    peft.inject(toy, [{"NAME": "lora", "TARGETS": ["proj"], "RANK": 4}])
    peft.inject(other, [{"NAME": "lora", "TARGETS": ["proj"], "RANK": 2}])
    with pytest.raises(peft.AdapterStateError, match=r"blocks.0.proj.lora_a: \(2, 16\) given, \(4, 16\) expected"):
        peft.load_adapter_state_dict(toy, peft.adapter_state_dict(other))


def test_injecting_twice_is_refused(toy: nn.Module) -> None:
    entry = {"NAME": "lora", "TARGETS": ["proj"]}
    peft.inject(toy, [entry])
    with pytest.raises(peft.InjectionError, match="injected already"):
        peft.inject(toy, [entry])
