"""Rank correlations over pairs of tasks: views, the bootstrap and Mantel's test, by hand."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from divmerge_book.studies.mantel import VIEWS, correlate, entries, rank_correlations
from test_statistics import generator


def matrices(count: int = 5, seed: int = 0) -> np.ndarray:
    """One method, one column, one seed: a matrix [1, 1, 1, T, T] with NaN on the diagonal."""
    values = generator(seed).normal(size=(1, 1, 1, count, count))
    values[..., np.eye(count, dtype=bool)] = np.nan
    return values


BY_HAND = np.array([[np.nan, 1.0, 5.0], [3.0, np.nan, 4.0], [7.0, 0.0, np.nan]])
VALUES = {"task": [1, 5, 3, 4, 7, 0], "pair": [2, 6, 2, 2, 6, 2]}
VALUES["partner"] = [-2, 2, -0.5, 0.5, 3.5, -3.5]


def test_views_by_hand():
    for view in VIEWS:  # in units of the largest
        assert (7 * entries(BY_HAND, view)).tolist() == pytest.approx(VALUES[view])
    twice = 7 * entries(BY_HAND, "task", np.array([0, 0, 2]))
    assert twice.tolist() == pytest.approx([5, 5, 7, 7]), "no pair of a task with itself"


def test_what_only_the_own_task_decides_says_nothing_about_partners():
    own = np.repeat(np.array([[1.0], [2.0], [4.0]]), 3, axis=1)
    assert not entries(own, "partner").any()
    assert not entries(own - own.T, "pair").any(), "a ratio of two tasks has no mean over a pair"


def test_rank_correlations_are_those_of_pandas():
    numbers, damages = generator().normal(size=(2, 3, 12)), generator(1).normal(size=(2, 4, 12))
    found = rank_correlations(numbers, damages)
    for m, k, n in np.ndindex(found.shape):
        slow = pd.Series(numbers[m, k]).rank().corr(pd.Series(damages[m, n]).rank())
        assert found[m, k, n] == pytest.approx(slow)


@pytest.mark.parametrize("view", VIEWS)
def test_a_number_ranks_any_growing_function_of_itself_perfectly(view):
    number = matrices()
    damage = number if view != "task" else np.exp(number)
    found = correlate(number, damage, view=view, draws=50)
    for value in (found.value, found.low, found.high):
        assert value.item() == pytest.approx(1)
    assert correlate(-number, damage, view=view, draws=50).value.item() == pytest.approx(-1)


def test_the_permutation_test_by_hand():
    number, damage = matrices(4), matrices(4, seed=1)
    found = correlate(number, damage, view="task", draws=24)
    apart, null = ~np.eye(4, dtype=bool), []
    for order in permutations(range(4)):
        moved = damage[0, 0, 0][np.ix_(order, order)]
        one, other = (pd.Series(some[apart]).rank() for some in (number[0, 0, 0], moved))
        null.append(one.corr(other))
    assert found.value.item() == pytest.approx(null[0])
    sizes = np.abs(null)
    expected = np.mean(sizes >= sizes[0] - 1e-9)
    assert found.p.item() == found.p_max.item() == pytest.approx(expected)
    assert found.threshold == pytest.approx(sorted(sizes)[-2]), "one of 24 may lie above"


def test_the_correction_takes_the_largest_of_all_numbers_and_damages():
    numbers = np.concatenate([matrices(4, seed) for seed in range(6)], axis=1)
    damages = np.concatenate([matrices(4, seed) for seed in (20, 21)], axis=1)
    every = correlate(numbers, damages, view="task", draws=24)
    alone = correlate(numbers[:, :1], damages[:, :1], view="task", draws=24)
    assert (every.p_max >= every.p - 1e-12).all()
    assert every.p[0, 0, 0] == alone.p.item() and every.threshold >= alone.threshold


def test_what_exceeds_the_threshold_is_what_the_corrected_test_finds():
    for seed in range(8):
        number = matrices(4, seed)
        damage = number + 0.3 * matrices(4, seed + 50)
        found = correlate(number, damage, view="task", draws=24)
        assert (abs(found.value.item()) > found.threshold + 1e-9) == (found.p_max.item() <= 0.05)


def test_unrelated_numbers_are_called_found_about_as_often_as_promised():
    hits = [
        correlate(matrices(4, n), matrices(4, n + 500), view="task", draws=24).p.item() <= 0.125
        for n in range(100)
    ]
    assert 0.125 - 4 * (0.125 * 0.875 / 100) ** 0.5 < np.mean(hits) < 0.125 + 0.1


def test_seeds_are_averaged_and_their_spread_widens_the_interval():
    number = matrices(6)
    noisy = number + generator(3).normal(size=(1, 1, 3, 6, 6))
    found = correlate(np.repeat(number, 3, axis=2), noisy, view="task", draws=200)
    mean = correlate(number, noisy.mean(2, keepdims=True), view="task", draws=200)
    assert found.value.item() == pytest.approx(mean.value.item())
    assert found.low.item() < found.value.item() < found.high.item()


def test_two_tasks_and_unknown_views_are_refused():
    with pytest.raises(ValueError, match="three tasks or more"):
        correlate(matrices(2), matrices(2), view="task")
    with pytest.raises(ValueError, match="unknown view"):
        correlate(matrices(), matrices(), view="wide")
