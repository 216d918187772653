"""Intervals over seeds and test rows, correlations, permutation tests, and calibration.

Beyond SciPy: variance components of rows crossed with seeds (`coverage` measures the coverage of
their intervals), correlations of many columns at once, and corrections for multiple comparisons.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import optimize, stats
from torch import Tensor


def row_means(values: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Means of the columns of `[n, K]` over rows: `[1 + draws, K]`, as they are and by bootstrap.

    A draw takes the same n - 1 of n rows of all columns, with replacement: n - 1, so that the
    variance over draws has no bias.
    """
    count, taken = len(values), max(len(values) - 1, 1)
    rows = generator.integers(count, size=(draws, taken)) + count * np.arange(draws)[:, None]
    drawn = np.bincount(rows.ravel(), minlength=draws * count).reshape(draws, count)
    drawn = drawn.astype(float)  # how often a row was drawn
    return np.concatenate([values.sum(0, keepdims=True) / count, drawn @ values / taken])


@dataclass(frozen=True)
class Estimate:
    """Means over seeds `[*A]`, and the components of their variance.

    between: of seeds and their interaction with rows, with num_seeds - 1 degrees of freedom; 0 for
    one seed, where it is unknown. within: of rows, with `freedom` degrees of freedom.
    """

    value: np.ndarray | np.floating
    between: np.ndarray | np.floating
    within: np.ndarray | np.floating
    num_seeds: int
    freedom: int

    def half(self, level: float = 0.95) -> np.ndarray | np.floating:
        """Half the width of the interval: the standard error times a t quantile.

        The quantile lies between Satterthwaite's (1946), too small for few seeds, and Cochran's
        (1951), each component's own weighted by its variance, too large where rows vary as much:
        nearer to Cochran's by the share that seeds have in the variance.
        """
        point, seeds = (1 + level) / 2, max(self.num_seeds - 1, 1)
        total = self.between + self.within
        share = self.between / np.where(total > 0, total, 1)
        freedom = 1 / (share**2 / seeds + (1 - share) ** 2 / self.freedom)
        own = share * stats.t.ppf(point, seeds) + (1 - share) * stats.t.ppf(point, self.freedom)
        quantile = share * own + (1 - share) * stats.t.ppf(point, freedom)
        return quantile * np.sqrt(total)

    def interval(self, level: float = 0.95) -> tuple[np.ndarray | np.floating, ...]:
        """The lower and the upper end of the confidence interval of this level."""
        half = self.half(level)
        return self.value - half, self.value + half

    def p(self) -> float:
        """Two-sided p-value of one value against 0: the interval of level 1 - p just touches 0."""
        if not (size := abs(float(self.value))):
            return 1.0
        gap = lambda log_p: float(self.half(1 - math.exp(log_p))) - size  # noqa: E731
        if gap(SMALLEST) < 0:
            return math.exp(SMALLEST)
        return math.exp(optimize.brentq(gap, SMALLEST, 0.0))


SMALLEST = math.log(1e-12)  # p-values are not resolved below


