"""Dead parts are found and named, live ones are not accused, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from peft_d2 import peft
from peft_d2.memory import fit_memory


class Functional(nn.Module):
    """Reads a projection's weight without calling it, skips a layer in eval, and never uses another."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)
        self.train_only = nn.Linear(4, 4)
        self.without_gradients = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = F.linear(self.norm(self.called(x)), self.read.weight, self.read.bias)
        if self.training:
            y = y + self.train_only(x)
        if torch.is_grad_enabled():
            y = y + self.without_gradients(x)
        return {"masks": [y > 0], "scores": y, "count": 3}


def test_dead_parts_are_named_by_mode() -> None:
    model = Functional()
    methods = [
        {"NAME": "lora", "TARGETS": ["called", "read", "train_only", "without_gradients"], "RANK": 2},
        {"NAME": "adapter", "TARGETS": ["called", "read"], "REDUCTION": 2},
    ]
    peft.inject(model, methods)
    x = torch.randn(64, 4)
    forward = lambda m: m(x)  # noqa: E731
    assert [item.name for item in peft.not_live(model, forward) if item.mode == "eval" and item.is_fault] == [
        "read: lora",
        "read: adapter",
        "train_only: lora",
        "without_gradients: lora",
    ]
    with pytest.raises(peft.DeadPartError, match=r"read: lora \(train\), read: adapter \(train\)"):
        peft.prove_live(model, forward)


@pytest.mark.parametrize(
    "entry",
    [
        {"NAME": "lora", "TARGETS": ["self_attn"], "PARTS": ["q", "k", "v", "out"]},
        {"NAME": "lora", "TARGETS": ["proj", "stem", "conv"], "DORA": True},
        {"NAME": "adapter", "TARGETS": ["self_attn", "dropout", "neck"], "NUM": 2},
        {"NAME": "adaptformer", "TARGETS": ["mlp"], "BOTTLENECK": 4, "COBOT": True},
        {"NAME": "mona", "TARGETS": ["stem"], "BOTTLENECK": 4},
    ],
    ids=lambda entry: entry["NAME"],
)
def test_live_parts_pass_and_nothing_is_changed(entry: dict[str, Any], toy: nn.Module, images: Tensor) -> None:
    peft.inject(toy, [entry], ["stem.norm"])
    toy.train()
    before = {name: value.clone() for name, value in toy.state_dict().items()}
    modes = [module.training for module in toy.modules()]
    random = torch.get_rng_state()
    peft.prove_live(toy, lambda model: model(images))
    assert all(torch.equal(value, before[name]) for name, value in toy.state_dict().items())
    assert modes == [module.training for module in toy.modules()]
    assert torch.equal(random, torch.get_rng_state()) and all(p.grad is None for p in toy.parameters())


def test_what_modules_count_is_as_before(toy: nn.Module, images: Tensor) -> None:
    """Detectron2's RetinaNet divides its losses by a running average that is a plain number."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.toy, self.average = toy, 100.0

        def forward(self, batch: list[dict[str, Any]]) -> Tensor:
            self.average = 0.9 * self.average
            self.last = batch[0].pop("image")
            return sum(value.sum() for value in tree_leaves(self.toy(self.last))) / self.average

    model, batch = Counting(), [{"image": images}]
    peft.inject(model, [{"NAME": "lora", "TARGETS": ["toy.*.proj"]}])
    peft.prove_live(model, batch)
    fit_memory(model, batch, None)
    assert model.average == 100 and not hasattr(model, "last") and batch[0]["image"] is images


def test_a_detached_output_proves_nothing(toy: nn.Module, images: Tensor) -> None:
    """No gradient arrives, whatever the output does when the adapter is changed by hand."""
    peft.inject(toy, [{"NAME": "adapter", "TARGETS": ["self_attn"]}])
    with pytest.raises(peft.LivenessError, match="layers.0.self_attn: adapter .train.*no gradient reaches them"):
        peft.prove_live(toy, lambda model: {"classes": model(images).detach().mul(1000).round().long()})


def test_a_merged_model_has_nothing_to_prove(toy: nn.Module, images: Tensor) -> None:
    peft.inject(toy, [{"NAME": "lora", "TARGETS": ["proj"]}])
    peft.merge(toy)
    with pytest.raises(peft.InjectionError, match="unmerge"):
        peft.prove_live(toy, lambda model: model(images))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_encoder_of_torch_is_live_in_eval(disturb: Callable) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
    peft.inject(
        model,
        [
            {"NAME": "lora", "TARGETS": ["linear1", "linear2", "self_attn", "out_proj"], "RANK": 2},
            {"NAME": "adapter", "TARGETS": ["dropout2", "norm1"], "REDUCTION": 2},
        ],
    )
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    x = torch.randn(2, 5, 8)
    peft.prove_live(model, lambda m: m(x, src_key_padding_mask=padding)[:, :3])
