"""Checkpoints of earlier releases, with and without the version that upstream decides by."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def old_form(state: dict[str, Any], queries: bool = True, prefix: bool = True) -> dict[str, Any]:
    renamed = {}
    for key, value in state.items():
        if queries:
            key = key.replace("predictor.query_feat.", "predictor.static_query.")
        if prefix:
            key = key.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.")
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("queries", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_every_form_loads_whole(small: Any, queries: bool, prefix: bool) -> None:
    model, other = small(), small()
    state = old_form(dict(model.state_dict()), queries, prefix)  # a plain dict: no version metadata
    other.load_state_dict(state, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert list(model.upgrade_state_dict(state)) == list(model.state_dict())


def test_a_mix_of_forms_loads(small: Any) -> None:
    model, other = small(), small()
    state = dict(model.state_dict())
    half = old_form({key: value for i, (key, value) in enumerate(state.items()) if i % 2})
    rest = {key: value for i, (key, value) in enumerate(state.items()) if not i % 2}
    assert not half.keys() <= state.keys()  # some of it has old names
    different = [name for name, value in other.state_dict().items() if not torch.equal(value, state[name])]
    assert any("pixel_decoder" in name for name in different) and any("query_feat" in name for name in different)
    other.load_state_dict({**rest, **half}, strict=True)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_both_forms_of_one_weight_are_not_taken_silently(small: Any) -> None:
    model = small()
    state = dict(model.state_dict())
    state["sem_seg_head.predictor.static_query.weight"] = torch.zeros(6, 32)
    result = small().load_state_dict(state, strict=False)
    assert result.unexpected_keys == ["sem_seg_head.predictor.static_query.weight"] and not result.missing_keys


def test_other_keys_are_left_alone(small: Any) -> None:
    model = small()
    state = {"backbone.static_query.weight": 1, "criterion.empty_weight": 2, "module.sem_seg_head.x": 3}
    assert model.upgrade_state_dict(state) == state


def test_loading_does_not_change_the_callers_dict(small: Any) -> None:
    state = old_form(dict(small().state_dict()))
    before = list(state)
    small().load_state_dict(state)
    assert list(state) == before
