"""Does divergence predict: correlations, permutations, the paper read again, and random merges."""

import math
from dataclasses import replace
from itertools import permutations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.statistics import CORRELATIONS
from divmerge_book.figures import evidence as draw
from divmerge_book.models.finetuning import Expert
from divmerge_book.published import paper, paper_reanalysis
from divmerge_book.studies import correlations as about
from divmerge_book.studies import model_selection
from divmerge_book.studies import random_merges as module
from divmerge_book.studies.correlations import (
    by_task,
    others,
    over_tasks,
    own_point_alone,
    relabelled_p,
    within_p,
)
from divmerge_book.studies.random_merges import (
    DRAWS,
    MEASURES,
    Effort,
    crossed,
    drawn_models,
    evidence,
    random_coefficients,
    random_merge,
    rings,
)
from helpers import linear_problem
from matplotlib.axes import Axes
from test_arrivals import bench_of, forbid

from divmerge_core.divergences import DIVERGENCES

SMALL = Effort(tasks=12, layers=6, near=6, pairs=6, merge=1, validation=1, test=1)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# --- correlations ---------------------------------------------------------------------------------


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


# --- the paper read again -------------------------------------------------------------------------


def test_the_printed_correlations_are_pearsons_to_the_last_digit():
    table = paper_reanalysis.which_correlation()
    assert len(table) == 14
    assert (table.printed - table.pearson).abs().max() < 0.0005
    assert (table.printed - table.spearman).abs().max() > 0.3


def test_rows_behind_percentages():
    assert paper_reanalysis.rows_behind([33.33, 66.67]) == 3
    assert paper_reanalysis.rows_behind([28.88, 26.71, 75.81]) == 277
    with pytest.raises(ValueError, match="no number of rows"):
        paper_reanalysis.rows_behind([1 / 7, 0.0101])


def test_spread_by_hand():
    row = paper_reanalysis.spread().loc["MRPC"]
    rest = paper.table(5)["MRPC"].drop("MRPC")
    assert row["rows"] == 400 and row.highest - row.lowest == pytest.approx(rest.max() - rest.min())
    assert row.error == pytest.approx(np.sqrt((rest * (100 - rest) / 400).mean()))


def test_a_row_of_multiples_lies_on_its_grid_and_a_random_one_does_not():
    steps = np.arange(0.2, 1.0, 0.0005)
    even = 100 - 0.25 * np.array([0, 1, 3, 4, 9, 14])
    gaps = paper_reanalysis.grid_gap(even, steps)
    assert gaps.min() < 1e-9 and steps[gaps.argmin()] == pytest.approx(0.25)
    assert (
        paper_reanalysis.grid_gap(np.array([99.9, 99.63, 98.21, 97.4, 96.37]), steps).min() > 0.01
    )


def test_every_row_of_two_tables_is_a_cell_of_both():
    table = paper_reanalysis.two_tables().set_index(["tasks", "method"])
    assert len(table) == 18
    for (tasks, method), row in table.iterrows():
        assert row.pairs == paper.table(3).loc[method, tasks]
        assert row["row"] == paper.table(paper_reanalysis.PLACES[tasks]).loc[2, method]


def test_js_is_compared_with_kl_and_with_others_in_every_cell():
    table = paper_reanalysis.js_and_kl()
    assert table.groupby("table").size().to_dict() == {3: 4, 6: 12, 7: 6}
    assert (table.gain == (table.js - table.kl).round(2)).all()
    rivals = paper_reanalysis.js_and_others()
    assert len(rivals) == 18 and not rivals.other.str.contains("KL|JS").any()


def test_steps_add_up_to_the_whole_change():
    change = paper_reanalysis.steps(6).sum()
    whole = paper.table(6).loc[7] - paper.table(6).loc[2]
    assert (change - whole).abs().max() < 0.02


# --- random merges --------------------------------------------------------------------------------


@pytest.fixture
def bench(tiny, cache) -> Experiment:
    some = bench_of(linear_problem(num_tasks=3, scale=0.8, rows=8), tiny)
    nobody = Expert("linear", {}, {}, {})  # a pair of tasks selects from these
    return replace(some, experts=[nobody] * 3)


