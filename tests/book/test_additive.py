"""Do the losses of pairs add up: forecasts by hand, and their skill."""

import numpy as np
import pandas as pd
import pytest
from divmerge_book.studies import additive
from divmerge_book.studies.additive import forecasts, pair_forecasts, r_squared, skill
from study_tables import losses_by


def harm(task: str, other: str) -> float:
    return 0.01 * ((3 * ord(task) + 5 * ord(other)) % 7)


def test_losses_that_add_up_are_foretold_by_the_sum():
    table = losses_by(lambda task, others: 0.05 + sum(harm(task, other) for other in others))
    found = forecasts(table)
    np.testing.assert_allclose(found["sum"], found.loss, atol=1e-12)
    whole = skill(found, draws=20).set_index(["T", "forecast"])
    assert whole.r2[0, "sum"] == pytest.approx(1) and whole.r2[0, "line"] == pytest.approx(1)
    assert whole.r2[0, "mean"] < 0.9


def test_losses_may_be_those_of_the_kept_margin():
    table = losses_by(lambda task, others: 0.1 * len(others))
    table = table.assign(kept_margin=3 * table.ratio - 2)  # a majority of two thirds of the expert
    by_ratio, by_margin = pair_forecasts(table), pair_forecasts(table, "kept_margin")
    for column in ("loss", "sum", "worst", "mean"):
        assert by_margin[column].tolist() == pytest.approx(3 * by_ratio[column])


def test_losses_of_the_worst_partner_are_foretold_by_the_worst_pair():
    table = losses_by(lambda task, others: max([harm(task, other) for other in others] or [0.0]))
    found = forecasts(table)
    np.testing.assert_allclose(found.worst, found.loss, atol=1e-12)
    assert (found["sum"] >= found.loss - 1e-12).all()


def test_tasks_whose_pairs_were_not_merged_are_left_out():
    table = losses_by(lambda task, others: 0.1 * len(others), "abcd")
    found = forecasts(table[table.subset != "a+b"])
    both = found[found.subset.str.startswith("a+b")]
    assert set(both.task) == {"c", "d"} and set(found.task) == set("abcd")


def test_what_a_subset_loses_does_not_enter_its_own_forecast():
    table = losses_by(lambda task, others: sum(harm(task, other) for other in others))
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
    table = losses_by(lambda task, others: 0.0)
    for chosen in additive.drawn_subsets(table, 5):
        some = table.iloc[chosen]
        assert (some.groupby("subset").size() % some.groupby("subset")["T"].first() == 0).all()
        assert some["T"].value_counts().to_dict() == table["T"].value_counts().to_dict()
