"""What goes with a drop: the losses of pairs, covariates of a subset, and every single task."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from divmerge_book.figures import scaling as draw
from divmerge_book.studies import task_attribution as attribution
from divmerge_book.studies.task_attribution import forecasts, marginal, r_squared, shapley_values

TASKS = list("abcdef")


def losses_by(rule, tasks: str = "abcde") -> pd.DataFrame:
    """`ratios` rows of all subsets whose losses are `rule(task, partners)`."""
    rows = [
        ("+".join(s), n, task, 1 - rule(task, [o for o in s if o != task]))
        for n in range(1, len(tasks) + 1)
        for s in combinations(tasks, n)
        for task in s
    ]
    table = pd.DataFrame(rows, columns=["subset", "T", "task", "ratio"])
    return table.assign(kept_margin=3 * table.ratio - 2)  # the majority has 2/3 of the expert's


def harm(task: str, other: str) -> float:
    return 0.01 * ((3 * ord(task) + 5 * ord(other)) % 7)


ADDED = losses_by(lambda task, others: 0.05 + sum(harm(task, other) for other in others))
WORST = losses_by(lambda task, others: max([harm(task, other) for other in others] or [0.0]))


def test_losses_are_foretold_by_the_rule_that_made_them():
    found, other = forecasts(ADDED), forecasts(WORST)
    np.testing.assert_allclose(found["sum"], found.loss, atol=1e-12)
    np.testing.assert_allclose(other.worst, other.loss, atol=1e-12)
    assert (other["sum"] >= other.loss - 1e-12).all()
    whole = attribution.skill(found, draws=20).set_index(["T", "forecast"])
    assert whole.r2[0, "sum"] == pytest.approx(1) and whole.r2[0, "line"] == pytest.approx(1)
    assert whole.r2[0, "mean"] < 0.9
    by_ratio = attribution.pair_forecasts(WORST)
    by_margin = attribution.pair_forecasts(WORST, "kept_margin")
    for column in ("loss", "sum", "worst", "mean"):
        assert by_margin[column].tolist() == pytest.approx(3 * by_ratio[column])


def test_tasks_whose_pairs_were_not_merged_are_left_out():
    table = losses_by(lambda task, others: 0.1 * len(others), "abcd")
    found = forecasts(table[table.subset != "a+b"])
    both = found[found.subset.str.startswith("a+b")]
    assert set(both.task) == {"c", "d"} and set(found.task) == set("abcd")


def test_what_a_subset_loses_does_not_enter_its_own_forecast():
    table = ADDED.copy()
    before = forecasts(table).set_index(["subset", "task"])
    table.loc[table.subset == "a+b+c", "ratio"] -= 0.3
    after = forecasts(table).set_index(["subset", "task"])
    names = ["sum", "worst", "mean", "line", "usual"]
    pd.testing.assert_frame_equal(before.loc[["a+b+c"], names], after.loc[["a+b+c"], names])
    assert not np.allclose(before.usual["a+b+d"], after.usual["a+b+d"])


def test_r_squared_is_one_for_the_truth_nought_for_the_mean_and_below_for_worse():
    loss = np.array([0.1, 0.4, 0.2])
    assert r_squared(loss, loss) == 1
    assert r_squared(loss, np.full(3, loss.mean())) == pytest.approx(0)
    assert r_squared(loss, -loss) < 0 and np.isnan(r_squared(np.ones(3), loss))


def test_a_bootstrap_keeps_a_subset_whole_and_every_t_as_large():
    for chosen in attribution.drawn_subsets(ADDED, 5):
        some = ADDED.iloc[chosen]
        assert (some.groupby("subset").size() % some.groupby("subset")["T"].first() == 0).all()
        assert some["T"].value_counts().to_dict() == ADDED["T"].value_counts().to_dict()


# --- covariates -----------------------------------------------------------------------------------
def geometry_of(vectors: np.ndarray) -> pd.DataFrame:
    """A table of `scaling.geometry` without sign conflicts."""
    inner, lengths = vectors @ vectors.T, np.linalg.norm(vectors, axis=1)
    names = TASKS[: len(vectors)]
    pairs = pd.MultiIndex.from_product([names, names], names=["task", "other"])
    columns = {"inner": inner.ravel(), "cosine": (inner / np.outer(lengths, lengths)).ravel()}
    return pd.DataFrame({**columns, "conflict": 0.0}, pairs).reset_index()


def test_numbers_of_task_vectors_by_hand():
    vectors = np.array([[1.0, 0], [0, 2], [1, 0], [-1, 0]])
    tasks, squares = attribution.squares_of(geometry_of(vectors))
    pairs = attribution.members(["a+b", "a+c", "a+d"], tasks)
    found = pd.DataFrame(attribution.weight_numbers(pairs, squares))
    assert found.growth.tolist() == pytest.approx([1, 2**0.5, 0])
    assert found.cosine.tolist() == [0, 1, -1] and found.lengths.tolist() == [2, 1, 1]


def test_ranks_run_from_minus_one_to_one_and_equals_share():
    assert attribution.places(np.array([3.0, 1.0, 2.0])).tolist() == [1, -1, 0]
    assert attribution.places(np.array([1.0, 1.0, 2.0])).tolist() == [-0.5, -0.5, 1]


def test_what_t_says_is_left_out_of_a_rank_correlation():
    sizes = np.repeat([2, 3], 4)
    number = np.tile([1.0, 2, 3, 4], 2) + 10 * (sizes == 2)  # higher, on the whole, at T = 2 ...
    anp = np.tile([0.4, 0.3, 0.2, 0.1], 2) + 0.5 * (sizes == 2)  # ... where the ANP is higher too
    assert np.corrcoef(number, anp)[0, 1] > 0
    assert attribution.rank_correlation(sizes, number, anp) == pytest.approx(-1)
    assert np.isnan(attribution.rank_correlation(sizes[:2], number[:2], anp[:2]))


@pytest.fixture
def numbered() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Subsets whose ANP is minus the mean cosine of their task vectors, and the geometry."""
    shape = geometry_of(np.random.default_rng(0).standard_normal((6, 4)))
    names = ["+".join(s) for n in range(2, 7) for s in combinations(TASKS, n)]
    _, squares = attribution.squares_of(shape)
    cosine = attribution.weight_numbers(attribution.members(names, TASKS), squares)["cosine"]
    table = pd.DataFrame({"subset": names, "anp": -cosine, "js": cosine})
    table["T"] = table.subset.str.count(r"\+") + 1
    floor = dict(zip(TASKS, np.linspace(0.3, 0.9, 6), strict=True))
    return attribution.with_numbers(table, shape, floor), shape


