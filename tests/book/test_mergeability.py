"""Predictors and outcomes of every pair of experts, each against its definition."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from divmerge_book.studies import mergeability
from divmerge_book.studies.mantel import VIEWS
from divmerge_book.studies.sizes import settings

from divmerge_core import DIVERGENCES, METHODS

EFFORT = {"merges": ("average", "sum", "divmerge"), "inputs": 5, "epochs": 1}
EVERY = (*mergeability.PREDICTORS, *mergeability.AFTER, *mergeability.INPUTS)


def test_every_task_of_every_pair_has_a_row_per_merge_with_the_costs_asked_by_hand(linear):
    table = mergeability.pairs({0: linear}, **EFFORT)
    assert len(table) == 4 * 3 * len(EFFORT["merges"])
    assert not table.isna().any().any() and {*mergeability.OUTCOMES, *EVERY} <= set(table.columns)
    assert (table.expert == 1).all() and (table["drop"] == 1 - table.accuracy).all()
    assert table.js.between(0, np.log(2)).all()
    problem = linear.problem.select(["task2", "task1"])
    flat = METHODS["task_arithmetic"](problem, scale=1.0)
    row = table.set_index(["method", "task", "partner"]).loc["sum", "task2", "task1"]
    own, said = (
        torch.cat([problem.logits(some, 0, batch) for batch in problem.batches[0]])
        for some in (problem.vectors.expert("task2"), flat)
    )
    exact = DIVERGENCES["js"](own, said).mean().item()
    assert row.js == pytest.approx(exact) and row.answers == pytest.approx(exact)
    right = (own.argmax(-1) == said.argmax(-1)).double().mean().item()
    assert row.accuracy == pytest.approx(right)
    assert row.distance == pytest.approx(linear.problem.vectors.deltas[1].norm().item())


def test_numbers_about_weights_stand_at_the_right_pair(linear):
    vectors, table = linear.problem.vectors, mergeability.pairs({0: linear}, **EFFORT)
    row = table[(table.task == "task3") & (table.partner == "task0")].iloc[0]
    norms = vectors.norms()
    assert row.norm_own == pytest.approx(norms[3].item())
    assert row.norm_partner == pytest.approx(norms[0].item())
    assert row.norm_ratio == pytest.approx((norms[0] / norms[3]).log().item())
    assert row.length_sum == pytest.approx((vectors.deltas[0] + vectors.deltas[3]).norm().item())
    found = mergeability.stacked(table, ["norm_partner", "cosine"])
    assert found.shape == (3, 2, 1, 4, 4) and np.isnan(found[..., 0, 0]).all()
    assert found[0, 0, 0, 3, 0] == row.norm_partner and found[0, 1, 0, 0, 3] == row.cosine


def test_numbers_do_not_depend_on_the_order_of_the_tasks(problem):
    found = mergeability.pair_statistics(problem.vectors)
    moved = mergeability.pair_statistics(problem.vectors.select(["task2", "task0", "task1"]))
    assert list(found) == list(mergeability.PREDICTORS)
    for pair in permutations(problem.vectors.tasks, 2):
        assert moved.loc[pair].tolist() == pytest.approx(found.loc[pair].tolist())


def test_the_table_of_correlations_holds_every_view_number_and_damage_once(linear):
    table = mergeability.pairs({0: linear, 1: replace(linear, digest="another seed")}, **EFFORT)
    found = mergeability.correlations(table, draws=30)
    assert len(found) == len(VIEWS) * 3 * len(EVERY) * len(mergeability.OUTCOMES)
    assert not found.duplicated(["view", "method", "number", "damage"]).any()
    js = found[(found.number == "answers") & (found.damage == "js") & (found["view"] == "task")]
    assert np.allclose(js.rho, 1), "test rows and inputs are the same here"
    assert (found.p_max.dropna() >= found.p.dropna() - 1e-12).all()


def test_two_experts_leave_nothing_to_rank(linear):
    with pytest.raises(ValueError, match="three tasks or more"):
        mergeability.pairs({0: linear.select(["task0", "task1"])}, **EFFORT)


def test_every_size_names_registered_merges():
    for size in ("smoke", "default", "full"):
        assert set(settings("mergeability", size).merges) <= set(mergeability.MERGES)