def crossed(
    exact: Float[np.ndarray, " S *A"], drawn: Float[np.ndarray, " S D *A"], freedom: int
) -> Estimate:
    """The mean over seeds of a score of rows that every seed answers, with its variance.

    exact: each seed's score on the rows as they are. drawn: on D draws of rows (`row_means`), the
    same for all seeds. freedom: rows minus the number of tasks. The interaction of seeds and rows,
    in the variance between seeds and in the mean's over draws, is counted once: it is how much more
    one seed varies over draws than the mean does. With one seed only rows vary.
    """
    count, value = len(exact), exact.mean(0)
    whole = drawn.mean(0).var(0, ddof=1)  # rows + interaction / S
    if count == 1:
        return Estimate(value, np.zeros_like(whole), whole, 1, freedom)
    single = drawn.var(1, ddof=1).mean(0)  # rows + interaction
    rows = np.maximum(whole - np.maximum(single - whole, 0) / (count - 1), 0)
    return Estimate(value, exact.var(0, ddof=1) / count, rows, count, freedom)


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of independent values; NaN for fewer than two, or a NaN."""
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan, math.nan
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def middle(drawn: Float[np.ndarray, " D *A"], level: float = 0.95) -> np.ndarray:
    """The percentile interval `[2, *A]` of bootstrap draws, without NaN draws; NaN if all are."""
    none = np.isnan(drawn).all(0)
    points = ((1 - level) / 2, (1 + level) / 2)
    return np.where(none, np.nan, np.nanquantile(np.where(none, 0.0, drawn), points, axis=0))


def share_half_width(
    share: np.ndarray | pd.DataFrame, count: np.ndarray | pd.Series, level: float = 0.95
) -> np.ndarray | pd.DataFrame:
    """Half the width of the interval of a share of `count` rows: the normal approximation."""
    return stats.norm.ppf((1 + level) / 2) * np.sqrt(share * (1 - share) / count)


def ranks(values: Float[np.ndarray, "*A n"]) -> Float[np.ndarray, "*A n"]:
    """Places from 1 for the smallest along the last axis; equal values share their mean place.

    Differences below 1e-9 of the largest magnitude are rounding, and count as equal.
    """
    scale = np.abs(values).max(-1, keepdims=True, initial=0)
    return stats.rankdata(np.round(values / np.where(scale > 0, scale, 1), 9), axis=-1)


def standard(values: Float[np.ndarray, "*A n"]) -> Float[np.ndarray, "*A n"]:
    """Less the mean, and of length 1: inner products are correlations. NaN if constant."""
    if not values.shape[-1]:
        return values
    centred = values - values.mean(-1, keepdims=True)
    length = np.linalg.norm(centred, axis=-1, keepdims=True)
    varies = length > 1e-9 * np.abs(values).max(-1, keepdims=True)
    return centred / np.where(varies, length, np.nan)


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Product-moment correlation along the last axis, -1 to 1; NaN where one side is constant."""
    return np.where(np.shape(x)[-1], (standard(x) * standard(y)).sum(-1), np.nan)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis: Pearson's of the ranks."""
    return pearson(ranks(x), ranks(y))


CORRELATIONS = {"pearson": pearson, "spearman": spearman}


def format_correlation(value: float, digits: int = 2) -> str:
    """A correlation as text: signed, or `undefined` where it is NaN.

    >>> format_correlation(0.254), format_correlation(float("nan"))
    ('+0.25', 'undefined')
    """
    return "undefined" if math.isnan(value) else f"{value:+.{digits}f}"


def fisher_interval(value: float, count: int, how: str) -> tuple[float, float]:
    """Fisher's 95 % interval of one correlation over `count` points, 4 or more; NaN of NaN.

    Exact for normal points only; Spearman's variance is 1.06 times as large (Fieller et al. 1957).
    """
    if count < 4:
        raise ValueError(f"Fisher's interval needs 4 points or more, got {count}")
    half = stats.norm.ppf(0.975) * math.sqrt({"pearson": 1.0, "spearman": 1.06}[how] / (count - 3))
    centre = np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12))
    return math.tanh(centre - half), math.tanh(centre + half)


def orders(count: int) -> np.ndarray:
    """Every order of 0 to count - 1, `[count!, count]`. Raises ValueError for more than 8."""
    if not 2 <= count <= 8:
        raise ValueError(f"all orders are worked out for 2 to 8 points, got {count}")
    return np.array(list(permutations(range(count))))


def orderings(count: int, draws: int, generator: np.random.Generator) -> Sequence[np.ndarray]:
    """All orders of `count` things where these are no more than `draws`, or `draws` random ones.

    The first is the order as it is.
    """
    if math.factorial(count) <= draws:
        return [np.array(order) for order in permutations(range(count))]
    return [np.arange(count), *(generator.permutation(count) for _ in range(draws - 1))]


def exact_p(x: np.ndarray, y: np.ndarray, how: str) -> float:
    """Share of all orders of y whose correlation with x is as high as the one found, or higher.

    One-sided, as the claim is: closer is better. At least 1 / n!; NaN where x or y is constant.
    """
    correlation = partial(CORRELATIONS[how], x)
    if np.isnan(correlation(y)):
        return math.nan
    every = {"permutation_type": "pairings", "n_resamples": math.factorial(len(y))}
    found = stats.permutation_test(
        (y,), lambda some, axis: correlation(some), vectorized=True, alternative="greater", **every
    )
    return float(found.pvalue)


