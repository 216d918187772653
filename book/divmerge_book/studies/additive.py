"""Do the losses of pairs add up? What T = 2 says about larger subsets, held against them.

A loss is 1 minus a task's ratio: the share of its expert's accuracy that a merge gives up; or 1
minus its kept margin, where `column` says so. Tables are those of `scores.ratios`, of one method at
one seed.
"""

import numpy as np
import pandas as pd

from divmerge_book.evaluation.statistics import middle, pearson
from divmerge_book.studies.scores import tasks_of

COLUMNS = ["subset", "T", "task", "loss", "sum", "worst", "mean"]
FORECASTS = {
    "sum": "pairs add up",
    "worst": "the worst pair decides",
    "mean": "mean of the pairs",
    "line": "line in the sum",
    "usual": "the task's usual loss",
}


def loss_of(table: pd.DataFrame, column: str) -> dict[tuple[str, frozenset[str]], float]:
    """The loss of every task in every subset, by task and subset."""
    subsets = table.subset.map(lambda name: frozenset(tasks_of(name)))
    return dict(zip(zip(table.task, subsets, strict=True), 1 - table[column], strict=True))


def pair_forecasts(table: pd.DataFrame, column: str = "ratio") -> pd.DataFrame:
    """What the pairs say that a task loses in larger subsets, beside what it does lose.

    Columns: subset, T, task, loss, sum, worst, mean. sum: the loss alone plus, for every partner,
    what the pair with it loses beyond that; alone is the subset of the task itself where the table
    has it, else 0. worst: as if there were one partner, the worst. mean: as if there were one, the
    mean over partners. Rows whose pairs are not all in the table are left out.
    """
    losses, rows = loss_of(table, column), []
    for row in table[table["T"] > 2].itertuples():
        alone = losses.get((row.task, frozenset([row.task])), 0.0)
        others = [other for other in tasks_of(row.subset) if other != row.task]
        pairs = [(row.task, frozenset([row.task, other])) for other in others]
        if not all(pair in losses for pair in pairs):
            continue
        beyond = np.array([losses[pair] - alone for pair in pairs])
        said = [float(alone + f(beyond)) for f in (np.sum, np.max, np.mean)]
        rows.append((row.subset, row.T, row.task, 1 - getattr(row, column), *said))
    return pd.DataFrame(rows, columns=COLUMNS)


def forecasts(table: pd.DataFrame, column: str = "ratio") -> pd.DataFrame:
    """`pair_forecasts` with two that are learned from the other subsets of the same T.

    line: a straight line in `sum`, least squares. usual: the task's mean loss in them, or all
    tasks' where it is in none. NaN where a T has fewer than three subsets.
    """
    found = pair_forecasts(table, column)
    parts = [
        learned(some, subset) for _, some in found.groupby("T") for subset in some.subset.unique()
    ]
    return pd.concat(parts) if parts else found.assign(line=[], usual=[])


def learned(some: pd.DataFrame, subset: str) -> pd.DataFrame:
    """The rows of one subset of a T, with forecasts from the others."""
    own, others = some[some.subset == subset], some[some.subset != subset]
    if others.subset.nunique() < 2:
        return own.assign(line=np.nan, usual=np.nan)
    middle, spread = others["sum"].mean(), others["sum"].var(ddof=0)
    slope = (others["sum"] - middle).dot(others.loss) / len(others) / spread if spread else 0.0
    usual = own.task.map(others.groupby("task").loss.mean()).fillna(others.loss.mean())
    return own.assign(line=others.loss.mean() + slope * (own["sum"] - middle), usual=usual)


def r_squared(loss: np.ndarray, forecast: np.ndarray) -> float:
    """Share of the losses' variance that a forecast explains.

    1 is perfect, 0 no better than their mean, below 0 worse; NaN where the losses do not vary.
    """
    spread = float(((loss - loss.mean()) ** 2).sum())
    return 1 - float(((loss - forecast) ** 2).sum()) / spread if spread else float("nan")


def drawn_subsets(table: pd.DataFrame, draws: int) -> list[np.ndarray]:
    """Row positions of bootstrap samples: as many subsets of every T as there are, with all rows.

    A T with a single subset keeps it.
    """
    generator, samples, groups = np.random.default_rng(0), [], []
    for _, some in table.reset_index(drop=True).groupby("T", sort=False):
        groups.append([rows.index.to_numpy() for _, rows in some.groupby("subset", sort=False)])
    for _ in range(draws):
        chosen = [(one, generator.integers(len(one), size=len(one))) for one in groups]
        samples.append(np.concatenate([one[n] for one, places in chosen for n in places]))
    return samples


def skill(table: pd.DataFrame, *, draws: int = 500) -> pd.DataFrame:
    """How well each forecast does, for every T and, as T = 0, over all of them.

    table: of `forecasts`; rows without a learned forecast are left out. Columns: forecast, T,
    subsets, r2, r2_low, r2_high, r, r_low, r_high: `r_squared` and the correlation with their 95 %
    bootstrap intervals over subsets, all of a subset's tasks together.
    """
    whole, rows = table.dropna().reset_index(drop=True), []
    for number, some in [(0, whole), *whole.groupby("T")] if len(whole) else []:
        samples, loss = drawn_subsets(some, draws), some.loss.to_numpy()
        for forecast in FORECASTS:
            column = some[forecast].to_numpy()
            row = {"forecast": forecast, "T": number, "subsets": some.subset.nunique()}
            for name, measure in (("r2", r_squared), ("r", pearson)):
                low, high = middle(np.array([measure(loss[s], column[s]) for s in samples]))
                values = {name: measure(loss, column), f"{name}_low": low, f"{name}_high": high}
                row |= {key: float(value) for key, value in values.items()}
            rows.append(row)
    return pd.DataFrame(rows)
