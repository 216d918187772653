"""Estimates against SciPy, slow loops, and simulations whose truth is known."""

import math
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from divmerge_book.evaluation import statistics as estimates
from divmerge_book.evaluation.coverage import EFFECTS, STATISTICS, accuracies, simulated, truth
from divmerge_book.evaluation.statistics import CORRELATIONS, Estimate, crossed, fisher_interval
from scipy import stats
from torch.testing import assert_close


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return generator(seed).standard_normal(shape)


def test_draws_of_rows_have_the_variance_of_a_mean_and_the_same_rows_for_all_columns():
    values = np.repeat(noise(5, 1), 3, axis=1)
    means = estimates.row_means(values, 20000, generator())
    assert means[0] == pytest.approx(values.mean(0))
    assert (means[:, :1] == means).all()
    assert means[1:, 0].var() == pytest.approx(values[:, 0].var(ddof=1) / 5, rel=0.04)
    assert estimates.row_means(np.ones((1, 2)), 5, generator()).tolist() == [[1, 1]] * 6


def scored(num_seeds: int, seed_spread: float, draws: int = 4000) -> Estimate:
    """The mean of 200 rows that each seed answers with noise of its own."""
    rng = generator(num_seeds)
    rows, each = rng.standard_normal((200, 1)), rng.standard_normal((200, num_seeds))
    seeds = seed_spread * rng.standard_normal(num_seeds)
    means = estimates.row_means(rows + each + seeds, draws, rng)
    return crossed(means[0], means[1:].T, 199)


def test_the_variance_of_rows_is_found_beside_that_of_seeds():
    """Rows add 1 / 200, whatever seeds add; seeds with their own noise add 1 / (200 S)."""
    found = scored(40, 0.0)
    assert found.within == pytest.approx(1 / 200, rel=0.25)
    assert found.between == pytest.approx(1 / 200 / 40, rel=0.6)
    assert scored(40, 1.0).between == pytest.approx(1 / 40, rel=0.6)
    assert scored(40, 1.0).within == pytest.approx(1 / 200, rel=0.25)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_equal_seeds_say_no_more_than_one(count):
    means = estimates.row_means(noise(50, 1), 500, generator())
    first, rest = means[0], means[1:].T
    alone, same = (crossed(np.repeat(first, k), np.repeat(rest, k, 0), 49) for k in (1, count))
    assert same.half() == pytest.approx(alone.half(), rel=1e-9)
    assert same.between == pytest.approx(0, abs=1e-30)


@pytest.mark.parametrize("count", [2, 3])
def test_noise_of_single_seeds_is_no_variance_of_rows(count):
    """Draws vary by 4 for all seeds together, and by 9 for each alone."""
    draws = np.linalg.qr(np.c_[np.ones(9), noise(9, count + 1)])[0].T[1:] * 8**0.5
    found = crossed(np.zeros(count), 2 * draws[0] + 3 * draws[1:], 8)
    assert found.within == pytest.approx(4)


def test_seeds_alone_give_students_interval_and_rows_alone_too():
    values = noise(4)
    found = crossed(values, np.repeat(values[:, None], 9, axis=1), 100)
    assert found.interval() == pytest.approx(estimates.mean_interval(values))
    rows = Estimate(np.float64(1), np.float64(0), np.float64(4), 1, 25)
    assert rows.half() == pytest.approx(2 * stats.t.ppf(0.975, 25))
    constant = crossed(np.ones((3, 2)), np.ones((3, 10, 2)), 9)
    assert [end.tolist() for end in constant.interval()] == [[1, 1], [1, 1]]


def test_the_quantile_nears_cochrans_from_satterthwaites_by_the_share_of_seeds():
    found = Estimate(np.float64(0), np.float64(0.5), np.float64(1.0), 3, 99)
    satterthwaite = stats.t.ppf(0.975, 1 / ((1 / 3) ** 2 / 2 + (2 / 3) ** 2 / 99))
    cochran = stats.t.ppf(0.975, 2) / 3 + 2 * stats.t.ppf(0.975, 99) / 3
    assert found.half() == pytest.approx((2 * satterthwaite + cochran) / 3 * 1.5**0.5)


@pytest.mark.parametrize("between", [0.0, 0.5])
@pytest.mark.parametrize("value", [0.3, -2.0, 5.0])
def test_an_interval_of_level_one_minus_p_touches_zero(value, between):
    found = Estimate(np.float64(value), np.float64(between), np.float64(1.0), 3, 99)
    low, high = found.interval(1 - found.p())
    assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-6)
    assert (found.p() < 0.05) == (abs(value) > found.half())


