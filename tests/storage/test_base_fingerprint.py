"""The fingerprint tells bases apart, and says how they differ."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from peft_d2.storage import disk
from peft_d2.storage.disk import Fingerprint, difference, fingerprint

STATE = {
    "stem.weight": torch.linspace(-1, 1, 24).reshape(2, 3, 4),
    "head.weight": torch.ones(3, 2),
    "index": torch.arange(5),
    "scalar": torch.tensor(2.5),
}


def test_it_depends_on_values_alone() -> None:
    base = fingerprint(STATE)
    same = {name: value.clone() for name, value in reversed(STATE.items())}
    same["stem.weight"] = STATE["stem.weight"].double()
    same["head.weight"] = torch.ones(2, 3).t()
    same["index"] = STATE["index"].int()
    other = fingerprint(same)
    assert (base.structure, base.weights) == (other.structure, other.weights) and not difference(base, other)


def test_every_single_value_counts() -> None:
    base = fingerprint(STATE)
    for name, value in STATE.items():
        for position in range(value.numel()):
            changed = value.clone()
            changed.view(-1)[position] += 1e-6 if value.is_floating_point() else 1
            other = fingerprint({**STATE, name: changed})
            assert other.structure == base.structure and other.weights != base.weights
            assert difference(base, other) == f"same structure, other weights: 1 of 4 tensors differ: {name}"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({**STATE, "more": torch.ones(1)}, "1 tensors not expected: more"),
        ({n: v for n, v in STATE.items() if n != "index"}, "1 tensors missing: index"),
        ({**STATE, "head.weight": torch.ones(5, 2)}, "1 other shapes: head.weight (3x2 -> 5x2)"),
        ({f"x{i}": torch.ones(1) for i in range(9)}, "9 tensors not expected: x0, x1, x2, x3, x4, x5 and 3 more"),
    ],
)
def test_other_structures_are_named(other: dict[str, torch.Tensor], message: str) -> None:
    assert message in difference(fingerprint(STATE), fingerprint(other))


def test_what_is_trained_counts_by_shape_alone() -> None:
    trained = {**STATE, "head.weight": torch.zeros(3, 2)}
    expected, found = fingerprint(STATE, trained=["head.weight"]), fingerprint(trained)
    assert not difference(expected, found) and not difference(found, expected)
    assert expected.weights == fingerprint(trained, trained=["head.weight"]).weights
    assert difference(expected, fingerprint({**trained, "head.weight": torch.zeros(4, 2)}))


def test_a_memo_changes_nothing_but_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every change of a value is seen, that of a bit as that of an order, and by ways that torch does not count."""
    state = {**STATE, "large": torch.randn(5000), "half": torch.randn(33).half(), "view": torch.arange(9.0)[1:],
             "flags": torch.tensor([True, False])}  # fmt: skip
    memo: dict[str, Any] = {}
    assert fingerprint(state, memo=memo) == fingerprint(state)
    hashed: list[torch.Tensor] = []
    original = disk._hash
    monkeypatch.setattr(disk, "_hash", lambda tensor: hashed.append(tensor) or original(tensor))
    assert fingerprint({name: value.clone() for name, value in state.items()}, memo=memo) == fingerprint(state)
    assert len(hashed) == len(state), "of those without a memo alone"
    state["large"].data[4999] += 1e-6
    state["view"].numpy()[0] = 5
    state["flags"].data.logical_not_()
    state["half"][[3, 30]] = state["half"][[30, 3]]
    assert fingerprint(state, memo=memo) == fingerprint(state)
    state["large"] = state["large"].flip(0)
    assert fingerprint(state, memo=memo) == fingerprint(state)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_another_dtype_is_named(kind: torch.dtype) -> None:
    base = {"a.weight": torch.randn(40), "b.weight": torch.ones(3)}
    rounded = {name: value.to(kind) for name, value in base.items()}
    stored = Fingerprint.from_json(json.loads(json.dumps(fingerprint(rounded).to_json())))
    name = str(kind).removeprefix("torch.")
    assert f"that were float32 when the adapter was saved are {name} here" in difference(fingerprint(base), stored)
    assert f"that were {name} when the adapter was saved are float32 here" in difference(stored, fingerprint(base))
    assert not difference(stored, fingerprint(rounded)) and not difference(
        fingerprint({"b": torch.ones(3)}), fingerprint({"b": torch.ones(3).to(kind)})
    )


def test_large_tensors_are_hashed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fingerprint(STATE)
    monkeypatch.setattr(disk, "_CHUNK", 3)
    assert fingerprint(STATE) == whole
