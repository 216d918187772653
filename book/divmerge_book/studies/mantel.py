"""Rank correlations between matrices over pairs of tasks, with Mantel's permutation test.

Entry [i, j] of a [T, T] matrix is a number about task i when it is merged with task j; diagonals
are not used. Pairs that share a task are dependent, so tasks are resampled and permuted: rows and
columns of a matrix move together.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from divmerge_book.evaluation.statistics import largest_of, middle, orderings, ranks, standard
from divmerge_core.registry import Registry

VIEWS = Registry("view")  # name -> function of a matrix [..., T, T] with NaN where there is no pair
VIEWS.register("pair", label="which pair is hurt")(
    lambda values: (values + values.swapaxes(-1, -2)) / 2
)
VIEWS.register("task", label="which task of which pair is hurt")(lambda values: values)
Matrices = Float[np.ndarray, "*A T T"]


@VIEWS.register("partner", label="which partner hurts a given task")
def partner(values: Matrices) -> Matrices:
    """Every task of every pair, minus the task's own mean."""
    defined = ~np.isnan(values)
    total = np.where(defined, values, 0).sum(-1, keepdims=True)
    return values - total / np.maximum(defined.sum(-1, keepdims=True), 1)


def entries(
    values: Matrices, view: str, chosen: Int[np.ndarray, " t"] | None = None
) -> Float[np.ndarray, "*A n"]:
    """A view's values for all ordered pairs of the chosen tasks (None: all of them).

    A task that is chosen twice is not paired with itself. Values are scaled to a largest magnitude
    of 1 and rounded, so that exact cancellation gives 0.
    """
    chosen = np.arange(values.shape[-1]) if chosen is None else chosen
    apart = chosen[:, None] != chosen
    some = np.where(apart, values[..., chosen[:, None], chosen], np.nan)
    scale = np.nanmax(np.abs(values), axis=(-1, -2), keepdims=True, initial=0)
    return np.round(VIEWS[view](some / np.where(scale > 0, scale, 1))[..., apart], 12)


class Correlations(NamedTuple):
    """Correlations `[*A]` with their 95 % bootstrap intervals and permutation tests.

    p: p-value of one correlation; p_max: corrected for all of them (max-T, Westfall and Young
    1993). threshold: |correlation| above it has p_max of 0.05 or less. NaN if a side is constant.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    p_max: np.ndarray
    threshold: float


def resampled(
    value: np.ndarray,
    bootstrap: Callable[..., np.ndarray],
    permuted: Callable[[np.ndarray], np.ndarray],
    *,
    sizes: Sequence[int],
    draws: int,
) -> Correlations:
    """Percentile bootstrap and permutation test of correlations.

    bootstrap: the correlations of drawn indices, one array for each of `sizes`, the last of which
    counts the tasks. permuted: those under an order of the tasks (all orders where there are no
    more than `draws`).
    """
    generator = np.random.default_rng(0)
    drawn = [bootstrap(*(generator.integers(n, size=n) for n in sizes)) for _ in range(draws)]
    null = [permuted(order) for order in orderings(sizes[-1], draws, generator)]
    return Correlations(value, *middle(np.stack(drawn)), *largest_of(value, np.stack(null)))


def rank_correlations(
    x: Float[np.ndarray, "M K n"], y: Float[np.ndarray, "M L n"]
) -> Float[np.ndarray, "M K L"]:
    """Spearman correlation of every x with every y of the same method; NaN if constant."""
    return np.einsum("mkn,mln->mkl", standard(ranks(x)), standard(ranks(y)))


def correlate(
    predictors: Float[np.ndarray, "M K S T T"],
    outcomes: Float[np.ndarray, "M L S T T"],
    *,
    view: str,
    draws: int = 2000,
) -> Correlations:
    """Rank correlation of K predictors with L outcomes, for each of M methods, S seeds, T tasks.

    Means over seeds are correlated; the bootstrap is over seeds and tasks. The tasks of the
    outcomes are permuted, rows and columns at once, the same way for all methods and outcomes
    (Mantel 1967). Raises ValueError for fewer than three tasks and for an unknown view.
    """
    VIEWS[view]
    num_seeds, num_tasks = predictors.shape[2], predictors.shape[-1]
    if num_tasks < 3:
        raise ValueError(f"ranking pairs needs three tasks or more, got {num_tasks}")

    def correlations(seeds=slice(None), tasks=None) -> np.ndarray:
        means = (some[:, :, seeds].mean(2) for some in (predictors, outcomes))
        return rank_correlations(*(entries(some, view, tasks) for some in means))

    x, y = (standard(ranks(entries(some.mean(2), view))) for some in (predictors, outcomes))
    apart = ~np.eye(num_tasks, dtype=bool)
    square = np.zeros((*y.shape[:2], num_tasks, num_tasks))
    square[..., apart] = y
    return resampled(
        correlations(),
        correlations,
        lambda order: np.einsum("mkn,mln->mkl", x, square[..., order[:, None], order][..., apart]),
        sizes=(num_seeds, num_tasks),
        draws=draws,
    )
