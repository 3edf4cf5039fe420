"""An adapted model's calls in any order: what an adapter computes is what it computed when it was trained last."""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import peft_d2
from peft_d2 import peft

ENTRIES: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "lora": ([{"NAME": "lora", "TARGETS": ["proj", "conv", "self_attn"], "RANK": 2}], []),
    "dora and heads": ([{"NAME": "lora", "TARGETS": ["qkv", "stem"], "DORA": True}], ["head", "neck.2"]),
    "pissa": ([{"NAME": "lora", "TARGETS": ["mlp.fc1", "conv"], "INIT": "pissa", "RANK": 2}], []),
    "adapters": ([{"NAME": "adapter", "TARGETS": ["self_attn", "box", "dropout"], "NUM": 2}], ["layers.1.norm"]),
    "mixed": (
        [
            {"NAME": "lora", "TARGETS": ["mlp.fc1", "box.fc1"]},
            {"NAME": "adaptformer", "TARGETS": ["mlp"], "BOTTLENECK": 2},
        ],
        ["head"],
    ),
    "bitfit": ([{"NAME": "bitfit", "TARGETS": ["blocks.*"]}], []),
    "heads": ([], ["head"]),
}
NAMES = ["default", "a", "b"]
entries, names = st.sampled_from(list(ENTRIES)), st.sampled_from(NAMES)


