"""Ranking of places by gradients: against numpy's singular values, on planted changes, and within budgets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peft_d2 import peft
from peft_d2.peft.ranking import RANKS, Candidate, candidates, choose, measure, patterns_of, recommend
from peft_d2.peft.targets import ModelIndex


class Branches(nn.Module):
    """A sum of two linear maps of independent inputs, so that neither's gradient knows of the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 20, bias=False), nn.Linear(24, 20, bias=False)

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        one, two, wanted = batch
        return (self.first(one) + self.second(two) - wanted).square().sum(dim=-1).mean()


def planted(model: Branches, count: int, noise: float) -> list[tuple[tuple[Tensor, Tensor, Tensor]]]:
    """Batches of a teacher whose second map differs from the model's by a matrix of rank 2."""
    change = torch.randn(20, 2) @ torch.randn(2, 24)
    made = []
    for _ in range(count):
        one, two = torch.randn(64, 24), torch.randn(64, 24)
        wanted = model.first(one) + two @ (model.second.weight + change).t() + noise * torch.randn(64, 20)
        made.append(((one, two, wanted.detach()),))
    return made


def scalar(model: nn.Module, batch: tuple[object]) -> Tensor:
    return model(*batch)


def test_energies_are_squared_singular_values() -> None:
    """With the same batch in both halves, against numpy in float64."""
    torch.manual_seed(0)
    model = Branches()
    [batch] = planted(model, 1, noise=1.0)
    halves = measure(model, [batch, batch], scalar)
    found = {entry.names[0]: entry for entry in candidates(ModelIndex.of(model), halves)}
    for name in ("first", "second"):
        one, two, wanted = (value.double().numpy() for value in batch[0])
        weights = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
        error = one @ weights["first.weight"].T + two @ weights["second.weight"].T - wanted
        gradient = 2 / len(one) * error.T @ (one if name == "first" else two)
        expected = np.linalg.svd(gradient, compute_uv=False) ** 2
        assert found[name].cost == 20 + 24
        np.testing.assert_allclose(found[name].energies, expected[:16], rtol=2e-3)


def test_a_planted_change_is_found_with_its_rank() -> None:
    torch.manual_seed(1)
    model = Branches()
    found = recommend(model, planted(model, 16, noise=3.0), budget=2 * (20 + 24), losses=scalar)
    assert [(c.names, rank) for c, rank in found.chosen] == [(("second",), 2)]
    assert found.methods == [{"NAME": "lora", "RANK": 2, "ALPHA": 8.0, "TARGETS": ["second"]}] and not found.train
    assert found.share > 0.9 and found.parameters == 88


def test_energies_are_exact_within_autocast() -> None:
    torch.manual_seed(1)
    model = Branches()
    batches = planted(model, 4, noise=3.0)

    def exactly(model: nn.Module, batch: tuple[object]) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return scalar(model, batch)

    expected = recommend(model, batches, budget=200, losses=exactly)
    with torch.autocast("cpu", torch.bfloat16):
        found = recommend(model, batches, budget=200, losses=exactly)
    assert found.chosen == expected.chosen


