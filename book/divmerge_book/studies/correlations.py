"""Correlations over experts: exact permutations, with and without the trivial point.

`closeness` is minus a divergence: large where two models agree. Rows of a matrix are tasks, columns
the models that are asked about them; on the diagonal of a square one stands the task's own expert.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from divmerge_book.evaluation.statistics import (
    CORRELATIONS,
    exact_p,
    fisher_interval,
    mean_interval,
    orders,
    pearson,
    ranks,
    reached,
)

# --- square matrices: every expert asked about every task -----------------------------------------


def others(matrix: np.ndarray) -> np.ndarray:
    """A square matrix without its diagonal, `[T, T] -> [T, T - 1]`."""
    count = len(matrix)
    return matrix[~np.eye(count, dtype=bool)].reshape(count, count - 1)


def own_point_alone(closeness: np.ndarray, accuracy: np.ndarray, how: str) -> np.ndarray:
    """Correlations where the own expert keeps its place and the others' accuracies are exchanged.

    `[T, T] -> [T, (T - 1)!]`: what a row's correlation can be if closeness says nothing about the
    other experts. Its mean over orders is what the trivial point brings by itself.
    """
    x = np.concatenate([np.diag(closeness)[:, None], others(closeness)], axis=1)  # [T, T]
    every = orders(len(x) - 1)
    return np.stack(
        [
            CORRELATIONS[how](row, np.insert(rest[every], 0, own, axis=1))
            for row, own, rest in zip(x, np.diag(accuracy), others(accuracy), strict=True)
        ]
    )


def by_task(closeness: np.ndarray, accuracy: np.ndarray, tasks: Sequence[str]) -> pd.DataFrame:
    """Every task's correlations over experts, with the trivial point and without it.

    Columns: task, how, kept (value with the trivial point), alone (mean of `own_point_alone`),
    alone_low and alone_high (its 2.5 and 97.5 % points), value (without the point), low, high
    (Fisher's interval), p (exact, one-sided).
    """
    rows = []
    for how, correlation in CORRELATIONS.items():
        alone = own_point_alone(closeness, accuracy, how)
        tails = np.percentile(alone, [2.5, 97.5], axis=1)
        whole = correlation(closeness, accuracy)
        x, y = others(closeness), others(accuracy)
        for n, (task, value) in enumerate(zip(tasks, correlation(x, y), strict=True)):
            low, high = fisher_interval(value, len(tasks) - 1, how)
            row = {"task": task, "how": how, "kept": whole[n], "alone": alone[n].mean()}
            row |= {"alone_low": tails[0, n], "alone_high": tails[1, n]}
            rows.append(row | {"value": value, "low": low, "high": high})
            rows[-1]["p"] = exact_p(x[n], y[n], how)
    return pd.DataFrame(rows)


def relabelled_p(closeness: np.ndarray, accuracy: np.ndarray, how: str) -> float:
    """Exact p-value of the mean over tasks, without trivial points, when tasks swap their names.

    Every order of the T names is applied to rows and columns of `closeness` at once (Mantel's
    test), so an expert that is near to all, or good for all, stays so. One-sided. NaN where one
    task's correlation is undefined.
    """
    found = CORRELATIONS[how](others(closeness), others(accuracy)).mean()
    x, y = others(closeness), others(accuracy)
    if how == "spearman":  # of a row, whatever the names of its columns
        x, y = ranks(x), ranks(y)
    square = np.zeros_like(closeness)
    square[~np.eye(len(square), dtype=bool)] = x.ravel()
    every = orders(len(square))
    moved = square[every[:, :, None], every[:, None, :]]  # [T!, T, T]: rows and columns at once
    rest = moved[:, ~np.eye(len(square), dtype=bool)].reshape(len(every), *y.shape)
    return float(reached(found, pearson(rest, y).mean(-1)))


def within_p(
    closeness: np.ndarray, accuracy: np.ndarray, how: str, draws: int = 10000, seed: int = 0
) -> float:
    """P-value of the mean over tasks, where every task's accuracies are exchanged by themselves.

    Random orders, the one found counted among them. One-sided. Takes rows for independent, which
    rows about the same experts are not; `relabelled_p` does not.
    """
    generator, correlation = np.random.default_rng(seed), CORRELATIONS[how]
    x, y = others(closeness), others(accuracy)
    found = correlation(x, y).mean()
    every = generator.permuted(np.broadcast_to(y, (draws, *y.shape)), axis=-1)
    return float(reached(found, np.append(correlation(x, every).mean(-1), found)))


def over_tasks(closeness: np.ndarray, accuracy: np.ndarray, *, draws: int = 10000) -> pd.DataFrame:
    """The mean over tasks of the correlations, with the trivial point and without it.

    Columns: how, kept, alone, value (without the point), low, high (95 %, Student's over tasks),
    within and relabelled: p-values of `within_p`, of so many draws, and `relabelled_p`. NaN where
    a task's correlation is undefined, as one side is constant.
    """
    rows = []
    for how, correlation in CORRELATIONS.items():
        each = correlation(others(closeness), others(accuracy))
        low, high = mean_interval(each)
        row = {"how": how, "kept": correlation(closeness, accuracy).mean()}
        row |= {"alone": own_point_alone(closeness, accuracy, how).mean()}
        row |= {"value": each.mean(), "low": low, "high": high}
        row |= {"within": within_p(closeness, accuracy, how, draws)}
        rows.append(row | {"relabelled": relabelled_p(closeness, accuracy, how)})
    return pd.DataFrame(rows)
