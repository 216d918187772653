"""Correlations over experts of agreement and accuracy: exact permutations, with and without self.

`closeness` is minus a divergence. Rows of a square matrix are tasks, columns the experts that are
evaluated on them; the diagonal is a task's own expert, whose point is trivial: closest and best.
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


def others(matrix: np.ndarray) -> np.ndarray:
    """A square matrix without its diagonal, `[T, T] -> [T, T - 1]`."""
    return matrix[~np.eye(len(matrix), dtype=bool)].reshape(len(matrix), -1)


def own_point_alone(closeness: np.ndarray, accuracy: np.ndarray, how: str) -> np.ndarray:
    """Correlations where the own expert keeps its place and the others' accuracies are permuted.

    `[T, T] -> [T, (T - 1)!]`: a row's null distribution; its mean is the trivial point's part.
    """
    x = np.concatenate([np.diag(closeness)[:, None], others(closeness)], axis=1)  # [T, T]
    every = orders(len(x) - 1)
    rows = zip(x, np.diag(accuracy), others(accuracy), strict=True)
    return np.stack(
        [CORRELATIONS[how](row, np.insert(rest[every], 0, own, axis=1)) for row, own, rest in rows]
    )


def by_task(closeness: np.ndarray, accuracy: np.ndarray, tasks: Sequence[str]) -> pd.DataFrame:
    """Every task's correlations over experts, with and without its own expert.

    Columns: task, how, kept (with it), alone, alone_low, alone_high (mean, 2.5 and 97.5 % points of
    `own_point_alone`), value (without it), low, high (Fisher's), p (exact, one-sided).
    """
    parts, x, y = [], others(closeness), others(accuracy)
    for how, correlation in CORRELATIONS.items():
        alone, value = own_point_alone(closeness, accuracy, how), correlation(x, y)
        found = {"task": list(tasks), "how": how, "kept": correlation(closeness, accuracy)}
        ends = np.percentile(alone, [2.5, 97.5], axis=1)
        found |= {"alone": alone.mean(1), "alone_low": ends[0], "alone_high": ends[1]}
        low, high = zip(*(fisher_interval(v, len(tasks) - 1, how) for v in value), strict=True)
        p = [exact_p(*pair, how) for pair in zip(x, y, strict=True)]
        parts.append(pd.DataFrame(found | {"value": value, "low": low, "high": high, "p": p}))
    return pd.concat(parts, ignore_index=True)


def relabelled_p(closeness: np.ndarray, accuracy: np.ndarray, how: str) -> float:
    """Exact one-sided p-value of the mean over tasks without own experts: Mantel's test.

    Every order of the T names is applied to rows and columns of `closeness` at once. NaN where one
    task's correlation is undefined.
    """
    x, y = others(closeness), others(accuracy)
    found = CORRELATIONS[how](x, y).mean()
    if how == "spearman":  # of a row, whatever the names of its columns
        x, y = ranks(x), ranks(y)
    square, apart = np.zeros_like(closeness), ~np.eye(len(closeness), dtype=bool)
    square[apart] = x.ravel()
    every = orders(len(square))
    moved = square[every[:, :, None], every[:, None, :]]  # [T!, T, T]: rows and columns at once
    return float(reached(found, pearson(moved[:, apart].reshape(-1, *y.shape), y).mean(-1)))


def within_p(
    closeness: np.ndarray, accuracy: np.ndarray, how: str, draws: int = 10000, seed: int = 0
) -> float:
    """One-sided p-value of the mean over tasks, each task's accuracies permuted by themselves.

    Random orders. Assumes independent rows, which rows about the same experts are not.
    """
    generator, correlation = np.random.default_rng(seed), CORRELATIONS[how]
    x, y = others(closeness), others(accuracy)
    found = correlation(x, y).mean()
    every = generator.permuted(np.broadcast_to(y, (draws, *y.shape)), axis=-1)
    return float(reached(found, np.append(correlation(x, every).mean(-1), found)))


def over_tasks(closeness: np.ndarray, accuracy: np.ndarray, *, draws: int = 10000) -> pd.DataFrame:
    """Means over tasks of the correlations, with and without own experts; NaN if one is undefined.

    Columns: how, kept, alone, value (without own experts), low, high (Student's 95 % over tasks),
    within and relabelled (p-values).
    """
    rows, both = [], (closeness, accuracy)
    for how, correlation in CORRELATIONS.items():
        each = correlation(others(closeness), others(accuracy))
        row = {"how": how, "kept": correlation(*both).mean()}
        row |= {"alone": own_point_alone(*both, how).mean(), "value": each.mean()}
        row |= dict(zip(("low", "high"), mean_interval(each), strict=True))
        row |= {"within": within_p(*both, how, draws), "relabelled": relabelled_p(*both, how)}
        rows.append(row)
    return pd.DataFrame(rows)
