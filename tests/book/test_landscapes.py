"""Planes, costs and segments of two task vectors, against plain definitions."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from divmerge_book.evaluation.experiment import SIZES
from divmerge_book.figures import landscapes as draw_plane
from divmerge_book.interference.behaviour import barrier, disentanglement_error
from divmerge_book.studies import evaluator as scoring
from divmerge_book.studies import landscapes
from divmerge_book.studies.evaluator import Evaluator, accuracies, fewer_rows, subsample
from divmerge_book.studies.study import study
from torch.testing import assert_close

from divmerge_core.divergences import js

PAIR = "task0+task1"
JOBS = [{"pair": PAIR}]


def test_some_rows_keep_their_answers_and_their_order(linear):
    split = linear.test[0]  # three batches of five
    few, chosen = subsample(split, 4), [0, 5, 9, 14]
    assert few.gold.tolist() == split.gold[chosen].tolist()
    every = torch.cat([batch.inputs["x"] for batch in split.batches])
    assert_close(torch.cat([batch.inputs["x"] for batch in few.batches]), every[chosen])
    assert [batch.weight.sum().item() for batch in few.batches] == [1, 1, 1]
    assert subsample(split, 99) is split
    assert len({linear.digest, *(fewer_rows(linear, count).digest for count in (4, 5))}) == 3


def test_an_axis_includes_zero_or_is_refused():
    for side in (6, 11, 21):
        assert 0.0 in landscapes.axis(side) and len(landscapes.axis(side)) == side
    for side in (1, 5, 10):
        with pytest.raises(ValueError, match="so that 0 is included"):
            landscapes.axis(side)


def test_every_point_of_a_plane_is_what_the_plain_definitions_say(linear):
    table = study(landscapes.grid, {0: linear}, JOBS, side=6, rows=99)
    pair = linear.select(PAIR.split("+"))
    assert len(table) == 36 and set(table.pair) == {PAIR}
    for row in table.iloc[[0, 8, 17, 35]].itertuples():
        found = accuracies(pair, pair.problem.vectors.merge([row.l1, row.l2]))
        assert_close(row.anp, float(np.mean(found)), rtol=0, atol=1e-5)  # experts get all right
        for distance, value in (("disagreement", row.disagreement), ("js", row.apart)):
            both = [row.l1, row.l2]
            error = disentanglement_error(pair.problem, pair.test, both, distance=distance)
            assert_close(value, error, rtol=0, atol=1e-5)
    origin = table[(table.l1 == 0) & (table.l2 == 0)]
    assert origin.disagreement.item() == 0 and abs(origin.apart.item()) < 1e-12


def test_an_expert_scores_as_itself_and_one_that_gets_nothing_right_is_named(linear):
    evaluator, expert = Evaluator(linear), linear.problem.vectors.expert("task1")
    found = evaluator.score(evaluator.logits(expert, 1), 1)
    assert found["accuracy"] == 1 and abs(found["js"]) < 1e-12
    wrong = [replace(split, gold=split.gold + 9) for split in linear.test]
    with pytest.raises(ValueError, match="the expert of 'task0' gets no test row right"):
        scoring.scores_by_task(replace(linear, test=wrong, digest="wrong"), [1.0] * 4)


def test_methods_end_where_their_coefficients_say(linear):
    size = replace(SIZES["smoke"], inputs=8)
    found = study(landscapes.solutions, {0: linear}, JOBS, size=size, rows=99)
    last = found.dropna(subset=["js"]).set_index("method")
    assert list(last.index) == ["average", *landscapes.MARKED] and set(found.pair) == {PAIR}
    assert last.l1["average"] == last.l2["average"] == 0.5
    assert last.l1["task_arithmetic"] == last.l2["task_arithmetic"]
    fit = found[found.method == "divmerge/task"]
    assert fit.iloc[0].l1 == fit.iloc[0].l2 == 0.5  # 1 / T
    assert list(fit.step) == list(range(len(fit)))
    evaluator = Evaluator(linear.select(PAIR.split("+")))
    for row in last.itertuples():
        flat = evaluator.experiment.problem.vectors.merge([row.l1, row.l2])
        scores = [evaluator.score(evaluator.logits(flat, task), task) for task in (0, 1)]
        assert_close(row.js, sum(score["js"] for score in scores), rtol=0, atol=2e-5)


def costs(experiment) -> pd.DataFrame:
    jobs = [{"other": task} for task in experiment.problem.vectors.tasks]
    return study(landscapes.costs, {0: experiment}, jobs, rows=99)


def segment(experiment, points: int) -> pd.DataFrame:
    return study(landscapes.segment, {0: experiment}, JOBS, points=points, rows=99)


def test_shuffling_keeps_every_tensor_its_entries(problem):
    row, layout = problem.vectors.deltas[0], problem.vectors.layout
    found = landscapes.permuted(row, layout, seed=0)
    assert not torch.equal(found, row)
    for start, stop in layout.bounds:
        assert_close(found[start:stop].sort().values, row[start:stop].sort().values)


def test_every_cost_is_accuracy_lost_and_js_to_the_expert(linear):
    table, evaluator, vectors = costs(linear), Evaluator(linear), linear.problem.vectors
    by_rule = table.set_index(["rule", "task", "other"])
    ways = {"added": [1, 1], "averaged": [0.5, 0.5], "halved": [0.5, 0]}
    for rule, weights in ways.items():
        flat = vectors.select(["task2", "task0"]).merge(weights)
        logits, row = evaluator.logits(flat, 2), by_rule.loc[rule, "task2", "task0"]
        assert_close(row.accuracy, 1 - evaluator.score(logits, 2)["accuracy"], rtol=0, atol=1e-5)
        assert_close(row.js, js(evaluator.experts[2], logits).mean().item(), rtol=0, atol=1e-5)
    wide = landscapes.matrix(table, "halved", "js")  # half a vector costs the same beside any other
    assert wide.isna().sum().sum() == 4 and (wide.max(axis=1) == wide.min(axis=1)).all()


def made_up_costs() -> pd.DataFrame:
    rows = [("b", "a", 2.0), ("c", "a", 1.0), ("a", "b", 1.0), ("c", "b", 0.0), ("a", "c", 9.0)]
    table = pd.DataFrame([*rows, ("b", "c", 0.0)], columns=["task", "other", "js"])
    table = table.assign(rule="added", accuracy=0.0)
    return pd.concat([table.assign(seed=seed) for seed in (0, 1)], ignore_index=True)


def test_pairs_come_from_the_most_costly_to_the_least_and_costs_are_mapped(ax):
    for count, expected in ((3, "a+c a+b b+c"), (99, "a+c a+b b+c"), (2, "a+c b+c")):
        assert landscapes.by_cost(made_up_costs(), count) == expected.split()
    wide = landscapes.matrix(made_up_costs(), "added", "js")  # payers in rows
    assert wide.loc["a", "c"] == 9 and wide.loc["c", "a"] == 1
    assert list(wide.index) == list(wide.columns)
    assert "expert" in draw_plane.cost_map(ax, made_up_costs(), "js").get_xlabel()


def test_a_segment_has_the_experts_at_its_ends_and_the_average_between(linear):
    table = segment(linear, 3).set_index(["at", "task"])
    for end in (table.loc[0.0, "task0"], table.loc[1.0, "task1"]):
        assert end.accuracy == 1 and abs(end.js) < 1e-9
    average = landscapes.matrix(costs(linear), "averaged", "js").loc["task0", "task1"]
    assert_close(table.js[0.5, "task0"], average, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="3 or more"):
        segment(linear, 2)


def test_the_barrier_of_a_pair_is_that_of_its_mean_error():
    rows = [
        {"seed": 0, "pair": PAIR, "at": at, "task": task, "accuracy": value, "nll": 0.0, "js": 0.0}
        for task, values in (("task0", (1.0, 0.2, 0.0)), ("task1", (0.0, 0.4, 0.8)))
        for at, value in zip((0.0, 0.5, 1.0), values, strict=True)
    ]
    found = landscapes.barriers(pd.DataFrame(rows)).iloc[0]
    assert_close(found.error, barrier([0.5, 0.7, 0.6]))
    assert found.nll == 0 and found.error_chord <= found.error


def test_a_plane_draws_every_point_it_was_given(ax):
    points = pd.DataFrame({"pair": PAIR, "l1": [0.0, 0.0, 0.5, 0.5], "l2": [0.0, 0.2] * 2})
    table = points.assign(anp=points.l1 + 2 * points.l2)
    drawn = draw_plane.plane(ax, table, "anp")
    found = drawn.collections[0].get_array()
    assert_close(np.asarray(found).ravel().tolist(), [0.0, 50.0, 40.0, 90.0])
    assert "task0" in drawn.get_xlabel() and "task1" in drawn.get_ylabel()


def test_a_method_is_marked_where_it_ends(ax):
    rows = [{"method": m, "step": 0, "l1": 0.5, "l2": 0.5} for m in draw_plane.MARKS]
    rows.append({"method": "divmerge/task", "step": 1, "l1": 0.9, "l2": 0.1})
    draw_plane.end_points(ax, pd.DataFrame(rows))
    last = {line.get_label(): line.get_xydata()[-1].tolist() for line in ax.lines}
    assert last["DivMerge, per task"] == [0.9, 0.1] and last["Average"] == [0.5, 0.5]
