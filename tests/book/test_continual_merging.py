"""Continual merging against the methods that see all experts, and its scores by hand."""

import math
from dataclasses import replace

import pandas as pd
import pytest
from divmerge_book.studies import continual_merging as module
from divmerge_book.studies.continual_merging import BATCH, backward_transfer, merged_models, orders
from helpers import experiment_of, linear_problem
from torch.testing import assert_close

from divmerge_core.methods import METHODS


@pytest.mark.parametrize("method", BATCH)
def test_every_state_is_the_method_on_the_experts_so_far(linear, method):
    order = ["task2", "task0", "task3", "task1"]
    options = {"progress": False} if method == "opcm" else {}
    for count, state in enumerate(merged_models(linear, method, order), start=1):
        expected = METHODS[method](linear.problem.select(order[:count]), **options)
        assert_close(state, expected, rtol=1e-9, atol=1e-12)
    assert count == 4


def test_orders_differ_and_are_no_more_than_there_are():
    assert len(set(orders("abcd", 10))) == 10
    assert all(sorted(order) == list("abcd") for order in orders("abcd", 10))
    assert sorted(orders("ab", 10)) == [("a", "b"), ("b", "a")]
    assert orders("abcd", 3) == orders("abcd", 10)[:3]


def test_identical_experts_are_never_forgotten(tiny, cache):
    problem = linear_problem()
    same = problem.vectors.map(lambda deltas: deltas[:1].repeat(3, 1))
    experiment = experiment_of(replace(problem, vectors=same), tiny)
    found = backward_transfer(module.continual_merging(experiment, count=3)).set_index("method")
    average = found.loc["running_average"]
    assert (average.bwt == 0).all() and (average[["acc", "ratio"]] == 1).all(axis=None)


def test_the_table_follows_every_order_and_sums_forget_it_in_the_end(linear):
    table = module.continual_merging(linear, count=3)
    some = table[(table.method == "opcm") & (table.order == 1)]
    assert list(some.groupby("arrived").task.nunique()) == [1, 2, 3, 4]
    assert tuple(some[some.arrived == 4].task) == orders(linear.problem.vectors.tasks, 3)[1]
    assert some[some.arrived == 1].accuracy.item() == 1  # the expert itself
    found = backward_transfer(table)
    for method in (name for name in BATCH if METHODS.facts[name]["symmetric"]):
        batch = found[found.method == BATCH[method]].acc.item()
        assert list(found[found.method == method].acc) == pytest.approx([batch] * 3)
    assert found[found.method == "opcm"].acc.nunique() > 1


def test_backward_transfer_and_accuracy_by_hand():
    values = [(1, "b", 0.9), (2, "b", 0.8), (2, "a", 0.7), (3, "b", 0.6), (3, "a", 0.75)]
    rows = pd.DataFrame([*values, (3, "c", 0.5)], columns=["arrived", "task", "accuracy"])
    whole = {"method": "all", "order": -1, "arrived": 3, "task": "a", "accuracy": 0.4}
    table = pd.concat([rows.assign(method="m", order=0), pd.DataFrame([whole])]).assign(expert=0.8)
    found = backward_transfer(table).set_index("method")
    assert found.acc["m"] == pytest.approx((0.6 + 0.75 + 0.5) / 3)
    assert found.ratio["m"] == pytest.approx((0.6 + 0.75 + 0.5) / 3 / 0.8)
    assert found.bwt["m"] == pytest.approx(((0.6 - 0.9) + (0.75 - 0.7)) / 2)
    assert math.isnan(found.bwt["all"]) and found.acc["all"] == 0.4