def reached(value: np.ndarray | float, null: Float[np.ndarray, " D *A"]) -> np.ndarray:
    """Share of draws of `null` that are as large as `value`, or larger; NaN where it is NaN."""
    return np.where(np.isnan(value), np.nan, (null >= value - 1e-9).mean(0))


def largest_of(
    value: Float[np.ndarray, "*A"], null: Float[np.ndarray, " D *A"]
) -> tuple[Float[np.ndarray, "*A"], Float[np.ndarray, "*A"], float]:
    """Two-sided p-values of many statistics: of each alone, and corrected for all of them.

    null: the statistics under D permutations, the one found among them. The correction compares
    with the largest size in each permutation (Westfall and Young 1993). Third: what that largest
    exceeds in at most one permutation of twenty. NaN where a statistic is NaN.
    """
    size, sizes = np.abs(value), np.abs(null)
    largest = np.nanmax(sizes, axis=tuple(range(1, sizes.ndim)), initial=0, keepdims=True)
    threshold = float(np.sort(largest, axis=None)[::-1][len(largest) // 20])
    return reached(size, sizes), reached(size, largest), threshold


def holm(p: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    """Holm's correction of p-values for M comparisons; NaN is no comparison and stays.

    Source: Holm 1979, Scandinavian Journal of Statistics 6(2).
    """
    adjusted, known = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


@dataclass(frozen=True)
class Reliability:
    """Rows by confidence, in K bins of equal width; means are NaN where a bin is empty."""

    count: Int[Tensor, " K"]
    confidence: Float[Tensor, " K"]
    accuracy: Float[Tensor, " K"]

    @property
    def error(self) -> float:
        """Expected calibration error: see `expected_calibration_error`."""
        gap = (self.accuracy - self.confidence).abs().nan_to_num(nan=0.0)
        return (self.count.double() @ gap / self.count.sum()).item()


def reliability(
    confidence: Float[Tensor, " n"], right: Bool[Tensor, " n"], *, bins: int = 10
) -> Reliability:
    """Accuracy and mean confidence per bin of confidence (Guo et al. 2017, §2).

    Bin k contains confidences above k / bins up to and including (k + 1) / bins. Raises ValueError
    without rows, for bins below 1, and for confidences outside 0 to 1.
    """
    if not len(confidence) or bins < 1 or not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(
            f"give one row or more, confidences from 0 to 1 and one bin or more; got "
            f"{len(confidence)} rows and {bins} bins"
        )
    sure = confidence.double()
    edges = torch.arange(1, bins, dtype=torch.float64, device=sure.device) / bins
    place = torch.bucketize(sure, edges)  # [n]: edges[k - 1] < confidence <= edges[k]
    total = partial(torch.bincount, place, minlength=bins)
    return Reliability(total(), total(sure) / total(), total(right.double()) / total())  # 0 / 0


def expected_calibration_error(
    confidence: Float[Tensor, " n"], right: Bool[Tensor, " n"], *, bins: int = 10
) -> float:
    """Mean distance between confidence and accuracy over bins, weighted by their rows; 0 to 1.

    Few rows bias it upwards, as accuracies of small bins scatter: compare it with `chance_error`.
    Few bins bias it downwards, as errors of opposite sign in a bin cancel.
    Source: Naeini et al. 2015; Guo et al. 2017 (arXiv 1706.04599), Eq. 3.
    """
    return reliability(confidence, right, bins=bins).error


def chance_error(
    confidence: Float[Tensor, " n"], *, bins: int = 10, draws: int = 200, seed: int = 0
) -> float:
    """The calibration error that a perfectly calibrated model would show on as many rows.

    Mean over `draws` in which every answer is right with the probability of its confidence. Source:
    Brocker and Smith 2007, for reliability diagrams. Raises ValueError for draws below 1.
    """
    if draws < 1:
        raise ValueError(f"draws must be 1 or more, got {draws}")
    sure, generator = confidence.double().cpu(), torch.Generator().manual_seed(seed)
    drawn = (torch.rand(sure.shape, generator=generator, dtype=sure.dtype) for _ in range(draws))
    return sum(expected_calibration_error(sure, one < sure, bins=bins) for one in drawn) / draws