class AnyOrder(RuleBasedStateMachine):
    """``expected`` holds each adapter's output, recorded when it was trained or loaded last."""

    def __init__(self, toy: nn.Module, images: Tensor, folder: Path) -> None:
        super().__init__()
        self.model, self.images, self.folder = copy.deepcopy(toy), images, folder
        self.state = copy.deepcopy(toy.state_dict())
        self.base = self.output()
        self.expected: dict[str, Tensor] = {}
        self.stored: dict[str, tuple[str, Tensor]] = {}  # folder -> its adapter's entry and output
        self.entry: dict[str, str] = {}
        self.active, self.merged = "", False

    @torch.no_grad()
    def output(self) -> Tensor:
        return self.model(self.images)

    def full(self, name: str) -> list[str]:
        return ENTRIES[self.entry[name]][1]

    @initialize(entry=entries)
    def inject(self, entry: str) -> None:
        peft_d2.inject(self.model, *copy.deepcopy(ENTRIES[entry]))
        self.active, self.merged, self.entry = "default", False, {"default": entry}
        self.expected = {"default": self.base}

    @rule(name=names, entry=entries)
    def add(self, name: str, entry: str) -> None:
        if name in self.entry or self.merged:
            with pytest.raises(peft.PeftError, match=r"already|merged"):
                peft.add_adapter(self.model, name, *copy.deepcopy(ENTRIES[entry]))
            return
        peft.add_adapter(self.model, name, *copy.deepcopy(ENTRIES[entry]))
        self.entry[name], self.expected[name] = entry, self.base

    @rule(name=names)
    def switch(self, name: str) -> None:
        if name not in self.entry or self.merged:
            with pytest.raises(peft.PeftError, match=r"no adapter|merged"):
                peft_d2.set_adapter(self.model, name)
            return
        peft_d2.set_adapter(self.model, name)
        self.active = name

    @precondition(lambda self: not self.merged)
    @rule()
    def train(self) -> None:
        parameters = [item for item in self.model.parameters() if item.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        self.model.train()
        for _ in range(2):
            optimizer.zero_grad()
            self.model(self.images).square().mean().backward()
            optimizer.step()
        optimizer.zero_grad()
        self.model.eval()
        self.expected[self.active] = self.output()

    @rule()
    def merge(self) -> None:
        if self.merged:
            with pytest.raises(peft.PeftError, match="merged"):
                peft_d2.merge(self.model)
            return
        peft_d2.merge(self.model)
        self.merged = True

    @rule()
    def unmerge(self) -> None:
        peft_d2.unmerge(self.model)
        self.merged = False

    @rule(name=names)
    def delete(self, name: str) -> None:
        if name not in self.entry or name == self.active:
            with pytest.raises(peft.PeftError, match=r"no adapter|is active"):
                peft.delete_adapter(self.model, name)
            return
        peft.delete_adapter(self.model, name)
        del self.entry[name], self.expected[name]

    @rule(name=names, file=st.sampled_from(["x", "y"]))
    def save(self, name: str, file: str) -> None:
        if name not in self.entry:
            with pytest.raises(peft.PeftError, match="no adapter"):
                peft_d2.save_adapter(self.model, self.folder / file, name=name)
            return
        peft_d2.save_adapter(self.model, self.folder / file, name=name)
        self.stored[file] = (self.entry[name], self.expected[name])

    @precondition(lambda self: self.stored)
    @rule(name=names, data=st.data())
    def load(self, name: str, data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(sorted(self.stored)))
        entry, output = self.stored[file]
        if self.merged or self.entry.get(name, entry) != entry:
            with pytest.raises((peft.PeftError, ValueError)):
                peft_d2.load_adapter(self.model, self.folder / file, name=name)
            return
        peft_d2.load_adapter(self.model, self.folder / file, name=name)
        self.entry[name], self.expected[name] = entry, output

    @rule()
    def disable(self) -> None:
        with peft_d2.disabled(self.model):
            assert torch.equal(self.output(), self.base)
            for call in (peft_d2.merge, peft.remove, lambda model: peft_d2.set_adapter(model, "default")):
                if call is not peft_d2.merge and self.active == "default":
                    continue
                with pytest.raises(peft.PeftError, match=r"disabled"):
                    call(self.model)

    @rule()
    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)

    @rule()
    def pickle(self) -> None:
        self.model = pickle.loads(pickle.dumps(self.model))

    @precondition(lambda self: not self.merged)
    @rule()
    def load_own_state(self) -> None:
        self.model.load_state_dict(copy.deepcopy(self.model.state_dict()))

    @precondition(lambda self: not self.merged)
    @rule()
    def load_base_again(self) -> None:
        kept = {key: value for key, value in self.state.items() if not self.is_full(key)}
        self.model.load_state_dict(kept, strict=False)

    def is_full(self, key: str) -> bool:
        return any(key.startswith(part) for name in self.entry for part in self.full(name)) or "bitfit" in {
            *self.entry.values()
        }

    @rule(entry=entries)
    def begin_again(self, entry: str) -> None:
        peft.remove(self.model)
        assert torch.equal(self.output(), self.base)
        assert list(self.model.state_dict()) == list(self.state)
        assert all(torch.equal(value, self.state[key]) for key, value in self.model.state_dict().items())
        self.inject(entry)

    @precondition(lambda self: self.active)
    @invariant()
    def outputs(self) -> None:
        expected = self.expected[self.active]
        if self.merged:
            torch.testing.assert_close(self.output(), expected, atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(self.output(), expected)

    @precondition(lambda self: self.active)
    @invariant()
    def what_is_trained(self) -> None:
        trained = {id(item.param) for item in peft.trained_parameters(self.model)}
        assert trained == {id(item) for item in self.model.parameters() if item.requires_grad}
        report = peft.make_report(self.model)
        assert sum(item.param.numel() for item in peft.trained_parameters(self.model)) == report.trainable > 0

    @precondition(lambda self: self.active)
    @invariant()
    def base_of_it(self) -> None:
        found = peft.base_values(self.model)
        assert found.keys() == self.state.keys()
        assert all(torch.equal(value, self.state[key]) for key, value in found.items())


def test_calls_in_any_order(toy: nn.Module, images: Tensor, tmp_path: Path) -> None:
    def start() -> AnyOrder:
        return AnyOrder(toy, images, Path(tempfile.mkdtemp(dir=tmp_path)))

    run_state_machine_as_test(
        start, settings=settings(max_examples=40, stateful_step_count=20, deadline=None, derandomize=True)
    )
