"""The order of batches and the random numbers of samples."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_d2.data.loader import BatchOrder, sample_seed


def _take(count, groups, batch, seed=0, **more):
    return list(islice(BatchOrder(groups, batch, seed, **more), count))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=20),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 12),
    st.integers(0, 99),
)
def test_any_start_and_any_number_of_ranks_see_the_same(groups, share, world, start, seed):
    batch = share * world
    whole = _take(start + 4, groups, batch, seed)
    ranks = [_take(4, groups, batch, seed, start=start, rank=r, world=world) for r in range(world)]
    for iteration in range(4):
        joined = [draw for rank in ranks for draw in rank[iteration]]
        assert joined == whole[start + iteration]
    assert [d.number for b in whole for d in b] == list(range((start + 4) * batch))


def test_batches_are_of_one_group_and_no_image_starves():
    groups = [0] * 7 + [1] * 3
    batches = _take(60, groups, 4)
    assert all(len({groups[d.record] for d in batch}) == 1 for batch in batches)
    seen = Counter(d.record for batch in batches for d in batch)
    assert set(seen) == set(range(10))
    assert max(seen.values()) - min(seen.values()) <= 3


def test_an_epoch_shows_every_image_once_and_epochs_differ():
    batches = [[d.record for d in b] for b in _take(4, [0] * 8, 4)]
    first, second = batches[0] + batches[1], batches[2] + batches[3]
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


def test_repeats_are_kept_on_average():
    repeats = [1.0, 2.5, 1.0, 3.0]
    seen = Counter(d.record for b in _take(750, [0] * 4, 4, repeats=repeats) for d in b)
    share = np.array([seen[i] for i in range(4)]) / sum(seen.values())
    assert share == pytest.approx(np.array(repeats) / sum(repeats), abs=0.02)


@pytest.mark.parametrize(("groups", "batch", "world", "message"), [([], 2, 1, "no image"), ([0], 3, 2, "dealt out")])
def test_impossible_orders_are_refused(groups, batch, world, message):
    with pytest.raises(ValueError, match=message):
        BatchOrder(groups, batch, 0, world=world)


def test_sample_seed_rules_three_generators_and_gives_them_back():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    values = []
    for seed, number in ((1, 5), (1, 5), (1, 6), (2, 5)):
        with sample_seed(seed, number):
            values.append(draw())
    assert values[0] == values[1]
    for k in range(3):
        assert len({v[k] for v in values[1:]}) == 3
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