def test_draws_are_what_they_say_and_the_same_again():
    for kind in DRAWS:
        coeffs = [random_coefficients(kind, 3, 5, n, 0) for n in range(200)]
        assert torch.equal(coeffs[7], random_coefficients(kind, 3, 5, 7, 0))
        assert not torch.equal(coeffs[7], random_coefficients(kind, 3, 5, 7, 1))
        low, high = {"near": (0.5, 1.5), "pair": (0, 2), "layer": (0, 2)}.get(kind, (0, 1))
        every = torch.stack(coeffs)
        assert every.shape[1:] == (3, 5 if kind == "layer" else 1)
        assert low <= every.min() and low + 0.9 * (high - low) < every.max() * 1.3 <= 1.3 * high


def test_a_random_merge_is_a_sum_with_its_coefficients(bench):
    vectors = bench.problem.vectors
    coeffs = random_coefficients("task", 3, len(vectors.layout.names), 4, 1)
    merged = random_merge(bench, "task", 4, 1)
    torch.testing.assert_close(merged, vectors.merge(coeffs[:, 0].tolist()), rtol=0, atol=1e-7)
    factors = random_coefficients("near", 3, 5, 2, 1)
    found = random_merge(bench, "near", 2, 1, centre=4)
    expected = vectors.merge((factors * coeffs)[:, 0].tolist())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert random_merge(bench, "layer", 0).shape == merged.shape


def test_a_layer_draw_gives_every_tensor_its_own_coefficient(bench):
    vectors = bench.problem.vectors
    coeffs = random_coefficients("layer", 3, len(vectors.layout.names), 0, 0).to(vectors.base)
    found = vectors.layout.unflatten(random_merge(bench, "layer", 0) - vectors.base)
    parts = [vectors.layout.unflatten(row) for row in vectors.deltas]
    for n, name in enumerate(vectors.layout.names):
        expected = sum(coeffs[t, n] * part[name] for t, part in enumerate(parts))
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)


def test_every_expert_is_nearest_to_itself_and_is_asked_through_the_tasks_head(bench):
    table = crossed(bench).set_index(["task", "model"])
    problem = bench.problem
    for task in problem.vectors.tasks:
        own = table.loc[task, task]
        assert own.js == 0 and own.accuracy == 1 and table.loc[task].js.idxmin() == task
    task, model = problem.vectors.tasks[:2]
    expert, other = problem.vectors.expert(task), problem.vectors.expert(model)
    pairs = [
        (problem.logits(expert, 0, batch), problem.logits(other, 0, batch))
        for batch in problem.batches[0]
    ]
    p, q = (torch.cat(side) for side in zip(*pairs, strict=True))
    for name in MEASURES[:-1]:
        expected = DIVERGENCES[name](p, q).mean().item()
        assert table.loc[(task, model), name] == pytest.approx(expected, abs=1e-5)
    right = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert table.loc[(task, model), "accuracy"] == pytest.approx(right, abs=1e-5)


def test_models_are_drawn_once_in_pieces_and_come_back_from_the_cache(bench, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 3)
    table = drawn_models(bench, "task", 5)
    assert len(table) == 15 and sorted(table.model.unique()) == [0, 1, 2, 3, 4]
    monkeypatch.setattr(module, "asked", forbid)
    pd.testing.assert_frame_equal(drawn_models(bench, "task", 5), table)
    longer = pytest.raises(pytest.fail.Exception, drawn_models, bench, "task", 6)
    assert "repeated" in str(longer.value)


def test_bad_draws_are_told_what_is_allowed(bench):
    with pytest.raises(ValueError, match="choose one of: task, layer, near, pair"):
        drawn_models(bench, "some", 3)
    for kind, count, centre in (("task", 0, None), ("task", 3, 1), ("near", 3, None)):
        with pytest.raises(ValueError, match="centre to 'near' alone"):
            drawn_models(bench, kind, count, centre=centre)


def test_neighbours_form_a_ring():
    assert rings(["a", "b", "c"]) == [("a", "b"), ("b", "c"), ("c", "a")]
    assert rings(["a", "b"]) == [("a", "b")]


@pytest.fixture
def found(bench) -> dict[str, pd.DataFrame]:
    return evidence({0: bench, 1: bench}, SMALL)


def test_evidence_holds_every_draw_of_every_seed(found):
    models = found["models"]
    sizes = models[models.seed == 1].groupby("draws", sort=False).size().to_dict()
    assert sizes == {"task": 36, "layer": 18, "near": 18, "pair": 36}
    assert set(models[models.draws == "pair"].experts) == {
        "task0+task1",
        "task1+task2",
        "task2+task0",
    }
    assert len(found["cross"]) == 2 * 9
    assert not models.drop(columns="seed").duplicated().all()


