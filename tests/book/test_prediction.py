"""Numbers about pairs against what merging costs: statistics by hand, and the study's table."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.statistics import orderings
from divmerge_book.models.finetuning import Expert
from divmerge_book.studies import mergeability as module
from divmerge_book.studies.mantel import VIEWS, correlate, entries, every_correlation
from divmerge_book.studies.mergeability import (
    AFTER,
    DAMAGES,
    EFFORTS,
    INPUTS,
    MERGES,
    NUMBERS,
    Effort,
    correlations,
    expected_sign,
    label_of,
    pairs,
    stacked,
    weight_numbers,
)
from helpers import linear_problem
from test_arrivals import bench_of, forbid

from divmerge_core.divergences import DIVERGENCES
from divmerge_core.methods import METHODS

EFFORT = Effort((0,), ("average", "sum", "divmerge"), rows=1, inputs=5, epochs=1, draws=30)


@pytest.fixture
def bench(tiny, cache) -> Experiment:
    made = bench_of(linear_problem(num_tasks=4, scale=0.8), tiny)
    return replace(made, experts=[Expert(task, {}, {}, {}) for task in made.problem.vectors.tasks])


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def matrices(count: int = 5, seed: int = 0) -> np.ndarray:
    """One method, one column, one seed: a matrix [1, 1, 1, T, T] with NaN on the diagonal."""
    values = generator(seed).normal(size=(1, 1, 1, count, count))
    values[..., np.eye(count, dtype=bool)] = np.nan
    return values


# --- views of a matrix ----------------------------------------------------------------------------

BY_HAND = np.array([[np.nan, 1.0, 5.0], [3.0, np.nan, 4.0], [7.0, 0.0, np.nan]])


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ("task", [1, 5, 3, 4, 7, 0]),
        ("pair", [2, 6, 2, 2, 6, 2]),
        ("partner", [-2, 2, -0.5, 0.5, 3.5, -3.5]),
    ],
)
def test_views_by_hand(view, expected):
    assert (7 * entries(BY_HAND, view)).tolist() == pytest.approx(
        expected
    )  # in units of the largest


def test_a_task_drawn_twice_makes_no_pair_with_itself():
    found = 7 * entries(BY_HAND, "task", np.array([0, 0, 2]))
    assert found.tolist() == pytest.approx([5, 5, 7, 7])


def test_what_only_the_own_task_decides_says_nothing_about_partners():
    own = np.repeat(np.array([[1.0], [2.0], [4.0]]), 3, axis=1)
    assert not entries(own, "partner").any()
    assert not entries(own - own.T, "pair").any(), "a ratio of two tasks has no mean over a pair"


# --- correlations over pairs ----------------------------------------------------------------------


def test_rank_correlations_are_those_of_pandas():
    numbers, damages = generator().normal(size=(2, 3, 12)), generator(1).normal(size=(2, 4, 12))
    found = every_correlation(numbers, damages)
    for m, k, n in np.ndindex(found.shape):
        slow = pd.Series(numbers[m, k]).rank().corr(pd.Series(damages[m, n]).rank())
        assert found[m, k, n] == pytest.approx(slow)


@pytest.mark.parametrize("view", VIEWS)
def test_a_number_ranks_any_growing_function_of_itself_perfectly(view):
    number = matrices()
    damage = number if view != "task" else np.exp(number)
    found = correlate(number, damage, view=view, draws=50)
    assert found.value.item() == pytest.approx(1)
    assert found.low.item() == pytest.approx(1) and found.high.item() == pytest.approx(1)
    assert correlate(-number, damage, view=view, draws=50).value.item() == pytest.approx(-1)


def test_all_renamings_are_tried_where_there_are_few():
    assert len(orderings(4, 24, generator())) == 24
    assert {tuple(order) for order in orderings(4, 24, generator())} == set(permutations(range(4)))
    some = orderings(4, 23, generator())
    assert len(some) == 23 and some[0].tolist() == [0, 1, 2, 3]


def test_the_permutation_test_by_hand():
    number, damage = matrices(4), matrices(4, seed=1)
    found = correlate(number, damage, view="task", draws=24)
    apart, null = ~np.eye(4, dtype=bool), []
    for order in permutations(range(4)):
        moved = damage[0, 0, 0][np.ix_(order, order)]
        one, other = (pd.Series(some[apart]).rank() for some in (number[0, 0, 0], moved))
        null.append(abs(one.corr(other)))
    assert found.value.item() == pytest.approx(
        pd.Series(number[0, 0, 0][apart]).rank().corr(pd.Series(damage[0, 0, 0][apart]).rank())
    )
    expected = np.mean(np.array(null) >= abs(found.value.item()) - 1e-9)
    assert found.p.item() == found.p_max.item() == pytest.approx(expected)
    assert found.threshold == pytest.approx(sorted(null)[-2]), "one of 24 may lie above"


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
    repeated = np.repeat(number, 3, axis=2)
    found = correlate(repeated, noisy, view="task", draws=200)
    mean = correlate(number, noisy.mean(2, keepdims=True), view="task", draws=200)
    assert found.value.item() == pytest.approx(mean.value.item())
    assert found.low.item() < found.value.item() < found.high.item()


def test_two_tasks_and_unknown_views_are_refused():
    with pytest.raises(ValueError, match="three tasks or more"):
        correlate(matrices(2), matrices(2), view="task")
    with pytest.raises(ValueError, match="unknown view"):
        correlate(matrices(), matrices(), view="wide")


# --- the study ------------------------------------------------------------------------------------


def test_the_average_of_two_experts_is_half_the_sum_of_their_vectors():
    problem = linear_problem(num_tasks=2)
    half = METHODS["task_arithmetic"](problem, scale=0.5)
    torch.testing.assert_close(METHODS["average"](problem), half)


def test_every_task_of_every_pair_has_a_row_per_merge(bench):
    table = pairs({0: bench}, EFFORT)
    assert len(table) == 4 * 3 * len(EFFORT.merges)
    assert not table.isna().any().any()
    assert {*DAMAGES, *NUMBERS, *AFTER, *INPUTS} <= set(table.columns)
    assert (table.expert == 1).all() and (table["drop"] == 1 - table.accuracy).all()
    assert table.js.between(0, np.log(2)).all()


def test_a_rows_damage_is_that_of_the_merge_asked_by_hand(bench):
    table = pairs({0: bench}, EFFORT).set_index(["method", "task", "partner"])
    problem = bench.problem.select(["task2", "task1"])
    flat = METHODS["task_arithmetic"](problem, scale=1.0)
    row = table.loc["sum", "task2", "task1"]
    said = [problem.logits(flat, 0, batch) for batch in problem.batches[0]]
    own = [problem.logits(problem.vectors.expert("task2"), 0, b) for b in problem.batches[0]]
    exact = DIVERGENCES["js"](torch.cat(own), torch.cat(said)).mean().item()
    assert row.js == pytest.approx(exact) and row.answers == pytest.approx(exact)
    right = (torch.cat(own).argmax(-1) == torch.cat(said).argmax(-1)).double().mean().item()
    assert row.accuracy == pytest.approx(right)
    assert row.distance == pytest.approx(bench.problem.vectors.deltas[1].norm().item())


def test_numbers_about_weights_stand_at_the_right_pair(bench):
    vectors, table = bench.problem.vectors, pairs({0: bench}, EFFORT)
    row = table[(table.task == "task3") & (table.partner == "task0")].iloc[0]
    norms = vectors.norms()
    assert row.norm_own == pytest.approx(norms[3].item())
    assert row.norm_partner == pytest.approx(norms[0].item())
    assert row.norm_ratio == pytest.approx((norms[0] / norms[3]).log().item())
    assert row.length_sum == pytest.approx((vectors.deltas[0] + vectors.deltas[3]).norm().item())
    found = stacked(table, ["norm_partner", "cosine"])
    assert found.shape == (3, 2, 1, 4, 4) and np.isnan(found[..., 0, 0]).all()
    assert found[0, 0, 0, 3, 0] == row.norm_partner and found[0, 1, 0, 0, 3] == row.cosine


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_do_not_depend_on_the_order_of_the_tasks(name, problem):
    order = ["task2", "task0", "task1"]
    found = weight_numbers(problem.vectors)[name]
    moved = weight_numbers(problem.vectors.select(order))[name]
    rows = [problem.vectors.tasks.index(task) for task in order]
    apart = ~torch.eye(3, dtype=bool)
    torch.testing.assert_close(moved[apart], found[rows][:, rows][apart])


def test_finished_pairs_are_not_merged_again(bench, monkeypatch):
    first = pairs({0: bench}, EFFORT)
    for name in ("mean_alignment", "answers"):
        monkeypatch.setattr(module, name, forbid)
    pd.testing.assert_frame_equal(pairs({0: bench}, EFFORT), first)


def test_the_table_of_correlations_holds_every_view_number_and_damage_once(bench):
    second = replace(bench, digest="another seed")
    table = pairs({0: bench, 1: second}, EFFORT)
    found = correlations(table, draws=30)
    numbers = len(NUMBERS) + len(AFTER) + len(INPUTS)
    assert len(found) == len(VIEWS) * 3 * numbers * len(DAMAGES)
    assert not found.duplicated(["view", "method", "number", "damage"]).any()
    js = found[(found.number == "answers") & (found.damage == "js") & (found["view"] == "task")]
    assert np.allclose(js.rho, 1), "test rows and inputs are the same here"
    assert (found.p_max.dropna() >= found.p.dropna() - 1e-12).all()


def test_two_experts_leave_nothing_to_rank(bench):
    with pytest.raises(ValueError, match="three tasks or more"):
        pairs({0: bench.select(["task0", "task1"])}, EFFORT)


def test_every_effort_names_registered_merges_and_every_number_has_a_label_and_a_sign():
    for effort in EFFORTS.values():
        assert set(effort.merges) <= set(MERGES)
    for name in (*NUMBERS, *AFTER, *INPUTS):
        assert label_of(name) and expected_sign(name) in (-1, 1)
