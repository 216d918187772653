"""Choosing a merged model by a divergence: correlations, probabilities and regrets."""

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from divmerge_book.figures import evidence as draw
from divmerge_book.studies import model_selection
from divmerge_book.studies.correlations import others
from divmerge_book.studies.random_merges import MEASURES, random_merges
from helpers import linear_experiment, places

COUNTS = SimpleNamespace(task=12, layer=0, near=0, pair=0)


@pytest.fixture(scope="module")
def found(tiny, module_cache) -> dict[str, pd.DataFrame]:
    one = linear_experiment(tiny, 3, rows=8)
    return random_merges({0: one, 1: one}, COUNTS)


def test_a_whole_model_is_its_tasks_summed_and_its_anp_averaged(found):
    models, whole = found["models"], model_selection.model_scores(found["models"], found["cross"])
    row = whole[whole.seed == 0].iloc[3]
    own = models[(models.seed == 0) & (models.model == row.model)]
    assert row.js == pytest.approx(own.js.sum()) and row.entropy == pytest.approx(own.entropy.sum())
    assert row.anp == pytest.approx(own.accuracy.mean())  # these experts are always right


def test_over_models_is_a_loop_over_tasks_and_seeds(found):
    each, means = model_selection.over_models(found["models"], found["cross"], draws=50)
    some = found["models"].query("seed == 1 and task == 'task2'")
    all_of = each[each.among == "all"].set_index(["how", "seed", "task", "criterion"]).value
    expected = np.corrcoef(-some.kl, some.accuracy)[0, 1]
    assert all_of["pearson", 1, "task2", "kl"] == pytest.approx(expected)
    tasks = all_of["spearman"].drop(index="sum", level="task").xs("js", level="criterion")
    row = means.query("among == 'all' and how == 'spearman' and goal == 'task'").iloc[0]
    assert row.criterion == "js" and row.value == pytest.approx(tasks.mean())
    assert row.low <= row.value <= row.high and row.lead == row.lead_low == row.lead_high == 0


def test_the_best_half_is_chosen_by_validation_rows():
    whole = pd.DataFrame({"validation": [0.1, 0.9, 0.5, 0.7], "anp": [1.0, 0.0, 0.0, 0.0]})
    assert model_selection.top_models(whole, "best half").tolist() == [1, 3]
    assert len(model_selection.top_models(whole, "all")) == 4


@pytest.mark.parametrize(("count", "drawn"), [(5, 1), (5, 3), (6, 6)])
def test_probabilities_are_those_of_all_sets(count, drawn):
    sets = [set(some[:drawn]) for some in permutations(range(count))]
    expected = [sum(min(some) == rank for some in sets) / len(sets) for rank in range(count)]
    np.testing.assert_allclose(model_selection.best_of_n_probability(count, drawn), expected)
    with pytest.raises(ValueError, match="can be drawn"):
        model_selection.best_of_n_probability(count, count + 1)


def whole_of(**columns: list[float]) -> pd.DataFrame:
    blank = {name: [1.0, 2.0, 3.0] for name in (*MEASURES, "validation")}
    return pd.DataFrame({**blank, **columns}).assign(sampler="task", experts="all", seed=0)


def test_a_choice_by_a_perfect_measure_costs_nothing_and_by_its_opposite_all():
    whole = whole_of(anp=[0.9, 0.5, 0.1], js=[0.1, 0.2, 0.3], kl=[0.3, 0.2, 0.1])
    lost = model_selection.selection_regret(whole).set_index("criterion")
    assert lost.regret["js"] == 0 and lost["rank"]["js"] == 1
    assert lost.regret["kl"] == pytest.approx(80) and lost["rank"]["kl"] == 3
    table = model_selection.choices(whole, [1, 3, 5]).set_index(["criterion", "candidates"]).anp
    assert table["js", 3] == table["test", 3] == 0.9 and table["kl", 3] == pytest.approx(0.1)
    assert table["js", 1] == pytest.approx(0.5) == table["none", 3]
    assert 5 not in table.index.get_level_values("candidates")


def test_a_regret_has_an_interval_over_seeds_that_holds_it_and_none_for_one_seed():
    one = whole_of(anp=[0.9, 0.5, 0.1], js=[0.3, 0.2, 0.1])
    found = model_selection.selection_regret(one).set_index("criterion").loc["js"]
    assert np.isnan(found.low) and np.isnan(found.high)
    more = [one.assign(seed=seed, anp=one.anp - [0.1 * seed, 0, 0]) for seed in range(3)]
    found = model_selection.selection_regret(pd.concat(more)).set_index("criterion").loc["js"]
    each = 100 * np.array([0.8, 0.7, 0.6])
    half = 4.302653 * each.std(ddof=1) / 3**0.5
    assert found.regret == pytest.approx(each.mean())
    assert (found.low, found.high) == pytest.approx((each.mean() - half, each.mean() + half))


def test_squares_are_the_cross_tables_rows(found):
    x, y = next(model_selection.squares(found["cross"], "js"))
    assert x.shape == y.shape == (3, 3) and (np.diag(x) == 0).all() and (np.diag(y) == 1).all()
    row = found["cross"].set_index(["seed", "task", "model"]).loc[(0, "task0", "task2")]
    assert x[0, 2] == -row.js and y[0, 2] == row.accuracy
    assert others(x).shape == (3, 2)


def test_our_figures_draw_every_criterion(ax, found):
    whole = model_selection.model_scores(found["models"], found["cross"])
    draw.model_scatter(ax, whole, "js")
    assert sum(len(xy) for xy in places(ax, "o") + places(ax, "s")) == 2 * COUNTS.task
    each, means = model_selection.over_models(found["models"], found["cross"], draws=20)
    ax.clear()
    chosen = {"sampler": "task", "among": "all", "how": "pearson", "goal": "sum"}
    draw.correlation_rows(ax, means, {"a row": chosen})
    value = means.set_index([*chosen, "criterion"]).value.loc[(*chosen.values(), "reverse_kl")]
    assert [round(x, 6) for x, _ in filter(None, places(ax, "^"))] == [round(value, 6)]
    ax.clear()
    draw.selection_curve(ax, model_selection.choices(whole, [1, 5, 12]))
    assert len(ax.get_lines()) == len(draw.CRITERIA) and list(ax.get_xticks()) == [1, 5, 12]
