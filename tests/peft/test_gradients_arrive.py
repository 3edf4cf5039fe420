"""A gradient arrives at all that is trained, or the error says where it is lost; sound models are not accused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peft_d2
from peft_d2 import peft

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
LORA: dict[str, Any] = {"NAME": "lora", "RANK": 2}


class Model(nn.Module):
    """stem -> body (in one of several ways) -> head, and a branch for some inputs."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 3)
        self.rare = nn.ModuleDict({"cat": nn.Linear(6, 3), "dog": nn.Linear(6, 3)})
        self.way = way

    def forward(self, x: Tensor, kind: str = "") -> Any:
        x = self.stem(x)
        if self.way.endswith("checkpoint"):
            x = checkpoint(self.body, x, use_reentrant=self.way.startswith("reentrant"))
        elif self.way == "no_grad":
            with torch.no_grad():
                y = self.body(x)
            x = x + y
        elif self.way == "detach":
            x = x + self.body(x).detach()
        elif self.way == "weight read":
            x = torch.nn.functional.linear(x, self.body[0].weight)  # type: ignore[arg-type]
        elif self.way == "nan":
            x = self.body(x) / 0 * 0
        else:
            x = self.body(x)
        out = self.head(x)
        return out + self.rare[kind](x) if kind else out


WAYS = {
    "plain": "",
    "checkpoint": "",
    "reentrant checkpoint": "reentrant checkpoint behind frozen layers .give it use_reentrant=False",
    "no_grad": "no gradients are recorded: under torch.no_grad",
    "detach": "the model detaches what they give",
    "nan": "NaN, so nothing can be proved live; all weights are finite",
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("trained", ["lora", "adapter", "full", "norm and bias"])
@pytest.mark.parametrize("way", WAYS)
def test_what_no_gradient_reaches_is_named(way: str, trained: str) -> None:
    model = Model(way)
    methods: dict[str, Any] = {
        "lora": ([{**LORA, "TARGETS": ["body.0"]}], []),
        "adapter": ([{"NAME": "adapter", "TARGETS": ["body"], "REDUCTION": 2}], []),
        "full": ([], ["body"]),
        "norm and bias": ([{"NAME": "bitfit", "TARGETS": ["body"]}], []),
    }
    peft.inject(model, *methods[trained])
    before = copy.deepcopy(model.state_dict())
    flags, random = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    if WAYS[way]:
        with pytest.raises(peft.LivenessError, match=rf"(?s){'' if way == 'nan' else 'body'}.*{WAYS[way]}"):
            peft_d2.prove_live(model, X)
    else:
        peft_d2.prove_live(model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()] and torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters()) and model.training


def test_a_checkpoint_behind_trained_layers_is_sound() -> None:
    model = Model("reentrant checkpoint")
    peft.inject(model, [{**LORA, "TARGETS": ["stem", "body.0"]}])
    peft_d2.prove_live(model, X)


def test_a_weight_that_is_read_is_told_from_one_that_is_not_used() -> None:
    read, unused = Model("weight read"), Model()
    peft.inject(read, [{**LORA, "TARGETS": ["body.0"]}])
    peft.inject(unused, [{**LORA, "TARGETS": ["rare.*", "head"]}])
    with pytest.raises(peft.LivenessError, match="body.0: lora .train.*reads their weights directly"):
        peft_d2.prove_live(read, X)
    with pytest.raises(peft.LivenessError, match="rare.cat: lora .train., rare.dog.*no use for them with this batch"):
        peft_d2.prove_live(unused, X)


def test_what_one_batch_does_not_need_another_may(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    peft.inject(model, [{**LORA, "TARGETS": ["rare.cat", "head"]}], ["rare.dog"])
    found = peft.not_live(model, (X, "cat"), (X, "dog"))
    assert not found
    with caplog.at_level("INFO"):
        peft_d2.prove_live(model, (X, "cat"))  # a class that this batch does not hold is no fault
    assert (
        "2 parameters that are trained in full have no part in this batch's losses, from rare.dog.weight" in caplog.text
    )


def test_values_that_are_not_finite_are_named() -> None:
    model = Model()
    with torch.no_grad():
        model.stem.weight[0, 0] = torch.nan
    peft.inject(model, [{**LORA, "TARGETS": ["body.0"]}])
    with pytest.raises(peft.LivenessError, match="stem.weight hold values that are not finite"):
        peft_d2.prove_live(model, X)


class Detector(nn.Module):
    """As Detectron2's: losses in training, the mask head's only where there are objects."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mask_head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, batch: list[dict[str, Any]]) -> Any:
        x = self.body(batch[0]["image"])
        objects = len(batch[0]["instances"])
        if not self.training:
            return [{"instances": self.mask_head(x)[:objects]} for _ in batch]
        losses = {"loss": x.square().mean()}
        return {**losses, "loss_mask": self.mask_head(x).square().mean()} if objects else losses


@pytest.mark.parametrize("train", [[], ["mask_head"]])
def test_a_head_is_not_accused_by_an_image_without_objects(train: list[str]) -> None:
    model = Detector()
    peft.inject(model, [{**LORA, "TARGETS": ["body"] if train else ["body", "mask_head"]}], train)
    empty, full = [[{"image": X, "instances": range(count)}] for count in (0, 2)]
    for batches in ([empty], [empty, full], [full]):
        peft_d2.prove_live(model, *batches)