def test_no_difference_has_p_1_and_a_sure_one_the_smallest():
    zero = np.float64(0)
    assert Estimate(zero, zero, zero, 3, 9).p() == 1 == Estimate(zero, zero, zero + 1, 3, 9).p()
    assert Estimate(zero + 1, zero, zero, 3, 9).p() == pytest.approx(1e-12)
    assert Estimate(zero + 1, zero, zero + 1e-6, 1, 999).p() == pytest.approx(1e-12)


@pytest.mark.parametrize("effects", EFFECTS)
def test_intervals_hold_the_truth_about_as_often_as_they_say(effects):
    """Of 75 experiments at each setting; the table of `coverage` has a thousand or more."""
    settings = [(seeds, spread) for seeds in (3, 5) for spread in (0.05, 0.3)]
    parts = [simulated(*one, effects, experiments=75, draws=150) for one in settings]
    found = pd.concat(parts).groupby("statistic").coverage.mean()
    assert set(found.index) == set(STATISTICS)
    assert found.between(91, 99).all(), found


def test_the_truth_of_the_simulation_is_that_of_a_large_sample():
    """A hundred thousand seeds, and exact rows."""
    effects = 0.3 * noise(20000)
    every = accuracies(effects)
    anp = (every[:, 1:].mean(-1) * (1 / every[:, :1]).mean(-1)).mean(0)
    assert truth(0.3)["anp"][1:] == pytest.approx(anp, abs=2e-3)
    assert truth(0.0)["anp"][0] == truth(0.0)["kept_margin"][0] == 1


def test_the_interval_of_a_mean_is_scipys():
    values = noise(7)
    test = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert estimates.mean_interval(values) == pytest.approx((test.low, test.high))
    assert all(map(math.isnan, estimates.mean_interval(values[:1])))
    assert all(map(math.isnan, estimates.mean_interval(np.array([1.0, np.nan]))))


def test_the_middle_of_draws_leaves_out_what_is_undefined():
    drawn = np.stack([np.arange(101.0), np.full(101, np.nan)], axis=1)
    drawn[0, 0] = np.nan
    low, high = estimates.middle(drawn)
    assert (low[0], high[0]) == pytest.approx(tuple(np.percentile(np.arange(1, 101), [2.5, 97.5])))
    assert np.isnan([low[1], high[1]]).all()


@pytest.mark.parametrize("how", CORRELATIONS)
def test_correlations_are_scipys_along_the_last_axis(how):
    slow = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[how]
    x, y = noise(3, 1, 9), generator(1).integers(5, size=(4, 9)).astype(float)
    found = CORRELATIONS[how](x, y)
    expected = [[slow(x[i, 0], y[j]).statistic for j in range(4)] for i in range(3)]
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("how", CORRELATIONS)
def test_what_does_not_vary_has_no_correlation_and_no_p(how):
    x, flat = np.arange(1.0, 6), np.full(5, 0.1)
    assert np.isnan([CORRELATIONS[how](x, flat), CORRELATIONS[how](flat, x)]).all()
    assert np.isnan([estimates.exact_p(x, flat, how), estimates.exact_p(flat, x, how)]).all()
    assert np.isnan(CORRELATIONS[how](x[:0], x[:0])) and np.isnan(CORRELATIONS[how](x[:1], x[:1]))
    assert np.isnan(estimates.standard(np.full((1, 4), 2.0))).all()
    assert np.isnan(fisher_interval(float("nan"), 9, how)).all()


def test_equal_values_share_their_mean_place_and_rounding_is_no_difference():
    assert estimates.ranks(np.array([3.0, 1.0, 3.0, 7.0])).tolist() == [2.5, 1, 2.5, 4]
    assert estimates.ranks(np.array([0.1 + 0.2, 0.3, 0.1])).tolist() == [2.5, 2.5, 1]


def test_fishers_interval_is_scipys_and_wider_for_ranks():
    x, y = noise(12), noise(12, seed=1)
    found = stats.pearsonr(x, y).confidence_interval(0.95)
    r = float(estimates.pearson(x, y))
    assert fisher_interval(r, 12, "pearson") == pytest.approx(tuple(found))
    low, high = fisher_interval(0.0, 103, "pearson")
    assert low == -high and high == pytest.approx(math.tanh(1.959964 / 10))
    assert fisher_interval(0.5, 10, "spearman")[0] < fisher_interval(0.5, 10, "pearson")[0] < 0.5
    with pytest.raises(ValueError, match="4 points"):
        fisher_interval(0.5, 3, "pearson")


