"""Correlations over experts, with and without the trivial point, and their permutations."""

import math
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from divmerge_book.evaluation.statistics import CORRELATIONS
from divmerge_book.studies.correlations import (
    by_task,
    others,
    over_tasks,
    own_point_alone,
    relabelled_p,
    within_p,
)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_the_point_alone_is_worked_out_over_all_orders_of_the_others():
    closeness, accuracy = noise(4, 4), noise(4, 4, seed=1)
    found = own_point_alone(closeness, accuracy, "pearson")
    row = 2
    rest = [n for n in range(4) if n != row]
    expected = [
        np.corrcoef(
            closeness[row, [row, *rest]], [accuracy[row, row], *accuracy[row, list(order)]]
        )[0, 1]
        for order in permutations(rest)
    ]
    np.testing.assert_allclose(sorted(found[row]), sorted(expected))


def test_a_far_own_point_alone_gives_a_high_correlation():
    """One expert at distance 0 with a high accuracy, the others noise: the trivial point."""
    closeness = -(1 + 0.1 * np.abs(noise(6, 6)))
    accuracy = 0.3 + 0.01 * noise(6, 6, seed=1)
    np.fill_diagonal(closeness, 0.0)
    np.fill_diagonal(accuracy, 0.9)
    found = over_tasks(closeness, accuracy).set_index("how").loc["pearson"]
    assert found.kept > 0.95 and found.alone > 0.95 and abs(found.value) < 0.5
    assert found.within > 0.02 and found.relabelled > 0.02


@pytest.mark.parametrize("how", CORRELATIONS)
def test_relabelling_is_a_slow_loop_over_names(how):
    closeness, accuracy = noise(5, 5), noise(5, 5, seed=1)
    found = CORRELATIONS[how](others(closeness), others(accuracy)).mean()
    hits = 0
    for order in permutations(range(5)):
        moved = closeness[np.ix_(order, order)]
        hits += CORRELATIONS[how](others(moved), others(accuracy)).mean() >= found - 1e-12
    assert relabelled_p(closeness, accuracy, how) == hits / math.factorial(5)


@pytest.mark.parametrize("how", CORRELATIONS)
def test_permutations_within_tasks_find_a_relation_and_nothing_in_noise(how):
    closeness = noise(6, 6)
    assert within_p(closeness, closeness + 0.1 * noise(6, 6, seed=1), how, draws=500) < 0.01
    assert within_p(closeness, noise(6, 6, seed=3), how, draws=500) > 0.05


def test_by_task_leaves_out_the_diagonal():
    closeness, accuracy = noise(5, 5), noise(5, 5, seed=1)
    table = by_task(closeness, accuracy, list("abcde")).set_index(["how", "task"])
    moved = accuracy.copy()
    np.fill_diagonal(moved, 9.0)
    again = by_task(closeness, moved, list("abcde")).set_index(["how", "task"])
    pd.testing.assert_series_equal(table.value, again.value)
    assert (table.kept != again.kept).any() and (table.p >= 1 / 24).all()


@pytest.mark.parametrize("how", CORRELATIONS)
def test_an_expert_that_is_alike_everywhere_leaves_a_correlation_undefined(how):
    closeness, accuracy = noise(5, 5), noise(5, 5, seed=1)
    accuracy[2] = 0.3
    table = by_task(closeness, accuracy, list("abcde")).query("how == @how").set_index("task")
    assert table.loc["c", ["value", "low", "high", "p"]].isna().all()
    assert table.drop("c").p.notna().all()
    whole = over_tasks(closeness, accuracy, draws=50).set_index("how").loc[how]
    assert whole[["value", "low", "high", "within", "relabelled"]].isna().all()