def test_a_number_that_decides_the_anp_is_found_and_trades_of_names_lose_it(numbered):
    table, shape = numbered
    found = attribution.related(table, draws=20).set_index("number")
    assert found.rho["cosine"] == pytest.approx(-1) and found.rho["js"] == pytest.approx(-1)
    p = attribution.mantel(table, shape, draws=39)
    assert p["cosine"] < 0.05 and all(0 < value <= 1 for n, value in p.items() if n != "conflict")
    assert np.isnan(found.rho["conflict"]) and np.isnan(p["conflict"])  # it never varies


def test_pairs_and_floor_are_means_over_the_subset(numbered):
    table = numbered[0].set_index("subset")
    pairs = [1 - table.anp[name] for name in ("a+b", "a+c", "b+c")]
    assert table.pairs["a+b+c"] == pytest.approx(np.mean(pairs))
    assert table.floor["a+b+c"] == pytest.approx((0.3 + 0.42 + 0.54) / 3)


# --- single tasks ---------------------------------------------------------------------------------
def test_effects_of_tasks_by_hand():
    """Task b costs everyone it joins 0.2, the others nothing."""
    table = losses_by(lambda task, others: 0.2 * ("b" in others), "abc")
    steps = marginal(table)
    np.testing.assert_allclose(steps[steps.added == "b"].change, -0.2)
    np.testing.assert_allclose(steps[steps.added != "b"].change, 0, atol=1e-12)
    assert len(steps) == 3 * 2 + 3  # every task joins two single ones and one pair
    assert marginal(table[table["T"] == 2]).empty
    found = shapley_values(table).set_index("task")
    assert found.marginal_effect["b"] == pytest.approx(-0.2)
    # Of the two subsets of two one holds b, and so does the one of three.
    assert found.own_change[["a", "b"]].tolist() == pytest.approx([-(0.1 + 0.2) / 2, 0])
    kept = shapley_values(table, "kept_margin").set_index("task").loc[found.index]
    assert kept.to_numpy() == pytest.approx(3 * found.to_numpy())


def test_figures_of_explanations_say_what_their_axes_are(ax, numbered):
    table = losses_by(lambda task, others: 0.1 * len(others) + 0.01 * ord(task) % 0.05)
    found = forecasts(table)
    assert "pairs add up" in draw.forecast_scatter(ax, found, "sum").get_xlabel()
    draw.correlations(ax, attribution.related(numbered[0], draws=5).assign(method="ties"))
    assert "rank correlation" in ax.get_xlabel()
    draw.task_effects(ax, shapley_values(table))
    assert [label.get_text() for label in ax.get_yticklabels()] == list(shapley_values(table).task)


def test_the_average_is_ringed_on_every_curve_over_scales(ax):
    rows = [(n, s, True, 0.5) for n in (2, 4) for s in (0.1, 1.0)]
    rows += [(n, 1 / n, False, 0.6) for n in (2, 4)]
    draw.scale_curve(ax, pd.DataFrame(rows, columns=["T", "scale", "fixed", "anp"]))
    rings = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
    assert sorted(rings) == [0.25, 0.5]
    draw.coefficient_curve(ax, {"found": pd.Series([0.6, 0.3], index=[2, 4])})
