"""Planes, lines, costs and flips on models whose answers are known."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from divmerge_book.data.tasks import TASKS
from divmerge_book.evaluation import cache
from divmerge_book.evaluation.experiment import SIZES, Experiment, prepare
from divmerge_book.evaluation.hyperparameter_search import shares
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.figures import behaviour as draw
from divmerge_book.figures import landscapes as draw_plane
from divmerge_book.interference.behaviour import barrier, disentanglement_error
from divmerge_book.models.finetuning import Expert
from divmerge_book.studies import landscapes as module
from divmerge_book.studies.landscapes import Judge, axis, fewer, marks, planes, solutions, some
from divmerge_book.studies.pairwise_interference import (
    barriers,
    by_cost,
    costs,
    matrix,
    permuted,
    segments,
)
from divmerge_book.studies.prediction_churn import (
    MODELS,
    ask,
    by_margin,
    calibrated,
    depths,
    diagram,
    examples,
    resampled,
    row_numbers,
    texts,
    turned,
)
from helpers import linear_problem
from test_arrivals import bench_of, forbid
from torch.testing import assert_close

from divmerge_core.divergences import js

PAIR = "task0+task1"


@pytest.fixture
def bench(tiny, cache) -> Experiment:
    found = bench_of(linear_problem(num_tasks=3, scale=0.8), tiny)
    return replace(found, experts=[Expert(t, {}, {}, {}) for t in found.problem.vectors.tasks])


# --- a smaller exam -------------------------------------------------------------------------------


def test_some_rows_keep_their_answers_and_their_order(bench):
    exam = bench.test[0]  # three batches of five
    few, chosen = some(exam, 4), [0, 5, 9, 14]
    assert few.gold.tolist() == exam.gold[chosen].tolist()
    every = torch.cat([batch.inputs["x"] for batch in exam.batches])
    assert_close(torch.cat([batch.inputs["x"] for batch in few.batches]), every[chosen])
    assert [batch.weight.sum().item() for batch in few.batches] == [1, 1, 1]
    assert some(exam, 99) is exam


def test_a_smaller_bench_has_its_own_place_in_the_cache(bench):
    assert fewer(bench, 4).digest != fewer(bench, 5).digest != bench.digest


# --- the plane ------------------------------------------------------------------------------------


def test_an_axis_meets_zero_or_is_refused():
    for side in (6, 11, 21):
        assert 0.0 in axis(side) and len(axis(side)) == side
    assert 1.0 in axis(11)
    for side in (1, 5, 10):
        with pytest.raises(ValueError, match="so that 0 is met"):
            axis(side)


def test_every_point_of_a_plane_is_what_the_plain_definitions_say(bench):
    table = planes(bench, [PAIR], side=6, rows=99)
    pair = bench.select(PAIR.split("+"))
    assert len(table) == 36 and set(table.pair) == {PAIR}
    for row in table.iloc[[0, 8, 17, 35]].itertuples():
        flat = pair.problem.vectors.merge([row.l1, row.l2])
        expected = np.mean(shares(evaluate(pair.problem, flat, pair.test)))  # experts get all right
        assert_close(row.anp, float(expected), rtol=0, atol=1e-5)
        for distance, value in (("disagreement", row.disagreement), ("js", row.apart)):
            found = disentanglement_error(
                pair.problem, pair.test, [row.l1, row.l2], distance=distance
            )
            assert_close(value, found, rtol=0, atol=1e-5)


def test_the_disentanglement_error_of_a_plane_is_zero_at_the_base(bench):
    table = planes(bench, [PAIR], side=6, rows=99)
    origin = table[(table.l1 == 0) & (table.l2 == 0)]
    assert origin.disagreement.item() == 0 and abs(origin.apart.item()) < 1e-12


def test_a_finished_plane_is_not_worked_out_again(bench):
    first = planes(bench, [PAIR], side=6, rows=9)
    silent = replace(bench, problem=replace(bench.problem, forward=forbid))
    pd.testing.assert_frame_equal(planes(silent, [PAIR], side=6, rows=9), first)


def test_an_expert_scores_as_itself(bench):
    judge, vectors = Judge(bench), bench.problem.vectors
    found = judge.scored(judge.logits(vectors.expert("task1"), 1), 1)
    assert (found["accuracy"], found["ratio"]) == (1.0, 1.0) and abs(found["js"]) < 1e-12


def test_an_expert_that_gets_nothing_right_is_named(bench):
    wrong = [replace(exam, gold=exam.gold + 9) for exam in bench.test]
    judge = Judge(replace(bench, test=wrong))
    with pytest.raises(ValueError, match="the expert of 'task1' gets no test row right"):
        judge.scored(judge.expert(1), 1)


def test_methods_end_where_their_coefficients_say(bench):
    size, pair = replace(SIZES["smoke"], inputs=8), bench.select(PAIR.split("+"))
    found = pd.DataFrame(solutions(pair, size))
    last = found.dropna(subset=["js"]).set_index("method")
    assert list(last.index) == ["average", *module.MARKED]
    assert last.l1["average"] == last.l2["average"] == 0.5
    assert last.l1["task_arithmetic"] == last.l2["task_arithmetic"]
    course = found[found.method == "divmerge/task"]
    assert course.iloc[0].l1 == course.iloc[0].l2 == 0.5  # 1 / T
    assert list(course.step) == list(range(len(course)))
    for row in last.itertuples():
        flat, judge = pair.problem.vectors.merge([row.l1, row.l2]), Judge(pair)
        total = sum(
            js(judge.expert(t), judge.logits(flat, t)).mean().item() for t in range(2)
        )  # fmt: skip
        assert_close(row.js, total, rtol=0, atol=1e-5)


def test_marks_name_their_pair(bench):
    table = marks(bench, [PAIR], replace(SIZES["smoke"], inputs=8), rows=9)
    assert set(table.pair) == {PAIR}


# --- costs ----------------------------------------------------------------------------------------


def test_shuffling_keeps_every_tensor_its_entries(bench):
    row, layout = bench.problem.vectors.deltas[0], bench.problem.vectors.layout
    found = permuted(row, layout, seed=0)
    assert not torch.equal(found, row)
    for start, stop in layout.bounds:
        assert_close(found[start:stop].sort().values, row[start:stop].sort().values)


def test_every_cost_is_accuracy_lost_and_js_to_the_expert(bench):
    table = costs({0: bench}, rows=99).set_index(["rule", "task", "other"])
    judge, vectors = Judge(bench), bench.problem.vectors
    ways = {"added": [1, 1], "averaged": [0.5, 0.5], "halved": [0.5, 0]}
    for rule, weights in ways.items():
        flat = vectors.select(["task2", "task0"]).merge(weights)
        logits, row = judge.logits(flat, 2), table.loc[rule, "task2", "task0"]
        assert_close(row.accuracy, 1 - judge.accuracy(logits, 2), rtol=0, atol=1e-5)
        assert_close(row.js, js(judge.expert(2), logits).mean().item(), rtol=0, atol=1e-5)


def test_half_of_a_vector_costs_the_same_beside_every_other(bench):
    wide = matrix(costs({0: bench}, rows=99), "halved", "js")
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


def test_the_ends_of_a_segment_are_the_experts(bench):
    table = segments({0: bench}, [PAIR], points=3, rows=99)
    for at, task in ((0.0, "task0"), (1.0, "task1")):
        end = table[(table["at"] == at) & (table.task == task)]
        assert end.accuracy.item() == 1 and abs(end.js.item()) < 1e-9
    with pytest.raises(ValueError, match="3 or more"):
        segments({0: bench}, [PAIR], points=2, rows=9)


def test_the_middle_of_a_segment_is_the_average(bench):
    table = segments({0: bench}, [PAIR], points=3, rows=99)
    wide = matrix(costs({0: bench}, rows=99), "averaged", "js")
    middle = table[(table["at"] == 0.5) & (table.task == "task0")]
    assert_close(middle.js.item(), wide.loc["task0", "task1"], rtol=0, atol=1e-5)


def test_the_barrier_of_a_pair_is_that_of_its_mean_error(bench):
    rows = [
        {"seed": 0, "pair": PAIR, "at": at, "task": task, "accuracy": value, "nll": 0.0, "js": 0.0}
        for task, values in (("task0", (1.0, 0.2, 0.0)), ("task1", (0.0, 0.4, 0.8)))
        for at, value in zip((0.0, 0.5, 1.0), values, strict=True)
    ]
    found = barriers(pd.DataFrame(rows)).iloc[0]
    assert_close(found.error, barrier([0.5, 0.7, 0.6]))
    assert found.nll == 0 and found.error_chord <= found.error


# --- flips ----------------------------------------------------------------------------------------


def made_up_answers() -> pd.DataFrame:
    """Two tasks of ten rows at two seeds; the merge loses the two least sure and gains one."""
    right, margin = [1] * 9 + [0], [100, 200, 300, 400, 500, 600, 700, 800, 900, 950]
    rows = []
    for seed in (0, 1):
        for task in "ab":
            label = {"seed": seed, "task": task}
            sure = {"sure": [900] * 10}
            own = {"right": right, "margin": margin, "row": list(range(10))}
            rows.append({**label, "model": "expert", **sure, **own})
            layers = {"cka": [1.0, 0.5], "shift": [0.0, 0.7], "common": [0.0, 0.2]}
            after = {"right": [0, 0] + [1] * 8}
            rows.append({**label, "model": "average", **sure, **after, **layers})
    return pd.DataFrame(rows)


def test_net_is_gained_minus_lost_and_by_hand():
    for row in turned(made_up_answers()).itertuples():
        assert_close((row.lost, row.gained), (0.2, 0.1))
        assert_close(row.net, row.gained - row.lost)


def test_resampling_keeps_the_value_inside_its_interval():
    found = resampled(made_up_answers(), draws=200).set_index("what")
    assert_close(found.value["net"], -0.1)
    assert (found.low <= found.value).all() and (found.value <= found.high).all()
    assert found.low["lost"] < found.high["lost"]


def test_the_least_sure_rows_are_the_lost_ones():
    found = by_margin(made_up_answers(), parts=3).set_index("part")
    assert_close(list(found.lost), [2 / 3, 0.0, 0.0])
    assert_close(found.margin[1], 0.2)
    assert set(found.auc) == {1.0}


def test_examples_are_the_rows_that_turned_surest_first():
    found = examples(made_up_answers(), "average", "a")
    assert found["row"].tolist() == [9, 1, 0]
    assert found.kind.tolist() == ["gained", "lost", "lost"]
    assert_close(list(found.margin), [0.95, 0.2, 0.1])


def test_confidence_stands_beside_accuracy():
    found = calibrated(made_up_answers(), draws=20).set_index(["seed", "model"])
    row = found.loc[0, "average"]
    assert_close((row.accuracy, row.confidence), (0.8, 0.9))
    assert_close((row.gap, row.uneven, row.ece), (0.1, 0.1, 0.1))


def test_a_diagram_counts_every_row_once():
    found = diagram(made_up_answers())
    assert found.groupby("model")["count"].sum().to_dict() == {"average": 40, "expert": 40}
    assert_close(found[found.model == "average"].accuracy.item(), 0.8)


def test_depths_have_a_row_per_layer():
    found = depths(made_up_answers())
    assert len(found) == 8 and list(found.layer[:2]) == [0, 1]
    assert found.cka[:2].tolist() == [1.0, 0.5]


# --- asking real experts --------------------------------------------------------------------------


@pytest.fixture
def own_cache(toys, shared_cache):
    return prepare("toy", size="toy")


def test_asked_models_answer_as_evaluate_says(own_cache, monkeypatch):
    bench = own_cache
    table = ask({0: bench}, SIZES["toy"], rows=20)
    assert list(dict.fromkeys(table.model)) == list(MODELS)
    base = shares(evaluate(bench.problem, bench.problem.vectors.base, bench.test))
    found = [np.mean(right) for right in table[table.model == "base"]["right"]]
    assert_close(found, base)
    for row in table[table.model == "expert"].itertuples():
        assert sorted(row.row) == list(range(60))
        assert max(row.sure) <= 1000 and min(row.margin) >= 0
    assert all(abs(value) <= 1 + 1e-6 for value in depths(table).cka)
    monkeypatch.setattr(cache, "dump_json", forbid)
    pd.testing.assert_frame_equal(ask({0: bench}, SIZES["toy"], rows=20), table)


def test_rows_are_those_of_the_test_split_in_the_exams_order(own_cache):
    task = own_cache.problem.vectors.tasks[0]
    data = TASKS[task].load("test")
    order = row_numbers(own_cache, 0)
    assert [data["label"][row] for row in order] == own_cache.test[0].gold.tolist()
    assert texts(task, order[:2]) == [data["text"][row] for row in order[:2]]


def test_no_text_is_in_what_is_asked(own_cache):
    table = ask({0: own_cache}, SIZES["toy"], rows=20)
    columns = {"task", "right", "sure", "margin", "row", "seed", "model"}
    assert set(table.columns) == columns | {"cka", "shift", "common"}
    assert not math.isnan(table["sure"].map(len).mean())


# --- figures --------------------------------------------------------------------------------------


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
    draw_plane.found(ax, pd.DataFrame(rows))
    last = {line.get_label(): line.get_xydata()[-1].tolist() for line in ax.lines}
    assert last["DivMerge, per task"] == [0.9, 0.1] and last["Average"] == [0.5, 0.5]


def test_bars_of_flips_are_as_long_as_what_is_lost_and_gained(ax):
    draw.turned(ax, resampled(made_up_answers(), draws=50))
    assert_close(sorted(bar.get_width() for bar in ax.patches), [-20.0, 10.0])


@pytest.mark.parametrize("bins", [4, 10])
def test_a_reliability_diagrams_bars_stand_in_the_middle_of_their_bins(ax, bins):
    table = diagram(made_up_answers(), bins=bins)
    draw.reliability(ax, table, "average", bins=bins)
    own = table[table.model == "average"]
    middles = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
    assert middles == pytest.approx(((own.bin + 0.5) / bins).tolist())
    assert all(0.8 / bins < bar.get_width() < 1 / bins for bar in ax.patches)


def test_a_diagram_of_more_bins_than_said_is_refused(ax):
    table = diagram(made_up_answers(), bins=20)
    with pytest.raises(ValueError, match="has a bin 1[0-9], counted from 0, but bins is 10: give"):
        draw.reliability(ax, table, "average")


def test_a_reliability_diagram_shows_accuracy_at_its_confidence(ax):
    draw.reliability(ax, diagram(made_up_answers()), "average")
    assert_close(ax.collections[0].get_offsets().tolist(), [[0.9, 0.8]])


def test_layers_margins_costs_and_barriers_say_their_units(ax):
    assert "CKA" in draw.layers(ax, depths(made_up_answers()), "cka").get_ylabel()
    assert "%" in draw.margins(ax, by_margin(made_up_answers())).get_ylabel()
    assert "points" in draw.calibration(ax, calibrated(made_up_answers(), draws=5)).get_xlabel()
    walls = pd.DataFrame({"pair": ["a+b"], "error": [0.1], "error_chord": [0.0]})
    assert "points" in draw_plane.humps(ax, walls).get_xlabel()
    assert "expert" in draw_plane.costs(ax, made_up_costs(), "js").get_xlabel()
