"""Rank correlations between numbers about pairs of tasks, where pairs that share a task are alike.

A number about task i when it is merged with task j stands in a matrix [T, T]; its diagonal says
nothing. 28 pairs of 8 tasks are not 28 independent draws, so tasks are what is resampled and
permuted: rows and columns of a matrix move together.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from divmerge_book.evaluation.statistics import largest_of, middle, orderings, ranks, standard
from divmerge_core.registry import Registry

VIEWS = Registry("view")  # name -> function of a matrix [..., T, T] with NaN where there is no pair


@VIEWS.register("pair", label="which pair is hurt")
def pair(values: Float[np.ndarray, "*A T T"]) -> Float[np.ndarray, "*A T T"]:
    """A pair's mean over its two tasks."""
    return (values + values.swapaxes(-1, -2)) / 2


@VIEWS.register("task", label="which task of which pair is hurt")
def task(values: Float[np.ndarray, "*A T T"]) -> Float[np.ndarray, "*A T T"]:
    """Every task of every pair by itself."""
    return values


@VIEWS.register("partner", label="which partner hurts a given task")
def partner(values: Float[np.ndarray, "*A T T"]) -> Float[np.ndarray, "*A T T"]:
    """Every task of every pair, less the task's own mean: what depends on the partner."""
    there = ~np.isnan(values)
    total = np.where(there, values, 0).sum(-1, keepdims=True)
    return values - total / np.maximum(there.sum(-1, keepdims=True), 1)


def entries(
    values: Float[np.ndarray, "*A T T"], view: str, chosen: Int[np.ndarray, " t"] | None = None
) -> Float[np.ndarray, "*A n"]:
    """A view's values for all ordered pairs of the chosen tasks (all of them by default).

    A task that is chosen twice makes no pair with itself. Symmetric values come twice, which
    changes no correlation.
    """
    chosen = np.arange(values.shape[-1]) if chosen is None else chosen
    apart = chosen[:, None] != chosen
    some = np.where(apart, values[..., chosen[:, None], chosen], np.nan)
    scale = np.nanmax(np.abs(values), axis=(-1, -2), keepdims=True, initial=0)
    seen = VIEWS[view](some / np.where(scale > 0, scale, 1))
    return np.round(seen[..., apart], 12)  # what cancels exactly is 0


@dataclass(frozen=True)
class Found:
    """Spearman correlations [M, K, L] of K numbers and L damages for each of M methods.

    low, high: 95 % bootstrap interval. p: permutation test of one correlation alone. p_max: the
    same, corrected for all of them by the largest of them. threshold: what the largest of all
    |correlation| exceeds in at most one of twenty permutations: p_max is 0.05 or less above it. NaN
    where a number does not vary.
    """

    value: Float[np.ndarray, "M K L"]
    low: Float[np.ndarray, "M K L"]
    high: Float[np.ndarray, "M K L"]
    p: Float[np.ndarray, "M K L"]
    p_max: Float[np.ndarray, "M K L"]
    threshold: float


def every_correlation(
    numbers: Float[np.ndarray, "M K n"], damages: Float[np.ndarray, "M L n"]
) -> Float[np.ndarray, "M K L"]:
    """Rank correlation of every number with every damage of the same method; NaN if constant."""
    one, other = standard(ranks(numbers)), standard(ranks(damages))
    return np.einsum("mkn,mln->mkl", one, other)


def correlate(
    numbers: Float[np.ndarray, "M K S T T"],
    damages: Float[np.ndarray, "M L S T T"],
    *,
    view: str,
    draws: int = 2000,
    seed: int = 0,
) -> Found:
    """How well K numbers rank L damages, for each of M methods, over S seeds of T tasks.

    The means over seeds are correlated. Intervals: percentiles of a bootstrap that draws seeds and
    tasks with replacement; a pair counts as often as the product of its tasks' draws. Test: the
    tasks of the damages are renamed, rows and columns at once, the same way for all methods and
    damages (Mantel 1967; all orders where there are no more than `draws`). The correction takes the
    largest |correlation| of each renaming (Westfall and Young 1993). Entries on diagonals are not
    read. Raises ValueError for fewer than three tasks, which leave nothing to rank, and for an
    unknown view.
    """
    VIEWS[view]
    num_seeds, num_tasks = numbers.shape[2], numbers.shape[-1]
    if num_tasks < 3:
        raise ValueError(f"ranking pairs needs three tasks or more, got {num_tasks}")
    generator = np.random.default_rng(seed)
    means = numbers.mean(2), damages.mean(2)
    value = every_correlation(*(entries(some, view) for some in means))
    drawn = np.stack([
        resampled(numbers, damages, view, generator.integers(num_seeds, size=num_seeds),
                  generator.integers(num_tasks, size=num_tasks))
        for _ in range(draws)
    ])  # fmt: skip
    low, high = middle(drawn)
    orders = orderings(num_tasks, draws, generator)
    null = renamed(*means, view, orders)  # [draws, M, K, L]
    return Found(value, low, high, *largest_of(value, null))


def resampled(numbers, damages, view, seeds, tasks) -> Float[np.ndarray, "M K L"]:
    """The correlations for drawn seeds and tasks; NaN where too few tasks are left."""
    means = (some[:, :, seeds].mean(2) for some in (numbers, damages))
    return every_correlation(*(entries(some, view, tasks) for some in means))


def renamed(numbers, damages, view, orders) -> Float[np.ndarray, "draws M K L"]:
    """The correlations under every order of the damages' tasks."""
    count = numbers.shape[-1]
    apart = ~np.eye(count, dtype=bool)
    one = standard(ranks(entries(numbers, view)))
    other = np.zeros(damages.shape)
    other[..., apart] = standard(ranks(entries(damages, view)))
    return np.stack([
        np.einsum("mkn,mln->mkl", one, other[..., order[:, None], order][..., apart])
        for order in orders
    ])  # fmt: skip