class Mixed(nn.Module):
    """Convolutions (one of them in groups), a norm, an attention, linear layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3, groups=24)
        self.norm, self.attention = nn.BatchNorm2d(24), nn.MultiheadAttention(24, 4, batch_first=True)
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.depthwise(self.stem(x))).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        for block in self.blocks:
            x = x + block(x).relu()
        return {"loss": self.head(x).square().mean()}


@pytest.mark.parametrize("budget", [250, 800, 3000, 100_000])
def test_budgets_are_kept_and_what_is_proposed_can_be_injected(budget: int) -> None:
    torch.manual_seed(2)
    model = Mixed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(2, 3, 8, 8)
    found = recommend(model, [images, torch.randn(2, 3, 8, 8)] * 2, budget, train=["head"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    report = peft.inject(model, found.methods, train=found.train)
    assert report.trainable == found.parameters <= budget
    assert found.train[0] == "head"
    if budget == 100_000:  # everything has a gradient but the attention's key bias
        assert {entry["NAME"] for entry in found.methods} == {"lora"} and found.share > 0.99
        assert "depthwise.weight" in found.train and "norm.weight" in found.train
        assert [entry["TARGETS"] for entry in found.methods if "PARTS" in entry] == [["attention"]]
    peft.prove_live(model, images)


CANDIDATES = st.lists(
    st.one_of(
        st.builds(
            lambda cost, energy: Candidate(("f",), "full", cost, (energy,)), st.integers(1, 90), st.floats(0.1, 9)
        ),
        st.builds(
            lambda cost, energies: Candidate(("l",), "linear", cost, tuple(sorted(energies, reverse=True))),
            st.integers(1, 9),
            st.lists(st.floats(0.1, 9), min_size=1, max_size=20),
        ),
    ),
    max_size=6,
)


@given(CANDIDATES, st.integers(0, 200))
def test_nothing_that_would_fit_is_left_out(found: list[Candidate], budget: int) -> None:
    """Not even where something too large for the budget comes before it."""
    chosen = {id(candidate): rank for candidate, rank in choose(found, budget)}
    left = budget - sum(c.cost * (chosen[id(c)] or 1) for c in found if id(c) in chosen)
    assert left >= 0
    for candidate in found:
        if id(candidate) not in chosen:
            assert candidate.cost * (1 if candidate.kind == "full" else 2) > left
        elif (rank := chosen[id(candidate)]) and rank < len(candidate.energies):
            larger = next((one for one in RANKS if one > rank), rank + 1)
            assert candidate.cost * (larger - rank) > left


def test_an_attention_whose_projection_is_trained_anyway() -> None:
    torch.manual_seed(2)
    model = Mixed()
    found = recommend(model, [torch.randn(2, 3, 8, 8)] * 2, 100_000, train=["attention.out_proj"])
    report = peft.inject(model, found.methods, train=found.train)
    assert report.trainable == found.parameters and "attention.in_proj_weight" in found.train


def test_what_cannot_be() -> None:
    model = Mixed()
    batches = [torch.randn(1, 3, 8, 8)] * 2
    with pytest.raises(peft.InjectionError, match="TRAIN alone has 125 parameters and the budget is 100"):
        recommend(model, batches, 100, train=["head"])
    with pytest.raises(peft.InjectionError, match="expected two or more"):
        recommend(model, batches[:1], 1000)
    with pytest.raises(peft.PatternError, match="haed"):
        recommend(model, batches, 1000, train=["haed"])
    with pytest.raises(peft.InjectionError, match="batches is a DataLoader: give a list of some of them"):
        recommend(model, DataLoader(torch.randn(4, 3, 8, 8)), 1000)  # type: ignore[arg-type]
    for losses, said in (
        (lambda model, batch: torch.stack([*model(batch).values()] * 2), r"a tensor \(2,\): expected one number"),
        (lambda model, batch: torch.ones(()), r"a tensor \(\) without a gradient"),
        (lambda model, batch: 1.0, "the loss is a float"),
    ):
        with pytest.raises(peft.InjectionError, match=said):
            recommend(model, batches, 1000, losses=losses)
    one = recommend(model, batches, 1000)
    assert recommend(model, batches, 1000, losses=lambda model, batch: model(batch)).methods == one.methods  # a dict
    peft.inject(model, one.methods, one.train)
    with pytest.raises(peft.InjectionError, match="injected already"):
        recommend(model, batches, 1000)


def test_patterns_choose_exactly_the_names() -> None:
    known = ["a.0.w", "a.1.w", "a.2.w", "b.0.w", "w", "b.w"]
    for names in (["a.0.w", "a.1.w", "a.2.w"], ["a.0.w", "a.2.w"], ["w"], ["b.w", "w"], known):
        patterns = patterns_of(names, known)
        chosen = {name for pattern in patterns for name in peft.targets.match(pattern, known)}
        assert chosen == set(names)
    assert patterns_of(["a.0.w", "a.1.w", "a.2.w"], known) == ["a.*.w"]
