"""Correlations over experts, with and without the trivial point, and their permutations."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from divmerge_book.evaluation.statistics import CORRELATIONS
from divmerge_book.studies import correlations
from divmerge_book.studies.correlations import by_task, others, over_tasks, relabelled_p, within_p
from test_statistics import noise

CLOSENESS, ACCURACY = noise(5, 5), noise(5, 5, seed=1)


def test_the_point_alone_is_worked_out_over_all_orders_of_the_others():
    found, rest = correlations.own_point_alone(CLOSENESS, ACCURACY, "pearson"), [0, 1, 3, 4]
    x, own = CLOSENESS[2, [2, *rest]], ACCURACY[2]
    expected = [np.corrcoef(x, [own[2], *own[list(order)]])[0, 1] for order in permutations(rest)]
    np.testing.assert_allclose(sorted(found[2]), sorted(expected))


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
    found = [
        CORRELATIONS[how](others(CLOSENESS[np.ix_(order, order)]), others(ACCURACY)).mean()
        for order in permutations(range(5))
    ]
    share = np.mean(np.array(found) >= found[0] - 1e-12)
    assert relabelled_p(CLOSENESS, ACCURACY, how) == pytest.approx(share)


@pytest.mark.parametrize("how", CORRELATIONS)
def test_permutations_within_tasks_find_a_relation_and_nothing_in_noise(how):
    closeness = noise(6, 6)
    assert within_p(closeness, closeness + 0.1 * noise(6, 6, seed=1), how, draws=500) < 0.01
    assert within_p(closeness, noise(6, 6, seed=3), how, draws=500) > 0.05


def test_by_task_leaves_out_the_diagonal():
    table, moved = by_task(CLOSENESS, ACCURACY, list("abcde")), ACCURACY.copy()
    np.fill_diagonal(moved, 9.0)
    again = by_task(CLOSENESS, moved, list("abcde"))
    pd.testing.assert_series_equal(table.value, again.value)
    assert (table.kept != again.kept).any() and (table.p >= 1 / 24).all()


@pytest.mark.parametrize("how", CORRELATIONS)
def test_an_expert_that_is_alike_everywhere_leaves_a_correlation_undefined(how):
    accuracy = ACCURACY.copy()
    accuracy[2] = 0.3
    table = by_task(CLOSENESS, accuracy, list("abcde")).query("how == @how").set_index("task")
    assert table.loc["c", ["value", "low", "high", "p"]].isna().all()
    assert table.drop("c").p.notna().all()
    whole = over_tasks(CLOSENESS, accuracy, draws=50).set_index("how").loc[how]
    assert whole[["value", "low", "high", "within", "relabelled"]].isna().all()