# --- what the tables say --------------------------------------------------------------------------


def test_a_whole_model_is_its_tasks_summed_and_its_anp_averaged(found):
    whole = model_selection.wholes(found["models"], found["cross"])
    row = whole[(whole.draws == "task") & (whole.seed == 0)].iloc[3]
    models = found["models"]
    own = models[(models.draws == "task") & (models.seed == 0) & (models.model == row.model)]
    assert row.js == pytest.approx(own.js.sum()) and row.entropy == pytest.approx(own.entropy.sum())
    assert row.anp == pytest.approx(own.accuracy.mean())  # these experts are always right


def test_over_models_is_a_loop_over_tasks_and_seeds(found):
    each, means = model_selection.over_models(found["models"], found["cross"], draws=50)
    models = found["models"]
    some = models[(models.draws == "task") & (models.seed == 1) & (models.task == "task2")]
    labels = {"draws": "task", "seed": 1, "task": "task2", "among": "all", "how": "pearson"}
    value = each.set_index([*labels, "criterion"]).value.loc[(*labels.values(), "kl")]
    assert value == pytest.approx(np.corrcoef(-some.kl, some.accuracy)[0, 1])
    all_of = each[(each.draws == "task") & (each.among == "all") & (each.how == "spearman")]
    tasks = all_of[(all_of.task != "sum") & (all_of.criterion == "js")].value.mean()
    key = ["draws", "among", "how", "goal", "criterion"]
    row = means.set_index(key).loc[("task", "all", "spearman", "task", "js")]
    assert row.value == pytest.approx(tasks) and row.low <= row.value <= row.high
    assert row.lead == row.lead_low == row.lead_high == 0


def test_the_best_half_is_chosen_by_validation_rows():
    whole = pd.DataFrame({"validation": [0.1, 0.9, 0.5, 0.7], "anp": [1.0, 0.0, 0.0, 0.0]})
    assert model_selection.kept(whole, "best half").tolist() == [1, 3]
    assert len(model_selection.kept(whole, "all")) == 4


@pytest.mark.parametrize(("count", "drawn"), [(5, 1), (5, 3), (6, 6)])
def test_chances_are_those_of_all_sets(count, drawn):
    sets = [set(some[:drawn]) for some in permutations(range(count))]
    expected = [sum(min(some) == rank for some in sets) / len(sets) for rank in range(count)]
    np.testing.assert_allclose(model_selection.chances(count, drawn), expected)
    with pytest.raises(ValueError, match="can be drawn"):
        model_selection.chances(count, count + 1)


def whole_of(**columns: list[float]) -> pd.DataFrame:
    blank = {name: [1.0, 2.0, 3.0] for name in (*MEASURES, "validation")}
    return pd.DataFrame({**blank, **columns}).assign(draws="task", experts="all", seed=0)


def test_a_choice_by_a_perfect_measure_costs_nothing_and_by_its_opposite_all():
    whole = whole_of(anp=[0.9, 0.5, 0.1], js=[0.1, 0.2, 0.3], kl=[0.3, 0.2, 0.1])
    lost = model_selection.regrets(whole).set_index("criterion")
    assert lost.regret["js"] == 0 and lost["rank"]["js"] == 1
    assert lost.regret["kl"] == pytest.approx(80) and lost["rank"]["kl"] == 3
    table = model_selection.choices(whole, [1, 3, 5]).set_index(["criterion", "candidates"]).anp
    assert table["js", 3] == table["test", 3] == 0.9 and table["kl", 3] == pytest.approx(0.1)
    assert table["js", 1] == pytest.approx(0.5) == table["none", 3]
    assert 5 not in table.index.get_level_values("candidates")


def test_a_regret_has_an_interval_over_seeds_that_holds_it_and_none_for_one_seed():
    one = whole_of(anp=[0.9, 0.5, 0.1], js=[0.3, 0.2, 0.1])
    found = model_selection.regrets(one).set_index("criterion").loc["js"]
    assert np.isnan(found.low) and np.isnan(found.high)
    more = [one.assign(seed=seed, anp=one.anp - [0.1 * seed, 0, 0]) for seed in range(3)]
    found = model_selection.regrets(pd.concat(more)).set_index("criterion").loc["js"]
    each = 100 * np.array([0.8, 0.7, 0.6])
    half = 4.302653 * each.std(ddof=1) / 3**0.5
    assert found.regret == pytest.approx(each.mean())
    assert (found.low, found.high) == pytest.approx((each.mean() - half, each.mean() + half))


