"""Predictors and outcomes of every pair of experts, each against its definition."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from divmerge_book.studies.mantel import VIEWS
from divmerge_book.studies.mergeability import (
    AFTER,
    INPUTS,
    MERGES,
    OUTCOMES,
    PREDICTORS,
    correlations,
    expected_sign,
    label_of,
    pair_statistics,
    pairs,
    stacked,
)
from divmerge_book.studies.sizes import settings
from helpers import experiment_of, linear_problem

from divmerge_core.divergences import DIVERGENCES
from divmerge_core.methods import METHODS

EFFORT = {"merges": ("average", "sum", "divmerge"), "inputs": 5, "epochs": 1}


@pytest.fixture
def experiment(tiny, cache):
    return experiment_of(linear_problem(num_tasks=4, scale=0.8), tiny)


def test_the_average_of_two_experts_is_half_the_sum_of_their_vectors():
    problem = linear_problem(num_tasks=2)
    half = METHODS["task_arithmetic"](problem, scale=0.5)
    torch.testing.assert_close(METHODS["average"](problem), half)


def test_every_task_of_every_pair_has_a_row_per_merge(experiment):
    table = pairs({0: experiment}, **EFFORT)
    assert len(table) == 4 * 3 * len(EFFORT["merges"])
    assert not table.isna().any().any()
    assert {*OUTCOMES, *PREDICTORS, *AFTER, *INPUTS} <= set(table.columns)
    assert (table.expert == 1).all() and (table["drop"] == 1 - table.accuracy).all()
    assert table.js.between(0, np.log(2)).all()


def test_a_rows_damage_is_that_of_the_merge_asked_by_hand(experiment):
    table = pairs({0: experiment}, **EFFORT).set_index(["method", "task", "partner"])
    problem = experiment.problem.select(["task2", "task1"])
    flat = METHODS["task_arithmetic"](problem, scale=1.0)
    row = table.loc["sum", "task2", "task1"]
    said = [problem.logits(flat, 0, batch) for batch in problem.batches[0]]
    own = [problem.logits(problem.vectors.expert("task2"), 0, b) for b in problem.batches[0]]
    exact = DIVERGENCES["js"](torch.cat(own), torch.cat(said)).mean().item()
    assert row.js == pytest.approx(exact) and row.answers == pytest.approx(exact)
    right = (torch.cat(own).argmax(-1) == torch.cat(said).argmax(-1)).double().mean().item()
    assert row.accuracy == pytest.approx(right)
    assert row.distance == pytest.approx(experiment.problem.vectors.deltas[1].norm().item())


def test_numbers_about_weights_stand_at_the_right_pair(experiment):
    vectors, table = experiment.problem.vectors, pairs({0: experiment}, **EFFORT)
    row = table[(table.task == "task3") & (table.partner == "task0")].iloc[0]
    norms = vectors.norms()
    assert row.norm_own == pytest.approx(norms[3].item())
    assert row.norm_partner == pytest.approx(norms[0].item())
    assert row.norm_ratio == pytest.approx((norms[0] / norms[3]).log().item())
    assert row.length_sum == pytest.approx((vectors.deltas[0] + vectors.deltas[3]).norm().item())
    found = stacked(table, ["norm_partner", "cosine"])
    assert found.shape == (3, 2, 1, 4, 4) and np.isnan(found[..., 0, 0]).all()
    assert found[0, 0, 0, 3, 0] == row.norm_partner and found[0, 1, 0, 0, 3] == row.cosine


@pytest.mark.parametrize("name", PREDICTORS)
def test_numbers_do_not_depend_on_the_order_of_the_tasks(name, problem):
    order = ["task2", "task0", "task1"]
    found = pair_statistics(problem.vectors)[name]
    moved = pair_statistics(problem.vectors.select(order))[name]
    rows = [problem.vectors.tasks.index(task) for task in order]
    apart = ~torch.eye(3, dtype=bool)
    torch.testing.assert_close(moved[apart], found[rows][:, rows][apart])


def test_the_table_of_correlations_holds_every_view_number_and_damage_once(experiment):
    second = replace(experiment, digest="another seed")
    table = pairs({0: experiment, 1: second}, **EFFORT)
    found = correlations(table, draws=30)
    numbers = len(PREDICTORS) + len(AFTER) + len(INPUTS)
    assert len(found) == len(VIEWS) * 3 * numbers * len(OUTCOMES)
    assert not found.duplicated(["view", "method", "number", "damage"]).any()
    js = found[(found.number == "answers") & (found.damage == "js") & (found["view"] == "task")]
    assert np.allclose(js.rho, 1), "test rows and inputs are the same here"
    assert (found.p_max.dropna() >= found.p.dropna() - 1e-12).all()


def test_two_experts_leave_nothing_to_rank(experiment):
    with pytest.raises(ValueError, match="three tasks or more"):
        pairs({0: experiment.select(["task0", "task1"])}, **EFFORT)


def test_every_size_names_registered_merges_and_every_predictor_has_a_label_and_a_sign():
    for size in ("smoke", "default", "full"):
        assert set(settings("mergeability", size).merges) <= set(MERGES)
    for name in (*PREDICTORS, *AFTER, *INPUTS):
        assert label_of(name) and expected_sign(name) in (-1, 1)