@pytest.mark.parametrize("how", CORRELATIONS)
def test_the_exact_p_value_counts_the_orders(how):
    x, y = noise(5), noise(5, seed=1)
    found = CORRELATIONS[how](x, y)
    every = [CORRELATIONS[how](x, np.array(order)) >= found - 1e-12 for order in permutations(y)]
    assert estimates.exact_p(x, y, how) == pytest.approx(sum(every) / math.factorial(5))
    assert estimates.exact_p(x, 2 * x, how) == pytest.approx(1 / math.factorial(5))


def test_all_orders_are_taken_where_they_are_few_and_the_first_is_as_it_is():
    every = estimates.orderings(4, 24, generator())
    assert {tuple(order) for order in every} == {*permutations(range(4))}
    some = estimates.orderings(4, 23, generator())
    assert len(some) == 23 and some[0].tolist() == [0, 1, 2, 3]


def test_the_p_of_nothing_is_nothing():
    null = np.stack([[0.1, np.nan], [0.5, np.nan], [0.3, np.nan]])
    assert estimates.reached(np.array([0.3, np.nan]), null)[0] == pytest.approx(2 / 3)
    assert np.isnan(estimates.reached(np.array([0.3, np.nan]), null)[1])
    p, p_max, _ = estimates.largest_of(np.array([0.3, np.nan]), null)
    assert np.isnan([p[1], p_max[1]]).all() and p[0] == p_max[0]


def test_the_largest_of_many_is_found_by_chance_as_often_as_promised():
    """Ten unrelated numbers: one alone is found in half of all cases, corrected in one of ten."""
    alone, corrected, cases = 0, 0, 400
    for case in range(cases):
        x, y = noise(10, 12, seed=case), noise(12, seed=case + 10**6)
        orders = np.stack(estimates.orderings(12, 200, generator(case)))
        null = estimates.pearson(x, y[orders][:, None])
        p, p_max, threshold = estimates.largest_of(null[0], null)
        alone, corrected = alone + (p.min() <= 0.1), corrected + (p_max.min() <= 0.1)
        assert (p_max >= p).all() and (np.abs(null[0]).max() > threshold) <= (p_max.min() <= 0.05)
    assert alone / cases > 0.4
    assert corrected / cases == pytest.approx(0.1, abs=4 * (0.09 / cases) ** 0.5)


def test_holm_by_hand():
    given = np.array([0.01, np.nan, 0.04, 0.03])
    np.testing.assert_allclose(estimates.holm(given), [0.03, np.nan, 0.06, 0.06])
    assert estimates.holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]


def test_the_calibration_error_by_hand():
    sure = torch.tensor([0.95, 0.95, 0.65, 0.65], dtype=torch.float64)
    right = torch.tensor([1, 0, 1, 1]).bool()
    assert_close(estimates.expected_calibration_error(sure, right), (0.45 + 0.35) / 2)
    whole = estimates.expected_calibration_error(sure, right, bins=1)
    assert_close(whole, 0.05)  # 0.8 against 0.75
    sure = torch.tensor([0.75] * 4 + [0.5] * 2, dtype=torch.float64)  # perfectly calibrated
    assert estimates.expected_calibration_error(sure, torch.tensor([1, 1, 1, 0, 1, 0]).bool()) == 0


def test_bins_hold_their_upper_edge_and_empty_ones_have_no_mean():
    found = estimates.reliability(torch.tensor([0.5, 0.51, 1.0, 0.0]), torch.ones(4).bool(), bins=2)
    assert found.count.tolist() == [2, 2]
    empty = estimates.reliability(torch.tensor([0.9]), torch.ones(1).bool(), bins=2)
    assert empty.count.tolist() == [0, 1] and math.isnan(empty.accuracy[0])
    assert_close(empty.error, 0.1, rtol=1e-6, atol=0)


def test_the_error_by_chance_of_one_calibrated_answer_is_known_and_falls_with_more_rows():
    """With 0.75 an answer is off by 0.25 three times in four, and by 0.75 once."""
    sure = torch.tensor([0.75], dtype=torch.float64)
    assert abs(estimates.chance_error(sure, draws=4000) - 0.375) < 4 * 0.217 / math.sqrt(4000)
    sure = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    few, many = estimates.chance_error(sure[:40], draws=50), estimates.chance_error(sure, draws=50)
    assert few > 3 * many


def test_calibration_asks_for_rows_bins_and_probabilities():
    right = torch.ones(1).bool()
    for wrong, bins in ((torch.zeros(0), 10), (torch.tensor([1.5]), 10), (torch.tensor([0.5]), 0)):
        with pytest.raises(ValueError, match="one row or more"):
            estimates.reliability(wrong, right[: len(wrong)], bins=bins)
    with pytest.raises(ValueError, match="draws"):
        estimates.chance_error(torch.tensor([0.5]), draws=0)
