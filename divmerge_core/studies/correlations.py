"""Correlations with honest uncertainty: exact permutations for few points, resampling for many.

`closeness` is minus a divergence: large where two models agree. Rows of a matrix are tasks, columns
the models that are asked about them; on the diagonal of a square one stands the task's own expert.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations

import numpy as np
import pandas as pd

NORMAL = 1.959964  # the 97.5 % point of the standard normal distribution


def ranks(values: np.ndarray) -> np.ndarray:
    """Rank along the last axis, from 1; equal values share their mean rank."""
    flat = values.reshape(-1, values.shape[-1])
    return pd.DataFrame(flat).rank(axis=1).to_numpy().reshape(values.shape)


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Product-moment correlation along the last axis, -1 to 1; NaN where one side is constant."""
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    flat = scale <= 1e-12
    return np.where(flat, np.nan, (x * y).sum(-1) / np.where(flat, 1.0, scale))


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis: Pearson's of the ranks."""
    return pearson(ranks(x), ranks(y))


Correlation = Callable[[np.ndarray, np.ndarray], np.ndarray]
CORRELATIONS: Mapping[str, Correlation] = {"pearson": pearson, "spearman": spearman}


def orders(count: int) -> np.ndarray:
    """Every order of 0 to count - 1, `[count!, count]`. Raises ValueError for more than 8."""
    if not 2 <= count <= 8:
        raise ValueError(f"all orders are worked out for 2 to 8 points, got {count}")
    return np.array(list(permutations(range(count))))


def exact_p(x: np.ndarray, y: np.ndarray, how: str) -> float:
    """Share of all orders of y whose correlation with x is as high as the one found, or higher.

    One-sided, as the claim is: closer is better. At least 1 / n!.
    """
    found, every = CORRELATIONS[how](x, y), CORRELATIONS[how](x, y[orders(len(y))])
    return float((every >= found - 1e-12).mean())


def interval(value: float, count: int, how: str) -> tuple[float, float]:
    """Fisher's 95 % interval of one correlation over `count` points, 4 or more.

    Exact for normal points only; Spearman's variance is 1.06 times as large (Fieller et al. 1957).
    """
    if count < 4:
        raise ValueError(f"Fisher's interval needs 4 points or more, got {count}")
    half = NORMAL * math.sqrt({"pearson": 1.0, "spearman": 1.06}[how] / (count - 3))
    middle = math.atanh(min(max(value, -1 + 1e-12), 1 - 1e-12))
    return math.tanh(middle - half), math.tanh(middle + half)


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
            low, high = interval(value, len(tasks) - 1, how)
            row = {"task": task, "how": how, "kept": whole[n], "alone": alone[n].mean()}
            row |= {"alone_low": tails[0, n], "alone_high": tails[1, n]}
            rows.append(row | {"value": value, "low": low, "high": high})
            rows[-1]["p"] = exact_p(x[n], y[n], how)
    return pd.DataFrame(rows)


def relabelled_p(closeness: np.ndarray, accuracy: np.ndarray, how: str) -> float:
    """Exact p-value of the mean over tasks, without trivial points, when tasks swap their names.

    Every order of the T names is applied to rows and columns of `closeness` at once (Mantel's
    test), so an expert that is near to all, or good for all, stays so. One-sided.
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
    return float((pearson(rest, y).mean(-1) >= found - 1e-12).mean())


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
    return (1 + (correlation(x, every).mean(-1) >= found - 1e-12).sum()) / (1 + draws)


def over_tasks(closeness: np.ndarray, accuracy: np.ndarray, *, draws: int = 10000) -> pd.DataFrame:
    """The mean over tasks of the correlations, with the trivial point and without it.

    Columns: how, kept, alone, value (without the point), low, high (95 %, tasks resampled), within
    and relabelled: p-values of `within_p` and `relabelled_p`.
    """
    rows, generator = [], np.random.default_rng(0)
    drawn = generator.integers(len(closeness), size=(draws, len(closeness)))
    for how, correlation in CORRELATIONS.items():
        each = correlation(others(closeness), others(accuracy))
        low, high = np.percentile(each[drawn].mean(1), [2.5, 97.5])
        row = {"how": how, "kept": correlation(closeness, accuracy).mean()}
        row |= {"alone": own_point_alone(closeness, accuracy, how).mean()}
        row |= {"value": each.mean(), "low": low, "high": high}
        row |= {"within": within_p(closeness, accuracy, how)}
        rows.append(row | {"relabelled": relabelled_p(closeness, accuracy, how)})
    return pd.DataFrame(rows)
