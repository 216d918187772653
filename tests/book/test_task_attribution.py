"""What may explain a drop: covariates of a subset, and the part of every single task."""

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from divmerge_book.figures import scaling as draw
from divmerge_book.studies import task_attribution
from divmerge_book.studies.additive import forecasts, skill
from divmerge_book.studies.task_attribution import (
    Geometry,
    mantel,
    marginal,
    places,
    shapley_values,
)
from study_tables import losses_by, toy_scores

TASKS = list("abcdef")


def geometry_of(vectors: list[list[float]]) -> Geometry:
    rows = np.array(vectors, dtype=float)
    lengths = np.linalg.norm(rows, axis=1)
    inner = rows @ rows.T
    cosine = inner / np.outer(lengths, lengths)
    return Geometry(tuple(TASKS[: len(rows)]), inner, cosine, np.zeros_like(inner))


def test_numbers_of_task_vectors_by_hand():
    found = geometry_of([[1, 0], [0, 2], [1, 0], [-1, 0]])
    right, same, against = (found.numbers(name) for name in ("a+b", "a+c", "a+d"))
    assert (right["growth"], right["cosine"], right["lengths"]) == (pytest.approx(1), 0, 2)
    assert (same["growth"], same["cosine"]) == (pytest.approx(2**0.5), 1)
    assert (against["growth"], against["cosine"]) == (0, -1)


def test_ranks_run_from_minus_one_to_one_and_equals_share():
    assert places(np.array([3.0, 1.0, 2.0])).tolist() == [1, -1, 0]
    assert places(np.array([1.0, 1.0, 2.0])).tolist() == [-0.5, -0.5, 1]


def test_what_t_says_is_left_out_of_a_rank_correlation():
    sizes = np.repeat([2, 3], 4)
    number = np.tile([1.0, 2, 3, 4], 2) + 10 * (sizes == 2)  # higher, on the whole, at T = 2 ...
    anp = np.tile([0.4, 0.3, 0.2, 0.1], 2) + 0.5 * (sizes == 2)  # ... where the ANP is higher too
    assert np.corrcoef(number, anp)[0, 1] > 0
    assert task_attribution.rank_correlation(sizes, number, anp) == pytest.approx(-1)
    assert np.isnan(task_attribution.rank_correlation(sizes[:2], number[:2], anp[:2]))


@pytest.fixture
def numbered() -> tuple[pd.DataFrame, Geometry]:
    """Subsets whose ANP is minus the mean cosine of their task vectors."""
    shape = geometry_of(np.random.default_rng(0).standard_normal((6, 4)).tolist())
    names = ["+".join(s) for n in range(2, 7) for s in combinations(TASKS, n)]
    table = toy_scores({(0, "average", name): -shape.numbers(name)["cosine"] for name in names})
    floor = dict(zip(TASKS, np.linspace(0.3, 0.9, 6), strict=True))
    return task_attribution.with_numbers(table.assign(js=-table.anp), shape, floor), shape


def test_a_number_that_decides_the_anp_is_found_and_trades_of_names_lose_it(numbered):
    table, shape = numbered
    found = task_attribution.related(table, draws=20).set_index("number")
    assert found.rho["cosine"] == pytest.approx(-1) and found.rho["js"] == pytest.approx(-1)
    p = mantel(table, shape, draws=39)
    assert p["cosine"] < 0.05 and all(0 < value <= 1 for n, value in p.items() if n != "conflict")
    assert np.isnan(found.rho["conflict"]) and np.isnan(p["conflict"])  # it never varies


def test_pairs_and_floor_are_means_over_the_subset(numbered):
    table = numbered[0].set_index("subset")
    pairs = [1 - table.anp[name] for name in ("a+b", "a+c", "b+c")]
    assert table.pairs["a+b+c"] == pytest.approx(np.mean(pairs))
    assert table.floor["a+b+c"] == pytest.approx((0.3 + 0.42 + 0.54) / 3)


def test_a_trade_of_names_moves_rows_and_columns_together():
    shape = geometry_of([[1, 0], [0, 2], [3, 1]])
    traded = shape.traded([2, 0, 1])
    assert traded.inner[0, 1] == shape.inner[2, 0] and traded.inner[1, 1] == shape.inner[0, 0]


def test_parts_by_hand():
    """Task b costs everyone it joins 0.2, the others nothing."""
    table = losses_by(lambda task, others: 0.2 * ("b" in others), "abc")
    steps = marginal(table)
    np.testing.assert_allclose(steps[steps.added == "b"].change, -0.2)
    np.testing.assert_allclose(steps[steps.added != "b"].change, 0, atol=1e-12)
    assert len(steps) == 3 * 2 + 3  # every task joins two single ones and one pair
    found = shapley_values(table).set_index("task")
    assert found.caused["b"] == pytest.approx(-0.2) and found.suffered["b"] == pytest.approx(0)
    by_margin = table.assign(kept_margin=3 * table.ratio - 2)
    kept = shapley_values(by_margin, "kept_margin").set_index("task").loc[found.index]
    assert kept.caused.tolist() == pytest.approx(3 * found.caused)
    assert kept.suffered.tolist() == pytest.approx(3 * found.suffered)
    # Of the two subsets of two one holds b, and so does the one of three.
    assert found.suffered["a"] == pytest.approx(-(0.1 + 0.2) / 2)


def test_a_table_without_nested_subsets_has_no_marginal_effects():
    table = losses_by(lambda task, others: 0.1, "abc")
    assert marginal(table[table["T"] == 2]).empty


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    figure.canvas.draw()
    plt.close(figure)


def test_figures_of_explanations_say_what_their_axes_are(ax, numbered):
    table = losses_by(lambda task, others: 0.1 * len(others) + 0.01 * ord(task) % 0.05)
    found = forecasts(table)
    assert "pairs add up" in draw.forecast_scatter(ax, found, "sum").get_xlabel()
    draw.forecast_skill(ax, skill(found, draws=5).assign(method="average"))
    assert ax.get_xlabel() == "$R^2$ of a task's loss"
    draw.correlations(ax, task_attribution.related(numbered[0], draws=5).assign(method="ties"))
    assert "rank correlation" in ax.get_xlabel()
    draw.task_effects(ax, shapley_values(table))
    assert [label.get_text() for label in ax.get_yticklabels()] == list(shapley_values(table).task)


def test_the_average_is_ringed_on_every_curve_over_scales(ax):
    rows = [(n, s, True, 0.5) for n in (2, 4) for s in (0.1, 1.0)]
    rows += [(n, 1 / n, False, 0.6) for n in (2, 4)]
    table = pd.DataFrame(rows, columns=["T", "scale", "fixed", "anp"])
    draw.scale_curve(ax, table)
    rings = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
    assert sorted(rings) == [0.25, 0.5]
    draw.coefficient_curve(ax, {"found": pd.Series([0.6, 0.3], index=[2, 4])})