@pytest.mark.parametrize("how", CORRELATIONS)
def test_an_expert_that_is_alike_everywhere_leaves_a_correlation_undefined(how):
    closeness, accuracy = noise(5, 5), noise(5, 5, seed=1)
    accuracy[2] = 0.3
    table = by_task(closeness, accuracy, list("abcde")).query("how == @how").set_index("task")
    assert table.loc["c", ["value", "low", "high", "p"]].isna().all()
    assert table.drop("c").p.notna().all()
    whole = over_tasks(closeness, accuracy, draws=50).set_index("how").loc[how]
    assert whole[["value", "low", "high", "within", "relabelled"]].isna().all()


def test_squares_are_the_cross_tables_rows(found):
    x, y = next(model_selection.squares(found["cross"], "js"))
    assert x.shape == y.shape == (3, 3) and (np.diag(x) == 0).all() and (np.diag(y) == 1).all()
    row = found["cross"].set_index(["seed", "task", "model"]).loc[(0, "task0", "task2")]
    assert x[0, 2] == -row.js and y[0, 2] == row.accuracy
    assert about.others(x).shape == (3, 2)


# --- figures --------------------------------------------------------------------------------------


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def places(ax: Axes, marker: str) -> list[list[float]]:
    """Coordinates of every mark of this kind."""
    lines = [line for line in ax.get_lines() if line.get_marker() == marker]
    return [np.column_stack(line.get_data()).squeeze().tolist() for line in lines]


def test_a_star_stands_at_the_printed_value_and_a_circle_at_the_others(ax):
    table, _ = paper_reanalysis.without_the_point()
    some = table[(table.how == "pearson") & (table.divergence == "JS")]
    draw.trivial_point(ax, some)
    assert places(ax, "*") == [[value, y] for y, value in enumerate(some.kept)]
    assert places(ax, "o") == [[value, y] for y, value in enumerate(some.value)]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(some.task)


def test_the_line_is_fitted_to_the_others_alone(ax):
    x, y = np.array([0.0, -1.0, -2.0, -3.0]), np.array([0.9, 0.3, 0.2, 0.1])
    draw.experts_asked(ax, x, y, "a task")
    (line,) = [line for line in ax.get_lines() if line.get_linestyle() == "-"]
    np.testing.assert_allclose(line.get_data(), [[-3, -1], [10, 30]])
    assert places(ax, "*") == [[0, 90]] and ax.get_title() == "a task"


def test_both_tables_are_drawn_method_by_method(ax):
    some = paper_reanalysis.two_tables().query("tasks == 'generation'")
    draw.two_values(ax, some, ("first", "second"))
    diamonds = places(ax, "D")
    assert [[value, y] for y, value in enumerate(some["row"])] == diamonds[:9]


def test_gains_have_a_line_per_kind_and_level(ax):
    table = paper_reanalysis.js_and_kl()
    draw.js_gains(ax, table[table.table != 3])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == [
        *("classification, per task", "classification, per layer"),
        *("generation, per task", "generation, per layer"),
    ]


def test_our_figures_draw_every_criterion(ax, found):
    whole = model_selection.wholes(found["models"], found["cross"])
    draw.models_judged(ax, whole[whole.draws == "task"], "js")
    assert sum(len(xy) for xy in places(ax, "o") + places(ax, "s")) == 2 * SMALL.tasks
    each, means = model_selection.over_models(found["models"], found["cross"], draws=20)
    ax.clear()
    chosen = {"draws": "task", "among": "all", "how": "pearson", "goal": "sum"}
    draw.correlation_rows(ax, means, {"a row": chosen})
    key = ["draws", "among", "how", "goal", "criterion"]
    value = means.set_index(key).value.loc[(*chosen.values(), "reverse_kl")]
    assert [round(x, 6) for x, _ in filter(None, places(ax, "D"))] == [round(value, 6)]
    ax.clear()
    some = each[(each.draws == "task") & (each.among == "all") & (each.how == "pearson")]
    draw.by_task(ax, some[some.task != "sum"])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["task0", "task1", "task2"]
    ax.clear()
    draw.choosing(ax, model_selection.choices(whole[whole.draws == "task"], [1, 5, 12]))
    assert len(ax.get_lines()) == len(draw.MARKS) and list(ax.get_xticks()) == [1, 5, 12]
