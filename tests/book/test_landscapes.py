"""Planes of two task vectors: every point and every method against plain definitions."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from divmerge_book.evaluation.experiment import SIZES
from divmerge_book.figures import landscapes as draw_plane
from divmerge_book.interference.behaviour import disentanglement_error
from divmerge_book.studies.evaluator import (
    Evaluator,
    accuracies,
    fewer_rows,
    scores_by_task,
    subsample,
)
from divmerge_book.studies.landscapes import MARKED, axis, marks, planes
from helpers import experiment_of, linear_problem
from torch.testing import assert_close

from divmerge_core.divergences import js

PAIR = "task0+task1"


@pytest.fixture
def experiment(tiny, cache):
    return experiment_of(linear_problem(num_tasks=3, scale=0.8), tiny)


def test_some_rows_keep_their_answers_and_their_order(experiment):
    split = experiment.test[0]  # three batches of five
    few, chosen = subsample(split, 4), [0, 5, 9, 14]
    assert few.gold.tolist() == split.gold[chosen].tolist()
    every = torch.cat([batch.inputs["x"] for batch in split.batches])
    assert_close(torch.cat([batch.inputs["x"] for batch in few.batches]), every[chosen])
    assert [batch.weight.sum().item() for batch in few.batches] == [1, 1, 1]
    assert subsample(split, 99) is split


def test_a_smaller_experiment_has_its_own_place_in_the_cache(experiment):
    assert fewer_rows(experiment, 4).digest != fewer_rows(experiment, 5).digest != experiment.digest


# --- the plane ------------------------------------------------------------------------------------


def test_an_axis_includes_zero_or_is_refused():
    for side in (6, 11, 21):
        assert 0.0 in axis(side) and len(axis(side)) == side
    assert 1.0 in axis(11)
    for side in (1, 5, 10):
        with pytest.raises(ValueError, match="so that 0 is included"):
            axis(side)


def test_every_point_of_a_plane_is_what_the_plain_definitions_say(experiment):
    table = planes(experiment, [PAIR], side=6, rows=99)
    pair = experiment.select(PAIR.split("+"))
    assert len(table) == 36 and set(table.pair) == {PAIR}
    for row in table.iloc[[0, 8, 17, 35]].itertuples():
        flat = pair.problem.vectors.merge([row.l1, row.l2])
        expected = np.mean(accuracies(pair, flat))  # experts get all right
        assert_close(row.anp, float(expected), rtol=0, atol=1e-5)
        for distance, value in (("disagreement", row.disagreement), ("js", row.apart)):
            found = disentanglement_error(
                pair.problem, pair.test, [row.l1, row.l2], distance=distance
            )
            assert_close(value, found, rtol=0, atol=1e-5)


def test_the_disentanglement_error_of_a_plane_is_zero_at_the_base(experiment):
    table = planes(experiment, [PAIR], side=6, rows=99)
    origin = table[(table.l1 == 0) & (table.l2 == 0)]
    assert origin.disagreement.item() == 0 and abs(origin.apart.item()) < 1e-12


def test_an_expert_scores_as_itself_and_one_that_gets_nothing_right_is_named(experiment):
    evaluator, expert = Evaluator(experiment), experiment.problem.vectors.expert("task1")
    found = evaluator.score(evaluator.logits(expert, 1), 1)
    assert found["accuracy"] == 1 and abs(found["js"]) < 1e-12
    wrong = [replace(split, gold=split.gold + 9) for split in experiment.test]
    with pytest.raises(ValueError, match="the expert of 'task0' gets no test row right"):
        scores_by_task(replace(experiment, test=wrong, digest="wrong"), [1.0, 1.0, 1.0])


def test_methods_end_where_their_coefficients_say(experiment):
    size, pair = replace(SIZES["smoke"], inputs=8), experiment.select(PAIR.split("+"))
    found = marks(experiment, [PAIR], size, rows=99)
    last = found.dropna(subset=["js"]).set_index("method")
    assert list(last.index) == ["average", *MARKED] and set(found.pair) == {PAIR}
    assert last.l1["average"] == last.l2["average"] == 0.5
    assert last.l1["task_arithmetic"] == last.l2["task_arithmetic"]
    trajectory = found[found.method == "divmerge/task"]
    assert trajectory.iloc[0].l1 == trajectory.iloc[0].l2 == 0.5  # 1 / T
    assert list(trajectory.step) == list(range(len(trajectory)))
    evaluator = Evaluator(pair)
    for row in last.itertuples():
        flat = pair.problem.vectors.merge([row.l1, row.l2])
        total = sum(
            js(evaluator.experts[t], evaluator.logits(flat, t)).mean().item() for t in range(2)
        )
        assert_close(row.js, total, rtol=0, atol=2e-5)


# --- figures -------------------------------------------------------------------------------------


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def test_a_plane_draws_every_point_it_was_given(ax):
    rows = [
        {"pair": PAIR, "l1": a, "l2": b, "anp": a + 2 * b} for a in (0.0, 0.5) for b in (0.0, 0.2)
    ]
    drawn = draw_plane.plane(ax, pd.DataFrame(rows), "anp", colorbar=False)
    found = drawn.collections[0].get_array()
    assert_close(np.asarray(found).ravel().tolist(), [0.0, 50.0, 40.0, 90.0])
    assert "task0" in drawn.get_xlabel() and "task1" in drawn.get_ylabel()


def test_a_method_is_marked_where_it_ends(ax):
    rows = [{"method": m, "step": 0, "l1": 0.5, "l2": 0.5} for m in draw_plane.MARKS]
    rows.append({"method": "divmerge/task", "step": 1, "l1": 0.9, "l2": 0.1})
    draw_plane.end_points(ax, pd.DataFrame(rows))
    last = {line.get_label(): line.get_xydata()[-1].tolist() for line in ax.lines}
    assert last["DivMerge, per task"] == [0.9, 0.1] and last["Average"] == [0.5, 0.5]
