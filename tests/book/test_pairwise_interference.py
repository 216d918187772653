"""Costs of every expert for every other, and the segment between two of them."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from divmerge_book.figures import landscapes as draw_plane
from divmerge_book.interference.behaviour import barrier
from divmerge_book.studies.evaluator import Evaluator
from divmerge_book.studies.pairwise_interference import (
    barriers,
    by_cost,
    costs,
    matrix,
    permuted,
    segments,
)
from helpers import experiment_of, linear_problem
from torch.testing import assert_close

from divmerge_core.divergences import js

PAIR = "task0+task1"


@pytest.fixture
def experiment(tiny, cache):
    return experiment_of(linear_problem(num_tasks=3, scale=0.8), tiny)


def test_shuffling_keeps_every_tensor_its_entries(experiment):
    row, layout = experiment.problem.vectors.deltas[0], experiment.problem.vectors.layout
    found = permuted(row, layout, seed=0)
    assert not torch.equal(found, row)
    for start, stop in layout.bounds:
        assert_close(found[start:stop].sort().values, row[start:stop].sort().values)


def test_every_cost_is_accuracy_lost_and_js_to_the_expert(experiment):
    table = costs({0: experiment}, rows=99).set_index(["rule", "task", "other"])
    evaluator, vectors = Evaluator(experiment), experiment.problem.vectors
    ways = {"added": [1, 1], "averaged": [0.5, 0.5], "halved": [0.5, 0]}
    for rule, weights in ways.items():
        flat = vectors.select(["task2", "task0"]).merge(weights)
        logits, row = evaluator.logits(flat, 2), table.loc[rule, "task2", "task0"]
        assert_close(row.accuracy, 1 - evaluator.score(logits, 2)["accuracy"], rtol=0, atol=1e-5)
        assert_close(row.js, js(evaluator.experts[2], logits).mean().item(), rtol=0, atol=1e-5)


def test_half_of_a_vector_costs_the_same_beside_every_other(experiment):
    wide = matrix(costs({0: experiment}, rows=99), "halved", "js")
    assert wide.isna().sum().sum() == 3  # the diagonal
    assert (wide.max(axis=1) == wide.min(axis=1)).all()


def made_up_costs() -> pd.DataFrame:
    values = {("b", "a"): 2, ("c", "a"): 1, ("a", "b"): 1, ("c", "b"): 0, ("a", "c"): 9}
    rows = [
        {"seed": seed, "rule": "added", "task": i, "other": j, "accuracy": 0.0, "js": float(v)}
        for seed in (0, 1)
        for (i, j), v in {**values, ("b", "c"): 0}.items()
    ]
    return pd.DataFrame(rows)


def test_pairs_come_from_the_most_costly_to_the_least():
    assert by_cost(made_up_costs(), 3) == ["a+c", "a+b", "b+c"]
    assert by_cost(made_up_costs(), 2) == ["a+c", "b+c"]
    assert len(by_cost(made_up_costs(), 99)) == 3


def test_a_matrix_has_payers_in_rows_and_those_added_in_columns():
    wide = matrix(made_up_costs(), "added", "js")
    assert wide.loc["a", "c"] == 9 and wide.loc["c", "a"] == 1
    assert list(wide.index) == list(wide.columns)


# --- segments -------------------------------------------------------------------------------------


def test_the_ends_of_a_segment_are_the_experts(experiment):
    table = segments({0: experiment}, [PAIR], points=3, rows=99)
    for at, task in ((0.0, "task0"), (1.0, "task1")):
        end = table[(table["at"] == at) & (table.task == task)]
        assert end.accuracy.item() == 1 and abs(end.js.item()) < 1e-9
    with pytest.raises(ValueError, match="3 or more"):
        segments({0: experiment}, [PAIR], points=2, rows=9)


def test_the_middle_of_a_segment_is_the_average(experiment):
    table = segments({0: experiment}, [PAIR], points=3, rows=99)
    wide = matrix(costs({0: experiment}, rows=99), "averaged", "js")
    middle = table[(table["at"] == 0.5) & (table.task == "task0")]
    assert_close(middle.js.item(), wide.loc["task0", "task1"], rtol=0, atol=1e-5)


def test_the_barrier_of_a_pair_is_that_of_its_mean_error(experiment):
    rows = [
        {"seed": 0, "pair": PAIR, "at": at, "task": task, "accuracy": value, "nll": 0.0, "js": 0.0}
        for task, values in (("task0", (1.0, 0.2, 0.0)), ("task1", (0.0, 0.4, 0.8)))
        for at, value in zip((0.0, 0.5, 1.0), values, strict=True)
    ]
    found = barriers(pd.DataFrame(rows)).iloc[0]
    assert_close(found.error, barrier([0.5, 0.7, 0.6]))
    assert found.nll == 0 and found.error_chord <= found.error


def test_costs_and_barriers_say_their_units():
    walls = pd.DataFrame({"pair": ["a+b"], "error": [0.1], "error_chord": [0.0]})
    figure, ax = plt.subplots()
    assert "points" in draw_plane.barrier_plot(ax, walls).get_xlabel()
    assert "expert" in draw_plane.cost_map(ax, made_up_costs(), "js").get_xlabel()
    plt.close(figure)
