"""Entries of METHODS and TRAIN: what is refused and how it is said, what the report shows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn

from peft_d2 import peft

LINEAR: list[dict[str, Any]] = [{"NAME": "lora", "TARGETS": ["proj", "mlp.{fc1,fc2}"], "RANK": 4, "ALPHA": 8}]


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
        ([{"NAME": "lora", "TARGETS": ["blocks.0.norm*"]}], [], peft.MethodError, r"is none of nn.Linear.*types\)$"),
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
    assert not any(isinstance(m, peft.Adapted) for m in toy.modules())


@pytest.mark.parametrize("name", ["", "a.b", "train", "keys"])
def test_names_that_cannot_name_an_adapter(name: str, toy: nn.Module) -> None:
    with pytest.raises(peft.InjectionError, match="cannot name an adapter"):
        peft.inject(toy, LINEAR, name=name)


def test_report_counts_and_prints(toy: nn.Module) -> None:
    base = sum(p.numel() for p in toy.parameters())
    report = peft.inject(toy, LINEAR, ["head"])
    injected = 2 * (4 * 32 + 4 * 48 + 4 * 48)
    assert (report.total, report.injected, report.trainable) == (base + injected, injected, injected + 85)
    assert report.percent == 100 * report.trainable / report.total
    assert sum(row.total for row in report.rows) == report.total
    text = str(report)
    for part in ("lora on 6 Linear: 1,024 parameters, blocks.0.proj", "trained in full: head", "blocks.1", "%"):
        assert part in text
    record = peft.get_injection(toy)
    assert record is not None and record.methods[0]["RANK"] == 4 and record.current.train == ["head"]
    copied = copy.deepcopy(record)
    assert copied == record and len(copied.current.places) == 6


def test_rank_and_alpha_per_pattern(toy: nn.Module) -> None:
    entry = {"NAME": "lora", "TARGETS": ["proj", "fc1"], "RANK": 8, "ALPHA": 8}
    peft.inject(toy, [{**entry, "RANK_PATTERN": {"blocks.0.proj": 2, "fc1": 4}, "ALPHA_PATTERN": {"fc1": 16}}])
    state = peft.adapter_state_dict(toy)
    found = {name: value.shape[0] for name, value in state.items() if name.endswith("lora_a")}
    expected = {"blocks.0.proj": 2, "blocks.1.proj": 8, "blocks.0.mlp.fc1": 4, "box.fc1": 4}
    assert {name: found[f"{name}.lora_a"] for name in expected} == expected
    assert toy.blocks[0].mlp.fc1.peft["default"]["lora"].scale == 4  # type: ignore[union-attr, index]
    assert toy.blocks[0].proj.peft["default"]["lora"].scale == 4  # type: ignore[union-attr, index]
